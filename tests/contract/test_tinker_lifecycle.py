"""Checkpoints, resumption and the end of a session with the real `tinker` client at the root."""

from __future__ import annotations

import numpy as np
import pytest

from contract.cells import versions
from contract.references import (
    PlainModel,
    base_model,
    checkpoint_directory,
    checkpoint_tensors,
    same_bits,
)

ROWS = [list(b"homefire trains "), list(b"what you own"), list(b"5271 -> 1725")]
"""Of `scripts/tinker_kit.py`."""
every_version = pytest.mark.parametrize("version", versions("tinker"))


def cell(method: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker", method=method, **more)


@pytest.fixture
def found(run_tinker, version):
    return run_tinker(version, "tinker_lifecycle.py")


@pytest.fixture
def state(tinker_root):
    return lambda path: checkpoint_tensors(tinker_root.home, path)


@every_version
@cell("create_training_client_from_state_with_optimizer")
def test_a_resumed_run_ends_bit_for_bit_where_the_unbroken_one_does(found, state):
    result = found["resume"]
    assert same_bits(state(result["half"]), state(result["reloaded"]))
    assert same_bits(state(result["whole"]), state(result["resumed"]))
    assert not same_bits(state(result["whole"]), state(result["half"]))


@every_version
@cell("load_state_with_optimizer")
def test_a_state_loaded_into_a_fresh_run_resumes_it(found, state):
    result = found["resume"]
    assert same_bits(state(result["whole"]), state(result["loaded_into_a_fresh_one"]))


@every_version
@cell("create_training_client_from_state")
def test_a_run_made_from_weights_alone_starts_its_optimizer_anew(found, state):
    result = found["resume"]
    again, loaded = result["logprobs"]
    assert again == loaded
    assert not same_bits(state(result["whole"]), state(result["without_optimizer"]))


@every_version
@cell("load_state")
def test_a_run_can_go_back_to_its_own_state(found):
    result = found["load_state_after_training"]
    assert result["loaded"] == result["saved"]
    assert result["moved"] != result["saved"]


@every_version
@cell("load_state: sampler_weights", outcome="refused: wrong_checkpoint_kind")
def test_a_sampler_snapshot_is_no_state(found):
    assert found.refusal("load_a_sampler_snapshot") == "wrong_checkpoint_kind"


@every_version
@cell("save_state: a name twice", outcome="refused: duplicate_checkpoint")
def test_a_name_with_other_content_is_refused_and_training_goes_on(found):
    assert found.refusal("save_twice_under_one_name") == "duplicate_checkpoint"
    assert found["training_after_a_refusal"] > 0


@pytest.mark.parametrize("version", versions("tinker", since="0.22.7"))
@cell("save_state: overwrite")
def test_overwriting_replaces_the_state(found):
    result = found["overwrite"]
    assert result["paths"][0] == result["paths"][1]
    live, restored = result["logprobs"]
    assert live == restored


@every_version
@cell("get_info")
def test_a_run_says_what_it_is(found):
    assert found["get_info"] == {"model": "tiny", "rank": 8, "is_lora": True}


@every_version
@cell("create_lora_training_client: train_attn, train_mlp, train_unembed")
def test_each_part_of_an_adapter_can_train_alone(found):
    norms = found["parts_of_an_adapter"]
    assert min(norms.values()) > 1.0
    assert len(set(norms.values())) == 3


@every_version
@cell("create_lora_training_client: rank 0, all parameters")
def test_rank_0_trains_all_parameters_beside_an_adapter_of_the_same_base(found, tinker_root):
    result = found["full_parameter"]
    base = base_model(tinker_root.home)
    for row, start in zip(ROWS, result["start"], strict=True):
        assert start == pytest.approx(base.of_targets(row), abs=1e-4)
    assert result["losses"][-1] < 0.95 * result["losses"][0]
    before, after = result["beside"]
    assert before == after


@every_version
@cell("create_lora_training_client: rank 0, all parameters")
def test_a_snapshot_of_all_parameters_is_what_the_trainer_computed_with(found, tinker_root):
    """An ordinary model directory, which plain `transformers` loads."""
    result = found["full_parameter"]
    snapshot = PlainModel(checkpoint_directory(tinker_root.home, result["path"]))
    for row, end, resumed in zip(ROWS, result["end"], result["resumed"], strict=True):
        assert end == pytest.approx(snapshot.of_targets(row), abs=1e-4)
        assert resumed == end
    assert np.abs(np.subtract(result["end"][0], result["start"][0])).max() > 0.1


@pytest.mark.parametrize("version", versions("tinker", since="0.30.0"))
@cell("ServiceClient.close", outcome="works")
def test_a_closed_session_takes_no_more_steps(found):
    assert found.refusal("a_closed_session") == "failed_precondition"
