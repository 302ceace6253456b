"""Requests of the real `tinker` client that are sent again, that arrive in another order, or that are given up."""

from __future__ import annotations

from collections import Counter

import pytest

from contract.cells import versions
from contract.clients import run_client
from contract.environments import ENVIRONMENTS
from contract.lossy_proxy import lossy_proxy
from contract.references import checkpoint_tensors, same_bits

SCRIPT = "tinker_retries.py"
LOSES = {
    "create_model": 1,
    "forward_backward": 5,
    "optim_step": 3,
    "retrieve_future": 2,
    "save_weights": 1,
    "save_weights_for_sampler": 1,
}
"""All that the script does, and two of its polls."""
every_version = pytest.mark.parametrize("version", versions("tinker"))


def cell(method: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker", method=method)


@pytest.fixture(scope="module")
def lossy_runs(tinker_root):
    """By release: what the run found through the proxy, and what the proxy saw."""
    runs = {}

    def run(version: str):
        if version not in runs:
            with lossy_proxy(tinker_root, loses=LOSES) as proxy:
                found = run_client(ENVIRONMENTS["tinker", version], SCRIPT, proxy)
                runs[version] = found["run"], proxy
        return runs[version]

    return run


@every_version
@cell("requests sent twice")
def test_a_run_whose_first_answers_are_all_lost_ends_as_one_that_lost_none(
    run_tinker, lossy_runs, tinker_root, version
):
    found, proxy = lossy_runs(version)
    undisturbed = run_tinker(version, SCRIPT)["run"]
    assert Counter(proxy.lost) == LOSES
    assert found["metrics"] == undisturbed["metrics"]
    assert found["logprobs"] == undisturbed["logprobs"]
    for kind in ("state", "snapshot"):
        home = tinker_root.home
        lossy, direct = (checkpoint_tensors(home, each[kind]) for each in (found, undisturbed))
        assert same_bits(lossy, direct)


@pytest.mark.parametrize("version", versions("tinker", since="0.22.7"))
@cell("forward_backward: chunks that arrive 2, 3, 1")
def test_the_first_chunk_may_arrive_last(run_tinker, lossy_runs, version):
    """From 0.20 on the client sends it when the others were accepted; the rows are in order."""
    found, proxy = lossy_runs(version)
    arrived = dict.fromkeys(seq for model, seq in proxy.passes if model == found["model"])
    *before, first = [*arrived][-3:]
    assert first < min(before)
    assert found["logprobs"] == run_tinker(version, SCRIPT)["run"]["logprobs"]


@pytest.mark.parametrize("version", versions("tinker", since="0.26.2"))
@cell("sample: cancelled")
def test_a_sample_that_the_client_gives_up_is_stopped(run_tinker, version):
    answer = run_tinker(version, "tinker_cancel.py")["a_cancelled_sample"]
    assert answer["error_class"] == "failed_precondition"
    assert "cancelled" in answer["error"]
