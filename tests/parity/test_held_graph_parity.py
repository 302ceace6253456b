"""A backward through a kept graph against the same with a forward of its own: all bits, all parameters."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from homefire.checkpoints import ensure_tiny
from homefire.trainer.engine.batch import micro_batches, read_batch
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.trainer.engine.torch_weights import _target_logprobs
from homefire.wire.engine import (
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    SlotKind,
)
from homefire.wire.graphs import GraphFate, GraphUse

LENGTHS = (12, 40, 3, 40, 25)
PLAN = ExecutionPlan(micro_batches=[[1, 3], [0, 2, 4]], threads=1)
BOTH = pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def open_engine(tiny_directory, tmp_path):
    def make(kind, **bounds):
        engine = torch_engine()
        engine.open_model(
            OpenModel(
                model_dir=str(tiny_directory),
                base_model="tiny",
                store_root=str(tmp_path),
                account="local",
                job="job-1",
                threads=1,
                max_context_length=64,
                **bounds,
            )
        )
        lora = LoraSpec(rank=4, seed=1) if kind is SlotKind.LORA else None
        engine.open_slot(OpenSlot(slot="policy", kind=kind, lora=lora))
        if kind is SlotKind.LORA:
            randomize(engine)
        return engine

    return make


def randomize(engine):
    """B starts at zero, which would leave the gradient of A at zero too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in engine._slots.get("policy").trainable()._leaves.values():
            leaf.copy_(0.1 * torch.randn(leaf.shape, generator=generator))


def batch_of(seed, num_targets=1):
    generator = np.random.default_rng(seed)
    total = sum(LENGTHS)
    return {
        "tokens": generator.integers(0, 320, total).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": generator.integers(0, 320, (total, num_targets)),
        "weights": np.zeros((total, num_targets), np.float32),
    }


def forward(engine, batch, use=GraphUse.KEEP):
    plan = msgspec.structs.replace(PLAN, graph=use)
    request = Forward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)
    return engine.forward(request, batch)


def backward(engine, batch, use=GraphUse.REUSE):
    """With the derivative of the sum of squares of the logprobs, as a client computes it."""
    logprobs = forward(engine, batch, GraphUse.NONE)[1]["logprobs"]
    plan = msgspec.structs.replace(PLAN, graph=use)
    request = ForwardBackward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)
    return engine.forward_backward(request, {**batch, "weights": -2 * logprobs})


def gradient(engine):
    return engine._slots.get("policy").trainable()._gradient


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.count_nonzero(tensor), name
        assert torch.equal(tensor, right[name]), name


@BOTH
@pytest.mark.parametrize("num_targets", [1, 3])
def test_a_kept_graph_gives_the_gradient_of_two_passes_bit_for_bit(open_engine, kind, num_targets):
    held, recomputed, built_in = (open_engine(kind) for _ in range(3))
    replies = []
    for seed in (0, 1):
        batch = batch_of(seed, num_targets)
        assert forward(held, batch)[0].graph is GraphFate.KEPT
        replies.append([backward(held, batch), backward(recomputed, batch)])
        backward(built_in, batch, GraphUse.NONE)
    for (reused, its_arrays), (again, arrays) in replies:
        assert (reused.graph, again.graph) == (GraphFate.REUSED, GraphFate.RECOMPUTED)
        assert reused.metrics == again.metrics
        np.testing.assert_array_equal(its_arrays["logprobs"], arrays["logprobs"])
    assert_same_bits(gradient(held), gradient(recomputed))
    assert_same_bits(gradient(held), gradient(built_in))


@BOTH
def test_chunks_that_are_kept_together_are_used_in_any_order(open_engine, kind):
    held, recomputed = (open_engine(kind) for _ in range(2))
    chunks = [batch_of(seed) for seed in range(3)]
    for chunk in chunks:
        forward(held, chunk)
    order = [2, 0, 1]
    fates = [backward(held, chunks[index])[0].graph for index in order]
    for index in order:
        backward(recomputed, chunks[index])
    assert fates == [GraphFate.REUSED] * 3
    assert_same_bits(gradient(held), gradient(recomputed))


@BOTH
def test_keeping_a_graph_does_not_change_the_logprobs(open_engine, kind):
    engine = open_engine(kind)
    kept = forward(engine, batch_of(0))[1]["logprobs"]
    plain = forward(engine, batch_of(0), GraphUse.NONE)[1]["logprobs"]
    np.testing.assert_array_equal(kept, plain)


@BOTH
def test_what_is_counted_is_what_autograd_saves_beside_the_weights(open_engine, kind):
    """Against a count of every tensor that a second graph saves, by hand."""
    engine = open_engine(kind)
    trained = engine._slots.get("policy").trainable()
    counted = forward(engine, batch_of(0))[0].held.size_bytes
    weights = [*trained._model.module.parameters(), *trained._leaves.values()]
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    saved = []

    def note(tensor):
        saved.append(tensor.untyped_storage())
        return tensor

    batch = read_batch(batch_of(0), vocab_size=320, max_context_length=64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        graphs = [
            _target_logprobs(trained._model, trained._adapter, cut.batch.packed())
            for cut in micro_batches(batch, PLAN)
        ]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in saved}
    by_hand = sum(size for address, size in sizes.items() if address not in known)
    assert len(graphs) == 2
    assert counted == by_hand > 0


def test_a_reference_that_moves_into_the_module_frees_the_graph(open_engine):
    held, undisturbed = (open_engine(SlotKind.FULL) for _ in range(2))
    for engine in (held, undisturbed):
        engine.open_slot(OpenSlot(slot="reference", kind=SlotKind.REFERENCE))
    forward(held, batch_of(0))
    request = Forward(slot="reference", loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
    moved_in = held.forward(request, batch_of(0))[0]
    assert moved_in.held.size_bytes == 0
    assert backward(held, batch_of(0))[0].graph is GraphFate.RECOMPUTED
    backward(undisturbed, batch_of(0))
    assert_same_bits(gradient(held), gradient(undisturbed))


def test_a_weight_that_changes_under_a_graph_is_an_error_never_a_wrong_gradient(open_engine):
    """The planted mistake: a step that nobody told the engine of."""
    engine = open_engine(SlotKind.FULL)
    forward(engine, batch_of(0))
    with torch.no_grad():
        for leaf in engine._slots.get("policy").trainable()._leaves.values():
            leaf.add_(1e-3)
    plan = msgspec.structs.replace(PLAN, graph=GraphUse.REUSE)
    request = ForwardBackward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)
    with pytest.raises(RuntimeError, match="changed after the forward"):
        engine.forward_backward(request, {**batch_of(0), "weights": np.ones((120, 1), np.float32)})
    assert gradient(engine) == {}
