"""Factories of what a run of the quickstart is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from homefire.quickstart.records import BranchProof, Evaluation, Results, Snapshot, StepRecord
from homefire.sdk import SampledCompletion, WeightsIdentity

DIGEST = "9f86d081884c7d659a2feaa0c55ad015"


@pytest.fixture
def snapshot() -> Callable[..., Snapshot]:
    def make(**fields: Any) -> Snapshot:
        defaults = {
            "identity": "step_00312-4b50536f",
            "kind": "delta",
            "step": 312,
            "size_bytes": 141_220,
            "digest": DIGEST,
        }
        return Snapshot(**{**defaults, **fields})

    return make


@pytest.fixture
def completion() -> Callable[..., SampledCompletion]:
    """Of the prompt `21` + answer token, as `12` + end, by the weights of `snapshot()`."""

    def make(**fields: Any) -> SampledCompletion:
        defaults = {
            "text": "12",
            "full_tokens": [50, 49, 257, 49, 50, 256],
            "prompt_len": 3,
            "finish_reason": "stop",
            "completion_len": 3,
            "inference_logprobs": [-0.5, -0.25, -0.125],
            "weights": WeightsIdentity("step_00312-4b50536f", DIGEST),
        }
        return SampledCompletion(**{**defaults, **fields})

    return make


@pytest.fixture
def results(snapshot: Callable[..., Snapshot]) -> Callable[..., Results]:
    def make(before: float = 0.4125, after: float = 0.8504) -> Results:
        base = snapshot(identity="step_00300-4b50536f", kind="base", step=300, size_bytes=1_700_000)
        deltas = [snapshot(identity=f"step_{n:05d}-4b50536f", step=n) for n in (304, 308, 312)]
        return Results(
            job="job-1",
            deployment="quickstart-1",
            before=_evaluation("before RL", base, before),
            after=_evaluation("after RL", snapshot(identity="step_00316-aaaa0000"), after),
            steps=[_step(n, each) for n, each in enumerate([base, *deltas])],
            branch=BranchProof("branch_point", "job-2", 96),
        )

    return make


def _evaluation(name: str, snapshot: Snapshot, reward: float) -> Evaluation:
    return Evaluation(
        name=name,
        snapshot=snapshot,
        reward=reward,
        prompts_sha256="ab" * 32,
        prompts=("21", "543"),
        answers=["12", "543"],
        rewards=[1.0, 0.0],
    )


def _step(number: int, snapshot: Snapshot) -> StepRecord:
    return StepRecord(
        step=number,
        snapshot=snapshot,
        reward=0.4 + number / 10,
        loss=-0.01,
        logprob_gap=3e-6,
        num_completions=512,
        window=64,
        sync_s=0.1,
        sample_s=1.5,
        train_s=0.9,
    )
