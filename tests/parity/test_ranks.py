"""Two ranks against one: the same numbers up to the order of sums, the same files, the same errors.

The two ranks are real processes over gloo, started once for all tests; the one rank is in process.
Tolerances: a logprob 2e-5, a gradient 1e-5 of its tensor's largest element, a weight 2 % of the learning
rate after five steps at which every element moves by about one rate.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from homefire.checkpoints import ensure_tiny, numpy_array, read_safetensors
from homefire.trainer.engine.serve import dispatch
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.trainer.front.plan import execution_plan
from homefire.wire.engine import (
    AdamParams,
    CloseSlot,
    Forward,
    ForwardBackward,
    GradNormMetrics,
    LoadRecovery,
    LoadState,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SaveRecovery,
    SaveSampler,
    SaveState,
    SlotKind,
    WeightsDigest,
)
from homefire.wire.errors import InvalidArgument, NonFiniteGradient, OutOfMemory
from parity.rank_processes import RankedEngine

LENGTHS = (12, 40, 3, 40, 25)
RATE = 1e-3
ADAM = AdamParams(learning_rate=RATE, eps=1e-8, grad_clip_norm=1.0, weight_decay=0.01)


class OneRank:
    """The engine in this process, asked as the others are."""

    ranks = 1

    def __init__(self) -> None:
        self._engine = torch_engine()

    def ask(self, request, arrays=None):
        return dispatch(self._engine, request, arrays or {})


class TwoRanks(RankedEngine):
    ranks = 2

    def __init__(self, folder: Path, **options: str) -> None:
        super().__init__(2, folder, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ensure_tiny(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return opened(OneRank(), folder)


@pytest.fixture(scope="module")
def two(folder):
    engine = opened(TwoRanks(folder), folder)
    yield engine
    assert engine.close() == [0, 0]


def opened(engine, folder: Path):
    engine.ask(
        OpenModel(
            model_dir=str(folder / "tiny"),
            base_model="tiny",
            store_root=str(folder / "store"),
            account="local",
            job=f"job-of-{engine.ranks}",
            threads=1,
            max_context_length=64,
        )
    )
    return engine


@pytest.fixture
def slot(request, one, two):
    """A factory: opens the slot on both engines; it is closed with the test."""
    open_on = []

    def open_slot(kind: SlotKind = SlotKind.FULL) -> None:
        for engine in (one, two):
            lora = LoraSpec(rank=4, seed=1) if kind is SlotKind.LORA else None
            engine.ask(OpenSlot(slot="policy", kind=kind, lora=lora))
            open_on.append(engine)

    yield open_slot
    for engine in open_on:
        engine.ask(CloseSlot("policy"))


def batch_of(seed: int, lengths=LENGTHS):
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return {
        "tokens": generator.integers(0, 320, total).astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": generator.integers(0, 320, (total, 1)),
        "weights": generator.standard_normal((total, 1)).astype(np.float32),
    }


def run(engine, batch, kind=ForwardBackward, ranks=None, recompute=0):
    plan = execution_plan(
        batch["lengths"].tolist(), token_budget=60, threads=1, ranks=ranks or engine.ranks
    )
    if recompute:
        layers = [recompute] * len(plan.micro_batches)
        plan = msgspec.structs.replace(plan, recompute=layers)
    request = kind(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)
    return engine.ask(request, batch)[1]["logprobs"]


def step(engine):
    request = OptimStep(slot="policy", adam=ADAM, norm_metrics=GradNormMetrics.BASIC)
    return engine.ask(request)[0].metrics


def digest(engine) -> str:
    return engine.ask(WeightsDigest("policy"))[0].digest


def recovery_files(engine, directory: Path):
    """What the engine holds: arrays by part and name."""
    engine.ask(SaveRecovery(str(directory)))
    return {
        path.name.split(".")[1]: {n: numpy_array(t) for n, t in read_safetensors(path).items()}
        for path in directory.glob("policy.*.safetensors")
    }


def state_directory(folder: Path, engine, name: str) -> str:
    store = folder / "store" / "local" / f"job-of-{engine.ranks}"
    return str(store / "policy" / "state" / name)


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_two_ranks_compute_what_one_computes(one, two, slot, tmp_path, kind):
    slot(kind)
    first, second = batch_of(0), batch_of(1, (40, 7))
    for batch in (first, second):
        np.testing.assert_allclose(run(two, batch), run(one, batch), atol=2e-5, rtol=0)
    alone = recovery_files(one, tmp_path / "one")
    divided = recovery_files(two, tmp_path / "two")
    assert alone["gradient"].keys() == divided["gradient"].keys()
    for name, gradient in alone["gradient"].items():
        atol = 1e-5 * max(float(np.abs(gradient).max()), 1e-6)
        np.testing.assert_allclose(divided["gradient"][name], gradient, atol=atol, rtol=0)
    for seed in range(2, 7):
        theirs, ours = step(one), step(two)
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert ours["grad_norm_clipped"] <= 1.0
        run(one, batch_of(seed))
        run(two, batch_of(seed))
    alone = recovery_files(one, tmp_path / "one-later")
    divided = recovery_files(two, tmp_path / "two-later")
    for name, master in alone["masters"].items():
        off = np.abs(divided["masters"][name] - master)
        assert np.mean(off) < 0.02 * RATE, name


def test_a_state_moves_between_numbers_of_ranks_bit_for_bit(one, two, slot, folder):
    slot()
    for seed in range(2):
        run(two, batch_of(seed))
        step(two)
    saved = two.ask(SaveState(slot="policy", name="divided"))[0]
    at_two = digest(two)
    load = LoadState(
        slot="policy", directory=state_directory(folder, two, "divided"), with_optimizer=True
    )
    assert one.ask(load)[0].digest == at_two
    again = one.ask(SaveState(slot="policy", name="whole"))[0]
    assert again.digest == saved.digest
    run(two, batch_of(5))
    step(two)
    assert digest(two) != at_two
    back = LoadState(
        slot="policy", directory=state_directory(folder, one, "whole"), with_optimizer=True
    )
    assert two.ask(back)[0].digest == at_two
    assert two.ask(SaveState(slot="policy", name="back"))[0].digest == saved.digest


def test_snapshots_of_equal_weights_are_equal_files(one, two, slot, folder):
    slot()
    run(two, batch_of(0))
    step(two)
    two.ask(SaveState(slot="policy", name="to-sample"))
    load = LoadState(
        slot="policy", directory=state_directory(folder, two, "to-sample"), with_optimizer=False
    )
    one.ask(load)
    request = SaveSampler(slot="policy", identity="base", checkpoint_type="base")
    ours, theirs = two.ask(request)[0], one.ask(request)[0]
    assert (ours.digest, ours.size_bytes) == (theirs.digest, theirs.size_bytes)


def test_the_same_plan_gives_the_same_bits_whatever_is_recomputed(two):
    def train(recompute: int = 0) -> tuple[str, bytes]:
        two.ask(OpenSlot(slot="policy", kind=SlotKind.FULL))
        for seed in range(2):
            logprobs = run(two, batch_of(seed), recompute=recompute)
            step(two)
        found = digest(two), logprobs.tobytes()
        two.ask(CloseSlot("policy"))
        return found

    assert train() == train() == train(recompute=3)


def test_a_recovery_point_holds_what_was_accumulated(two, tmp_path):
    two.ask(OpenSlot(slot="policy", kind=SlotKind.FULL))
    run(two, batch_of(0))
    step(two)
    run(two, batch_of(1))
    two.ask(SaveRecovery(str(tmp_path / "point")))
    step(two)
    expected = digest(two)
    two.ask(CloseSlot("policy"))
    two.ask(LoadRecovery(str(tmp_path / "point")))
    step(two)
    assert digest(two) == expected
    two.ask(CloseSlot("policy"))


def test_a_gradient_that_is_not_finite_is_named_and_not_stepped(two, slot):
    slot()
    before = digest(two)
    batch = batch_of(0)
    batch["weights"][-1] = np.float32(3e38)
    run(two, batch)
    with pytest.raises(NonFiniteGradient, match=r"the gradient of 'model\.|lm_head") as refused:
        step(two)
    assert "nothing was stepped" in refused.value.message
    step(two)
    assert digest(two) == before


def test_a_loss_that_breaks_leaves_no_gradient_on_any_rank(two, slot):
    slot()
    run(two, batch_of(0))
    broken = batch_of(1)
    broken["weights"][0] = np.nan
    with pytest.raises(NonFiniteGradient):
        run(two, broken)
    step(two)
    after = digest(two)
    two.ask(CloseSlot("policy"))
    two.ask(OpenSlot(slot="policy", kind=SlotKind.FULL))
    run(two, batch_of(0))
    step(two)
    assert digest(two) == after


def test_a_forward_leaves_nothing_gathered_for_a_later_step(two, one, slot):
    slot()
    for engine in (one, two):
        run(engine, batch_of(0), Forward)
        run(engine, batch_of(0))
        step(engine)
    later = run(one, batch_of(1), Forward)
    np.testing.assert_allclose(run(two, batch_of(1), Forward), later, atol=1e-4, rtol=0)


def test_the_base_model_is_there_beside_the_trained_one(two, one, slot):
    slot()
    base = run(one, batch_of(1), Forward)
    run(two, batch_of(0))
    step(two)
    two.ask(OpenSlot(slot="base", kind=SlotKind.REFERENCE))
    plan = execution_plan(LENGTHS, token_budget=60, threads=1, ranks=2)
    request = Forward(slot="base", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)
    reference = two.ask(request, batch_of(1))[1]["logprobs"]
    np.testing.assert_allclose(reference, base, atol=2e-5, rtol=0)
    assert np.abs(run(two, batch_of(1), Forward) - base).max() > 1e-3
    two.ask(CloseSlot("base"))


def test_a_plan_for_another_number_of_ranks_is_refused(two, slot):
    slot()
    with pytest.raises(InvalidArgument, match="the ranks, which are 2"):
        run(two, batch_of(0), ranks=3)


@pytest.fixture
def short_of_memory(folder):
    """Rank 1 finds no memory for its first reduction; the test arms more."""
    engine = opened(TwoRanks(folder, failpoints="rank.1.reduce=oom@1"), folder)
    yield engine
    assert engine.close() == [0, 0]


PLACES = ("rank.1.gather=oom@2", "rank.1.gather=oom@9", "rank.1.reduce=oom@3")
PLACES += ("rank.0.gather=oom@1", "rank.0.gather=oom@12", "rank.0.reduce=oom@2")
"""Gathers of a forward come first, then those of its backward, between its reductions."""


def test_a_rank_that_runs_out_of_memory_fails_its_request_alone(two, short_of_memory):
    """The others come to the end of the pass with it, and what follows is exact."""
    for engine in (two, short_of_memory):
        engine.ask(OpenSlot(slot="policy", kind=SlotKind.FULL))
    short_of_memory.armed.write_text("rank.1.gather=oom@2")  # and in the second try, its reduction
    with pytest.raises(OutOfMemory, match=r"rank 1: .*failpoint rank\.1\.reduce"):
        run(short_of_memory, batch_of(0))
    for seed, place in enumerate(PLACES):
        short_of_memory.armed.write_text(place)
        found = run(short_of_memory, batch_of(seed))
        assert not short_of_memory.armed.exists(), f"{place} was not reached"
        np.testing.assert_array_equal(found, run(two, batch_of(seed)))
        if seed % 2:
            assert step(short_of_memory) == step(two)
    assert digest(short_of_memory) == digest(two)
    for engine in (two, short_of_memory):
        engine.ask(CloseSlot("policy"))
