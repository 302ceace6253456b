"""Graphs that are kept between a custom loss's two calls: which backward they serve, and when they go."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.engine.engine import SlotEngine
from homefire.trainer.engine.fake import BigramNetwork, base_of
from homefire.trainer.engine.held_graphs import HeldPasses, PassKey, budget_of
from homefire.trainer.engine.network import PackedTargets
from homefire.wire.engine import (
    AdamParams,
    CloseSlot,
    DiscardGradients,
    LoadState,
    OptimStep,
    SaveState,
    SlotKind,
)
from homefire.wire.errors import NonFiniteGradient
from homefire.wire.graphs import GraphFate, GraphUse, HeldGraphs

from .conftest import Trainer, plan_of

TOKEN_BYTES = 4 * 320
"""What the fake engine keeps per token: its logits."""
BATCH_BYTES = 17 * TOKEN_BYTES
LIMIT_S = 60.0
BOTH = pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])


class Machine(BigramNetwork):
    """A fake network whose device says what it has free."""

    free_bytes: int | None = None

    def available_bytes(self):
        return self.free_bytes


class Held(Trainer):
    """A trainer that keeps graphs, and counts how its custom losses went."""

    def __init__(self, root, model_dir, clock, budget_bytes):
        self.clock = clock
        self.network = Machine(base_of(model_dir), "tiny")

        def build():
            return SlotEngine(lambda _: self.network, clock=clock)

        bounds = {"held_graph_bytes": budget_bytes, "held_graph_limit_s": LIMIT_S}
        super().__init__(root, model_dir, build, "job-1", **bounds)

    def keep(self, arrays, slot="policy"):
        plan = msgspec.structs.replace(plan_of(arrays), graph=GraphUse.KEEP)
        return self.forward(arrays, slot, plan)[0]

    def reuse(self, arrays, slot="policy"):
        plan = msgspec.structs.replace(plan_of(arrays), graph=GraphUse.REUSE)
        return self.backward(arrays, slot=slot, plan=plan)[0].graph


@pytest.fixture
def make_held(tmp_path, tiny_directory):
    def make(*, budget_bytes=1 << 30):
        return Held(tmp_path, tiny_directory, ManualClock(), budget_bytes)

    return make


def weighted(arrays):
    """The same rows with a loss's derivative as weights."""
    weights = np.linspace(-1, 1, len(arrays["weights"]), dtype=np.float32)[:, None]
    return {**arrays, "weights": weights}


def changed(arrays, name, value):
    array = arrays[name].copy()
    array[3] = value
    return {**arrays, name: array}


# Matching ------------------------------------------------------------------------------------


@BOTH
def test_a_kept_forward_serves_the_backward_of_its_rows_once(make_held, make_batch, kind):
    held, twice = make_held().open(kind), make_held().open(kind)
    batch = make_batch()
    kept = held.keep(batch)
    assert (kept.graph, kept.held) == (GraphFate.KEPT, HeldGraphs(1, BATCH_BYTES))
    assert held.reuse(weighted(batch)) is GraphFate.REUSED
    assert held.reuse(weighted(batch)) is GraphFate.RECOMPUTED
    for _ in range(2):
        twice.backward(weighted(batch))
    assert held.step() == twice.step()
    assert held.digest() == twice.digest()


@pytest.mark.parametrize(
    "other",
    [
        lambda batch: changed(batch, "tokens", 299),
        lambda batch: changed(batch, "target_tokens", 299),
        lambda batch: {**batch, "lengths": np.array([5, 3, 9], np.int32)},
        lambda batch: {**batch, "lengths": np.array([5, 12], np.int32)},
    ],
    ids=["a token", "a target", "the rows' order of lengths", "the rows' number"],
)
def test_rows_that_differ_in_the_slightest_do_not_match(make_held, make_batch, other):
    held, plain = make_held().open(), make_held().open()
    batch = make_batch(vocab_size=299)
    held.keep(batch)
    assert held.reuse(other(batch)) is GraphFate.RECOMPUTED
    plain.backward(other(batch))
    assert held.step() == plain.step()
    assert held.digest() == plain.digest()
    assert held.keep(batch).graph is GraphFate.KEPT


def test_another_cut_does_not_match(make_held, make_batch):
    held, batch = make_held().open(), make_batch()
    held.keep(batch)
    plan = plan_of(batch)
    for change in ({"micro_batches": [[0, 1, 2]]}, {"threads": 2}):
        other = msgspec.structs.replace(plan, graph=GraphUse.REUSE, **change)
        assert held.backward(weighted(batch), plan=other)[0].graph is GraphFate.RECOMPUTED
    assert held.reuse(weighted(batch)) is GraphFate.REUSED


def test_another_slot_does_not_match(make_held, make_batch):
    held = make_held().open(SlotKind.LORA).open(SlotKind.LORA, "other")
    held.keep(make_batch())
    assert held.reuse(make_batch(), "other") is GraphFate.RECOMPUTED
    assert held.reuse(make_batch()) is GraphFate.REUSED


def test_a_pass_that_does_not_plan_to_leaves_kept_graphs_alone(make_held, make_batch):
    held = make_held().open()
    held.keep(make_batch())
    plain = held.backward(make_batch())[0]
    assert (plain.graph, plain.held.num_passes) == (GraphFate.FREED, 1)


def test_equal_forwards_serve_as_many_backwards(make_held, make_batch):
    held = make_held().open()
    for _ in range(2):
        held.keep(make_batch())
    fates = [held.reuse(weighted(make_batch())) for _ in range(3)]
    assert fates == [GraphFate.REUSED, GraphFate.REUSED, GraphFate.RECOMPUTED]


def test_a_backward_that_fails_leaves_no_trace(make_held, make_batch):
    """The second micro-batch fails after the first one went through."""
    held, plain = make_held().open(), make_held().open()
    bad = weighted(make_batch())
    bad["weights"][-1] = np.inf
    held.keep(make_batch())
    with pytest.raises(NonFiniteGradient, match="row 2"):
        held.reuse(bad)
    assert held.reuse(weighted(make_batch())) is GraphFate.RECOMPUTED
    plain.backward(weighted(make_batch()))
    assert held.step() == plain.step()


def test_a_reference_keeps_nothing(make_held, make_batch):
    held = make_held().open(SlotKind.REFERENCE, "reference")
    kept = held.keep(make_batch(), "reference")
    assert (kept.graph, kept.held) == (GraphFate.FREED, HeldGraphs())


# Freeing -------------------------------------------------------------------------------------


def _step(held):
    held.engine.optim_step(OptimStep(slot="policy", adam=AdamParams()))


def _discard(held):
    held.engine.discard_gradients(DiscardGradients("policy"))


def _load(held):
    directory = held.root / "store/local/job-1/policy/state/before"
    held.engine.load_state(LoadState(slot="policy", directory=str(directory), with_optimizer=True))


def _reopen(held):
    held.engine.close_slot(CloseSlot("policy"))
    held.open(SlotKind.LORA)


@pytest.mark.parametrize("change", [_step, _discard, _load, _reopen])
def test_what_changes_a_slot_frees_its_graphs_and_no_others(make_held, make_batch, change):
    held = make_held().open(SlotKind.LORA).open(SlotKind.LORA, "other")
    held.engine.prepare_save(SaveState(slot="policy", name="before")).write()
    held.keep(make_batch())
    held.keep(make_batch(), "other")
    change(held)
    assert held.engine._held.held.num_passes == 1
    assert held.reuse(weighted(make_batch())) is GraphFate.RECOMPUTED
    assert held.reuse(weighted(make_batch()), "other") is GraphFate.REUSED


def test_saving_frees_nothing(make_held, make_batch):
    held = make_held().open()
    held.keep(make_batch())
    held.save("one", "base")
    held.engine.prepare_save(SaveState(slot="policy", name="state")).write()
    assert held.reuse(weighted(make_batch())) is GraphFate.REUSED


# Bounds --------------------------------------------------------------------------------------


def test_the_oldest_makes_room_and_what_is_left_still_serves(make_held, make_batch):
    held, plain = make_held(budget_bytes=2 * BATCH_BYTES + 1).open(), make_held().open()
    for seed in range(3):
        kept = held.keep(make_batch(seed))
        assert kept.held.size_bytes <= 2 * BATCH_BYTES
    fates = [held.reuse(weighted(make_batch(seed))) for seed in range(3)]
    assert fates == [GraphFate.RECOMPUTED, GraphFate.REUSED, GraphFate.REUSED]
    for seed in range(3):
        plain.backward(weighted(make_batch(seed)))
    assert held.step() == plain.step()
    assert held.digest() == plain.digest()


def test_slots_share_one_budget(make_held, make_batch):
    held = make_held(budget_bytes=BATCH_BYTES).open(SlotKind.LORA).open(SlotKind.LORA, "other")
    held.keep(make_batch())
    assert held.keep(make_batch(), "other").held == HeldGraphs(1, BATCH_BYTES)
    assert held.reuse(weighted(make_batch())) is GraphFate.RECOMPUTED


def test_a_pass_beyond_the_budget_is_not_kept_and_frees_no_other(make_held, make_batch):
    held = make_held(budget_bytes=BATCH_BYTES).open()
    held.keep(make_batch())
    large = make_batch(1, lengths=(5, 9, 3, 1))
    plain = held.forward(large)[1]["logprobs"]
    plan = msgspec.structs.replace(plan_of(large), graph=GraphUse.KEEP)
    rows, arrays = held.forward(large, plan=plan)
    assert (rows.graph, rows.held.num_passes) == (GraphFate.FREED, 1)
    np.testing.assert_array_equal(arrays["logprobs"], plain)


def test_a_budget_of_zero_keeps_nothing(make_held, make_batch):
    held = make_held(budget_bytes=0).open()
    assert held.keep(make_batch()).graph is GraphFate.FREED
    assert held.reuse(weighted(make_batch())) is GraphFate.RECOMPUTED


def test_a_graph_lives_until_its_limit(make_held, make_batch):
    held = make_held().open()
    for seed in range(2):
        held.keep(make_batch(seed))
    held.clock.advance(LIMIT_S - 1)
    assert held.engine.free_expired() == pytest.approx(1)
    assert held.reuse(weighted(make_batch(0))) is GraphFate.REUSED
    held.clock.advance(1)
    assert held.reuse(weighted(make_batch(1))) is GraphFate.RECOMPUTED
    assert held.engine.free_expired() is None


def test_an_engine_that_idles_frees_what_expired(make_held, make_batch):
    held = make_held().open()
    held.keep(make_batch(0))
    held.clock.advance(40)
    held.keep(make_batch(1))
    held.clock.advance(30)
    assert held.engine.free_expired() == pytest.approx(30)
    assert held.engine._held.held.num_passes == 1


def test_other_work_on_a_machine_short_of_memory_frees_the_oldest(make_held, make_batch):
    held = make_held().open(SlotKind.LORA).open(SlotKind.LORA, "other")
    for seed in range(3):
        held.keep(make_batch(seed))
    held.network.free_bytes = 2 * BATCH_BYTES
    assert held.backward(make_batch(9), slot="other")[0].held == HeldGraphs(2, 2 * BATCH_BYTES)
    held.network.free_bytes = BATCH_BYTES - 1
    held.open(SlotKind.LORA, "third")
    assert held.engine._held.held == HeldGraphs()


def test_the_engine_says_which_budget_holds(make_held):
    assert make_held(budget_bytes=123).opened.held_graph_bytes == 123
    held = make_held(budget_bytes=None)
    assert held.opened.held_graph_bytes == held.network.memory_bytes // 8


def test_the_budget_is_what_was_asked_or_a_share_of_the_device():
    assert budget_of(7, 800) == 7
    assert budget_of(0, 800) == 0
    assert budget_of(None, 800) == 100


def test_a_graph_that_went_by_itself_serves_nothing():
    """As when other weights move into the module."""

    class Gone:
        size_bytes = 0
        is_intact = False
        logprobs = np.zeros((17, 1), np.float32)

        def release(self):
            """Nothing is left."""

    class Weights:
        def graph(self, batch):
            return Gone()

    passes = HeldPasses(
        budget_bytes=1, limit_s=1.0, clock=ManualClock(), available_bytes=lambda: None
    )
    key = PassKey("policy", "digest")
    kept = passes.begin(key, 1)
    kept.logprobs(Weights(), PackedTargets(np.zeros(1, np.int64), [1], np.zeros((1, 1), np.int64)))
    assert kept.finish()
    assert passes.take(key) is None
    assert passes.held == HeldGraphs()
