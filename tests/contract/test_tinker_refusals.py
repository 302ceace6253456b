"""What homefire does not do is refused by name; the real `tinker` client raises, nothing is lost."""

from __future__ import annotations

import pytest

from contract.cells import newest


def refused(method: str, step: str, code: str, words: str, *, since: str = "") -> object:
    """One cell: the step of the script, the code it ends with and a word of the message."""
    return [
        pytest.param(
            *version.values,
            step,
            code,
            words,
            marks=[
                *version.marks,
                pytest.mark.cell(client="tinker", method=method, outcome=f"refused: {code}"),
            ],
            id=f"{version.values[0]}-{step}",
        )
        for version in newest("tinker", since=since)
    ]


REFUSALS = [
    refused("forward_backward: images", "images_in_training", "unsupported", "image"),
    refused("sample: images", "images_in_a_prompt", "unsupported", "image"),
    refused(
        "forward_backward: inputs of a loss missing",
        "a_loss_without_its_inputs",
        "invalid_argument",
        "lacks 'logprobs'",
    ),
    refused(
        "forward_backward: an unknown key of loss_fn_config",
        "a_config_that_the_loss_has_not",
        "invalid_argument",
        "temperature",
    ),
    refused(
        "forward_backward: tensors of unequal length",
        "tensors_of_unequal_length",
        "length_mismatch",
        "weights",
    ),
    refused(
        "forward_backward: a token outside the vocabulary",
        "a_token_outside_the_vocabulary",
        "token_out_of_range",
        "1000000",
    ),
    refused(
        "forward_backward: a row beyond the context",
        "a_row_beyond_the_context",
        "sequence_too_long",
        "2048",
    ),
    refused(
        "forward_backward: NaN weights",
        "a_gradient_that_is_not_finite",
        "invalid_argument",
        "NaN",
        since="0.26.2",
    ),
    refused(
        "optim_step: after a failed forward_backward",
        "a_step_after_a_failed_pass",
        "incomplete_gradient",
        "lacks seq_id",
    ),
    refused(
        "create_lora_training_client: an unknown base model",
        "an_unknown_base_model",
        "unknown_model",
        "no-such-model",
    ),
    refused(
        "create_lora_training_client: a negative rank",
        "an_adapter_of_negative_rank",
        "invalid_argument",
        "rank",
    ),
    refused(
        "create_lora_training_client: dimuon", "dimuon", "unsupported", "dimuon", since="0.30.0"
    ),
    refused("optim_step: dimuon", "dimuon_step", "unsupported", "dimuon", since="0.30.0"),
    refused(
        "forward_backward: stable_reinforce",
        "stable_reinforce",
        "unsupported",
        "stable_reinforce",
        since="0.38.0",
    ),
    refused(
        "sample: record_stability_info",
        "record_stability_info",
        "unsupported",
        "record_stability_info",
        since="0.38.0",
    ),
    refused(
        "create_custom_loss: run by the server",
        "server_side_custom_loss",
        "unsupported",
        "custom",
        since="0.38.0",
    ),
]


@pytest.mark.parametrize(
    ("version", "step", "code", "words"), [each for group in REFUSALS for each in group]
)
def test_a_feature_is_refused_by_name(run_tinker, version, step, code, words):
    found = run_tinker(version, "tinker_refusals.py")
    assert found.refusal(step) == code
    assert words in found.error(step)["message"]


@pytest.mark.parametrize("version", newest("tinker"))
@pytest.mark.cell(client="tinker", method="training after refusals")
def test_training_goes_on_after_every_refusal(run_tinker, version):
    metrics = run_tinker(version, "tinker_refusals.py")["training_goes_on"]
    assert metrics["grad_norm"] > 0
