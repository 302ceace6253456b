"""Training runs that share a base model, with the real `tinker` client: none touches another."""

from __future__ import annotations

import numpy as np
import pytest

from contract.cells import versions
from contract.references import Tensors, checkpoint_tensors, difference, same_bits

every_version = pytest.mark.parametrize("version", versions("tinker"))


def cell(method: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker", method=method, **more)


@pytest.fixture
def found(run_tinker, version):
    return run_tinker(version, "tinker_tenants.py")


@pytest.fixture
def state(tinker_root):
    return lambda path: checkpoint_tensors(tinker_root.home, path)


@every_version
@cell("tenants of one base model")
def test_an_idle_tenant_is_untouched_bit_for_bit(found, state):
    """Adapter and optimizer, and what they compute, while another trains with weight decay."""
    result = found["an_idle_tenant"]
    before = state(result["before"])
    assert any("optimizer" in name for name in before)
    assert same_bits(before, state(result["during"]))
    logprobs, after = result["logprobs"]
    assert logprobs == after


@every_version
@cell("tenants of one base model")
def test_the_gradient_of_an_idle_tenant_is_untouched_bit_for_bit(found, state):
    """It was pending throughout; its step ends where that of a twin ends that had no neighbour."""
    result = found["an_idle_tenant"]
    ended, alone = result["grad_norms"]
    assert ended == alone > 0
    assert same_bits(state(result["idle"]), state(result["twin"]))
    assert not same_bits(state(result["idle"]), state(result["before"]))


@every_version
@cell("tenants of one base model")
def test_tenants_that_train_at_the_same_time_end_as_if_alone(found, state):
    """To 1e-4 of the largest weight, after 4 steps: packed together, sums have another order."""
    result = found["tenants_at_the_same_time"]
    for together, alone in zip(result["together"], result["alone"], strict=True):
        ended, expected = weights(state(together)), weights(state(alone))
        largest = max(np.abs(value).max() for value in expected.values())
        assert np.abs(difference(ended, expected)).max() <= 1e-4 * largest


def weights(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name.startswith("weights/")}


@every_version
@cell("create_lora_training_client: seed")
def test_a_seed_names_the_start_of_an_adapter(found, state):
    first, again, other = (state(path) for path in found["runs_of_one_seed_and_of_another"])
    assert same_bits(first, again)
    assert not same_bits(first, other)
