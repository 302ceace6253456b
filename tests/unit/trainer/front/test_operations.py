from __future__ import annotations

import hashlib

import msgspec
import pytest

from homefire.trainer.front.operations import (
    Refused,
    RunPass,
    SaveSnapshot,
    StepOptimizer,
    decode,
    digest_of,
    encode,
    pack,
    step_optimizer,
)
from homefire.trainer.front.save_requests import save_snapshot
from homefire.wire.engine import AdamParams, GradNormalization
from homefire.wire.optim_step import OptimStepRequest
from homefire.wire.tinker import Pass, Row, SaveWeightsForSampler, TensorValue


def optim_step(body: str) -> StepOptimizer | Refused:
    request = '{"model_id":"m","seq_id":1,' + body + "}"
    return step_optimizer(msgspec.json.decode(request, type=OptimStepRequest))


def test_missing_adam_fields_have_the_protocols_defaults() -> None:
    step = optim_step('"adam_params":{"learning_rate":0.5,"beta1":null}')
    assert step == StepOptimizer(
        AdamParams(learning_rate=0.5, beta1=0.9, beta2=0.95, eps=1e-12), GradNormalization.NONE
    )


@pytest.mark.parametrize(
    "body",
    [
        '"adam_params":{},"grad_accumulation_normalization":"num_sequences"',
        '"adam_params":{"grad_accumulation_normalization":"num_sequences"}',
        '"optimizer_params":{"type":"adamw","grad_accumulation_normalization":"num_sequences"}',
    ],
)
def test_the_normalization_is_found_where_any_client_puts_it(body: str) -> None:
    assert optim_step(body) == StepOptimizer(AdamParams(), GradNormalization.NUM_SEQUENCES)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("null", "off"),
        ("false", "off"),
        ("true", "basic"),
        ('"off"', "off"),
        ('"basic"', "basic"),
        ('"detailed"', "detailed"),
    ],
)
def test_norm_metrics_are_asked_for_by_name_or_flag(asked: str, expected: str) -> None:
    step = optim_step(f'"adam_params":{{"emit_grad_norm_metrics":{asked}}}')
    assert isinstance(step, StepOptimizer)
    assert step.norm_metrics == expected


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('"optimizer_params":{"type":"dimuon"}', "dimuon"),
        ('"grad_accumulation_normalization":"mean"', "mean"),
        ('"adam_params":{"emit_grad_norm_metrics":"some"}', "some"),
    ],
)
def test_an_unknown_optimizer_or_normalization_keeps_its_place_and_fails_there(
    body: str, named: str
) -> None:
    refused = optim_step(body)
    assert isinstance(refused, Refused)
    assert named in refused.error.message


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('"checkpoint_type":"delta"', "delta"),
        ('"user_metadata":{"homefire.checkpoint_type":"delta","a":1}', "delta"),
        ('"checkpoint_type":"base","user_metadata":{"homefire.checkpoint_type":"delta"}', "base"),
        ('"kind":"snapshot"', "base"),
        ('"checkpoint_type":"merged_base"', "merged_base"),
        ('"checkpoint_type":"merged_base","export_precision":"source"', "merged_base"),
        ('"checkpoint_type":"merged_base","export_precision":"bf16"', "merged_base"),
    ],
)
def test_the_checkpoint_type_is_the_requests_then_the_metadatas_then_base(
    body: str, expected: str
) -> None:
    request = '{"model_id":"m","seq_id":1,"path":"s",' + body + "}"
    decoded = msgspec.json.decode(request, type=SaveWeightsForSampler)
    operation = save_snapshot(decoded, sampler="", session_id="s", run="policy")
    assert isinstance(operation, SaveSnapshot)
    assert operation.checkpoint_type == expected


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ('"checkpoint_type":"merged_base","export_precision":"nvfp4"', "unsupported", "nvfp4"),
        ('"export_precision":"bf16"', "invalid_argument", "goes with checkpoint_type"),
        ('"checkpoint_type":"half"', "invalid_argument", "half"),
    ],
)
def test_a_type_or_precision_that_is_not_written_is_refused_by_name(
    body: str, code: str, named: str
) -> None:
    request = '{"model_id":"m","seq_id":1,"path":"s",' + body + "}"
    decoded = msgspec.json.decode(request, type=SaveWeightsForSampler)
    refused = save_snapshot(decoded, sampler="", session_id="s", run="policy")
    assert isinstance(refused, Refused)
    assert refused.error.code == code
    assert named in refused.error.message


def test_the_digest_does_not_depend_on_the_order_in_which_fields_came() -> None:
    one, two = TensorValue("int64", (0,), b""), TensorValue("float32", (0,), b"")
    first = RunPass(Pass(rows=[Row(b"", {"a": one, "b": two})], loss_fn="x"))
    second = RunPass(Pass(rows=[Row(b"", {"b": two, "a": one})], loss_fn="x"))
    assert digest_of(encode(first)) == digest_of(encode(second))
    assert decode(encode(first)) == first


def a_pass(tokens: bytes) -> RunPass:
    return RunPass(Pass(rows=[Row(tokens, {})], loss_fn="cross_entropy"))


def test_what_repeats_is_kept_compressed_and_decodes_to_the_same() -> None:
    encoded = encode(a_pass(bytes(range(64)) * 1000))
    packed = pack(encoded)
    assert len(packed) < len(encoded) // 50
    assert decode(packed) == decode(encoded) == a_pass(bytes(range(64)) * 1000)


def test_what_would_not_shrink_is_kept_as_it_is() -> None:
    noise = hashlib.shake_256(b"noise").digest(20_000)
    encoded = encode(a_pass(noise))
    assert pack(encoded) == encoded
    assert pack(encode(StepOptimizer(AdamParams(), GradNormalization.NONE))).startswith(b"\x84")
