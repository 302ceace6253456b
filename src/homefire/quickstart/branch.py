"""Branching: a second job takes a saved state with its optimizer, and goes on exactly there."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import tinker

from homefire.quickstart.lab import Lab, connect, requested_job
from homefire.quickstart.policy import Policy
from homefire.quickstart.promises import promise
from homefire.quickstart.records import BranchProof
from homefire.quickstart.settings import QuickstartSettings
from homefire.quickstart.task import demonstration

STATE = "branch_point"
_PROBE_ROWS = 16


def branch(lab: Lab, policy: Policy, settings: QuickstartSettings) -> BranchProof:
    """Proves that logprobs agree bit for bit right after the load, and again after one identical
    step on both jobs (which only agrees when the optimizer came along). Deletes the second job."""
    policy.client.save_state(STATE).result()
    data = _probe_data(policy, settings)
    with requested_job(lab.jobs, lab.base_model, "quickstart branch") as job:
        endpoint = lab.jobs.wait_for_ready(job.job_id)
        client = connect(endpoint, lab.address, lab.base_model)
        path = client.resolve_checkpoint_path(STATE, source_job_id=lab.job.job_id)
        client.load_state_with_optimizer(path).result()
        other = Policy(client, policy.tokenizer, policy.instruction, policy.num_steps)
        num_logprobs = _compare(policy, other, data, "after the load")
        for each in (policy, other):
            each.imitate(data, learning_rate=settings.rl_learning_rate).metrics()
        _compare(policy, other, data, "after one identical step on both")
        return BranchProof(STATE, job.job_id, num_logprobs)


def _probe_data(policy: Policy, settings: QuickstartSettings) -> list[tinker.Datum]:
    rng = random.Random(settings.seed)
    rows = [demonstration(rng, wrong_share=0.0) for _ in range(_PROBE_ROWS)]
    return policy.supervised_data(rows)


def _compare(original: Policy, branched: Policy, data: list[tinker.Datum], when: str) -> int:
    """How many logprobs were compared."""
    ours, theirs = original.target_logprobs(data), branched.target_logprobs(data)
    promise(
        np.array_equal(ours, theirs),
        f"{when}, logprobs of the branched job differ by up to {_largest(ours - theirs):.3g}",
    )
    return ours.size


def _largest(differences: npt.NDArray[np.float32]) -> float:
    return float(np.abs(differences).max())
