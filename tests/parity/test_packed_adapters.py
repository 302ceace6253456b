"""Adapters of different ranks and modules in one packed pass, against each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    Arrays,
    ExecutionPlan,
    Failure,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    PackedForwardBackward,
    Rows,
    SlotKind,
    by_member,
    of_member,
)
from homefire.wire.errors import FailedPrecondition, InvalidArgument
from parity.families import made
from parity.sampler_models import small_qwen3

torch.set_num_threads(1)
VOCABULARY = 97
LENGTHS = {"wide": (9, 14, 5), "narrow": (6, 6), "headless": (17,), "attention": (3, 8, 4, 11)}
SLOTS = {
    "wide": LoraSpec(rank=8, alpha=8.0, seed=1),
    "narrow": LoraSpec(rank=2, alpha=32.0, seed=2),
    "headless": LoraSpec(rank=5, alpha=16.0, seed=3, train_unembed=False),
    "attention": LoraSpec(rank=3, alpha=9.0, seed=4, train_mlp=False),
}
GRADIENT_TOLERANCE = 2e-6
"""Of the largest element of a gradient: the base's products sum in another order. Measured 8e-7."""
LOGPROB_TOLERANCE = 5e-6
"""Nats. Measured 1e-6, a unit in the last place of a logprob of -10."""
TRAINED_TOLERANCE = 1e-4
"""Of the largest weight, after 20 steps with weight decay; the tenants' promise (docs/training.md). Measured 4e-6."""
NUM_STEPS = 20


@pytest.fixture(scope="module", params=["dense", "routed"])
def model_directory(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With and without experts: which of those a token goes to is a matter of the numbers in it."""
    parent = tmp_path_factory.mktemp("models")
    if request.param == "routed":
        return made("qwen3_moe", parent)
    return small_qwen3(parent, tied=True, seed=1)


@pytest.fixture
def open_engine(model_directory, tmp_path):
    """An engine with these adapters, which all have trained for a step: B is not zero."""

    def make(*names: str):
        engine = torch_engine()
        engine.open_model(
            OpenModel(
                model_dir=str(model_directory),
                base_model="tiny",
                store_root=str(tmp_path),
                account="local",
                job="job-1",
                threads=1,
                max_context_length=64,
            )
        )
        for name in names or SLOTS:
            engine.open_slot(OpenSlot(slot=name, kind=SlotKind.LORA, lora=SLOTS[name]))
            alone(engine, name, seed=100)
            step(engine, name)
        return engine

    return make


def request_of(slot: str, loss_fn: str = "cross_entropy") -> ForwardBackward:
    """In two micro-batches where there are several rows."""
    rows = list(range(len(LENGTHS[slot])))
    plan = ExecutionPlan(micro_batches=[rows[1:] or rows, rows[:1]][: len(rows)], threads=1)
    return ForwardBackward(slot=slot, loss_fn=loss_fn, loss_fn_config={}, plan=plan)


def batch_of(slot: str, seed: int) -> Arrays:
    generator = np.random.default_rng([seed, *LENGTHS[slot]])
    total = sum(LENGTHS[slot])
    return {
        "tokens": generator.integers(0, VOCABULARY, total).astype(np.int32),
        "lengths": np.array(LENGTHS[slot], np.int32),
        "target_tokens": generator.integers(0, VOCABULARY, (total, 1)),
    }


def policy_batch_of(slot: str, seed: int, *, logprob: float) -> Arrays:
    """Of importance sampling; the last token of the last row was sampled with `logprob`."""
    batch = batch_of(slot, seed)
    logprobs = np.full(len(batch["tokens"]), -4.0, np.float32)
    logprobs[-1] = logprob
    return {**batch, "logprobs": logprobs, "advantages": np.ones_like(logprobs)}


def alone(engine, slot: str, seed: int) -> np.ndarray:
    return engine.forward_backward(request_of(slot), batch_of(slot, seed))[1]["logprobs"]


def together(engine, seed: int, *slots: str) -> list[np.ndarray]:
    requests = [request_of(slot) for slot in slots or SLOTS]
    replies, arrays = packed(engine, requests, [batch_of(r.slot, seed) for r in requests])
    assert all(isinstance(reply, Rows) for reply in replies)
    return [found["logprobs"] for found in arrays]


def packed(engine, requests: list[ForwardBackward], batches: list[Arrays]):
    message = PackedForwardBackward(members=requests)
    reply, arrays = engine.forward_backward_packed(message, by_member(batches))
    return reply.members, [of_member(number, arrays) for number in range(len(requests))]


def step(engine, slot: str) -> None:
    adam = AdamParams(learning_rate=1e-2, weight_decay=0.1)
    engine.optim_step(OptimStep(slot=slot, adam=adam))


def gradient_of(engine, slot: str) -> dict[str, np.ndarray]:
    return _arrays(engine._slots.get(slot).trainable().files().gradient)


def masters_of(engine, slot: str) -> dict[str, np.ndarray]:
    return _arrays(engine._slots.get(slot).trainable().files().masters)


def _arrays(tensors) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(tensor.data.tobytes(), "<f4").reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def state_of(engine, slot: str) -> dict[str, bytes]:
    files = engine._slots.get(slot).trainable().files()
    parts = {"masters": files.masters, "optimizer": files.optimizer, "gradient": files.gradient}
    return {f"{p}:{n}": t.data.tobytes() for p, ts in parts.items() for n, t in ts.items()}


def off_by(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference, as a part of the largest value."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    return max(np.abs(found[name] - expected[name]).max() for name in expected) / largest


def test_packed_adapters_have_the_logprobs_and_gradients_that_they_have_alone(open_engine):
    ours, theirs = open_engine(), open_engine()
    for slot, logprobs in zip(SLOTS, together(ours, 1), strict=True):
        expected = alone(theirs, slot, 1)
        assert np.abs(logprobs - expected).max() < LOGPROB_TOLERANCE
        assert off_by(gradient_of(ours, slot), gradient_of(theirs, slot)) < GRADIENT_TOLERANCE


def test_a_packed_pass_adds_to_each_gradient_and_counts_its_tokens(open_engine):
    engine = open_engine()
    together(engine, 1)
    first = {name: value.copy() for name, value in gradient_of(engine, "narrow").items()}
    together(engine, 1)
    assert off_by(gradient_of(engine, "narrow"), {n: 2 * v for n, v in first.items()}) == 0
    stepped = engine.optim_step(OptimStep(slot="narrow", adam=AdamParams()))
    counts = [stepped.metrics[key] for key in ("num_backward_calls", "num_loss_tokens")]
    assert counts == [2, 2 * sum(LENGTHS["narrow"])]


def test_the_same_pack_gives_the_same_bits_again(open_engine):
    engines = [open_engine(), open_engine()]
    for engine in engines:
        together(engine, 1)
        together(engine, 2, "attention", "wide")
        for slot in SLOTS:
            step(engine, slot)
    for slot in SLOTS:
        assert state_of(engines[0], slot) == state_of(engines[1], slot)


def test_adapters_that_train_together_end_as_each_would_alone(open_engine):
    ours = open_engine()
    for seed in range(NUM_STEPS):
        together(ours, seed)
        for slot in SLOTS:
            step(ours, slot)
    for slot in SLOTS:
        theirs = open_engine(slot)
        before = {name: value.copy() for name, value in masters_of(theirs, slot).items()}
        for seed in range(NUM_STEPS):
            alone(theirs, slot, seed)
            step(theirs, slot)
        assert off_by(masters_of(ours, slot), masters_of(theirs, slot)) < TRAINED_TOLERANCE
        assert off_by(before, masters_of(theirs, slot)) > 0.1


def test_an_adapter_that_takes_no_part_is_untouched_bit_for_bit(open_engine):
    engine = open_engine()
    alone(engine, "headless", 7)  # a gradient that waits for its step
    before = state_of(engine, "headless")
    for seed in range(3):
        together(engine, seed, "wide", "narrow", "attention")
        for slot in ("wide", "narrow", "attention"):
            step(engine, slot)
    assert state_of(engine, "headless") == before


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_member_whose_loss_breaks_fails_alone_and_moves_no_bit_of_the_others(
    open_engine, position
):
    slots = ["wide", "narrow", "attention"]
    broken = slots[position]
    requests = [request_of(slot, "importance_sampling") for slot in slots]
    engines = [open_engine(), open_engine()]
    for engine, logprob in zip(engines, (-np.inf, -4.0), strict=True):
        alone(engine, broken, 5)
        before = state_of(engine, broken)
        batches = [
            policy_batch_of(slot, 3, logprob=logprob if slot == broken else -4.0) for slot in slots
        ]
        replies, _ = packed(engine, requests, batches)
        failed = [slot for slot, r in zip(slots, replies, strict=True) if isinstance(r, Failure)]
        assert failed == ([broken] if engine is engines[0] else [])
        assert (state_of(engine, broken) == before) == (engine is engines[0])
        if engine is engines[0]:
            row = len(LENGTHS[broken]) - 1
            assert f"row {row} is -inf at token" in replies[position].error.message
    for slot in slots:
        if slot != broken:
            assert state_of(engines[0], slot) == state_of(engines[1], slot)


def test_a_member_whose_weights_are_broken_moves_no_bit_of_the_others(open_engine):
    engines = [open_engine(), open_engine()]
    for master in engines[0]._slots.get("narrow").trainable()._masters.values():
        master.data.fill_(float("nan"))
    for engine in engines:
        requests = [request_of(slot) for slot in SLOTS]
        replies, _ = packed(engine, requests, [batch_of(slot, 1) for slot in SLOTS])
        assert isinstance(replies[1], Failure) == (engine is engines[0])
    for slot in ("wide", "headless", "attention"):
        assert state_of(engines[0], slot) == state_of(engines[1], slot)
    assert gradient_of(engines[0], "narrow") == {}


def test_a_member_with_a_bad_row_is_refused_and_the_others_run(open_engine):
    ours, theirs = open_engine(), open_engine()
    bad = {**batch_of("narrow", 1), "tokens": np.full(12, VOCABULARY, np.int32)}
    requests = [request_of(slot) for slot in ("wide", "narrow", "headless")]
    batches = [batch_of("wide", 1), bad, batch_of("headless", 1)]
    replies, _ = packed(ours, requests, batches)
    assert replies[1].error.code == "token_out_of_range"
    together(theirs, 1, "wide", "headless")
    for slot in SLOTS:
        assert state_of(ours, slot) == state_of(theirs, slot)


def test_a_member_whose_weights_are_all_zero_has_no_gradient(open_engine):
    engine = open_engine()
    requests = [request_of(slot) for slot in ("wide", "narrow")]
    masked = {**batch_of("narrow", 1), "weights": np.zeros((12, 1), np.float32)}
    replies, _ = packed(engine, requests, [batch_of("wide", 1), masked])
    assert replies[1].metrics["loss_tokens:sum"] == 0
    assert gradient_of(engine, "narrow") == {}


def test_what_cannot_share_a_pass_is_refused_before_anything_runs(open_engine):
    engine = open_engine("wide", "narrow")
    engine.open_slot(OpenSlot(slot="base", kind=SlotKind.REFERENCE))
    before = state_of(engine, "wide")
    wide, narrow = request_of("wide"), request_of("narrow")
    batches = [batch_of("wide", 1), batch_of("wide", 1)]
    with pytest.raises(InvalidArgument, match="twice"):
        packed(engine, [wide, wide], batches)
    other = ForwardBackward(slot="base", loss_fn="cross_entropy", loss_fn_config={}, plan=wide.plan)
    with pytest.raises(FailedPrecondition, match="'base' shares no pass"):
        packed(engine, [wide, other], batches)
    with pytest.raises(InvalidArgument, match="no members"):
        packed(engine, [], [])
    assert state_of(engine, "wide") == before
    assert isinstance(packed(engine, [narrow], [batch_of("narrow", 1)])[0][0], Rows)
