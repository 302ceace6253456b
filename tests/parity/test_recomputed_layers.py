"""Layers that compute their activations again in backward: the same bits, and fewer of them kept."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from homefire.model import recompute
from homefire.model.loading import LoadedModel, load_model
from homefire.model.lora import LoraAdapter, applied, new_adapter
from homefire.model.packed import packed_hidden, packed_logprobs
from homefire.model.packed_lora import Segment, applied_by_segment
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    Digest,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
    WeightsDigest,
)
from homefire.wire.graphs import GraphFate, GraphUse
from parity.families import FAMILIES, HYBRID, PACKED, made
from parity.family_measures import LENGTHS, texts

torch.set_num_threads(1)
LAYERS = 4
CORE = ("mistral", "gemma4", "gpt_oss", "deepseek_v3", "falcon_h1")
"""A window; keys and values that layers share; sinks and experts; a dense layer before experts; state."""
SERVED = [name for name in (*PACKED, *HYBRID) if name != "minimax"]
CHOSEN = [pytest.param(name, marks=[] if name in CORE else [pytest.mark.long]) for name in SERVED]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: made(name, tmp_path_factory.getbasetemp())


def gradients(model: LoadedModel, num_layers: int) -> dict[str, Tensor]:
    """Of every parameter, and the logprobs beside them."""
    rows = texts()
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    hidden = packed_hidden(model, tokens, lengths, recompute=num_layers)
    logprobs = packed_logprobs(model, hidden, tokens.roll(-1))
    weights = torch.randn(len(tokens), generator=torch.Generator().manual_seed(4))
    model.module.zero_grad()
    (logprobs * weights).sum().backward()
    found = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
    return {**found, "logprobs": logprobs.detach()}


@pytest.mark.parametrize("family", CHOSEN)
def test_gradients_are_the_same_bits(directory, family) -> None:
    model = load_model(directory(family))
    expected = gradients(model, 0)
    for num_layers in (2, LAYERS):
        found = gradients(model, num_layers)
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), name
    assert not any("forward" in vars(layer) for layer in recompute.decoder_layers(model))


def kept_bytes(compute: Callable[[], Tensor], model: LoadedModel) -> int:
    """Of storages that autograd keeps for the backward, each once, weights not."""
    sizes: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # held, so that no storage is given away and counted as another
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
    assert output.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "falcon_h1"])
def test_every_recomputed_layer_keeps_no_more_than_its_input(directory, family) -> None:
    model = load_model(directory(family))
    rows = texts()
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    sizes = [
        kept_bytes(lambda n=n: packed_hidden(model, tokens, lengths, recompute=n), model)
        for n in range(LAYERS + 1)
    ]
    assert sizes == sorted(sizes, reverse=True)
    saved = [more - less for more, less in pairwise(sizes)]
    assert min(saved) > 4 * 64 * 4 * sum(LENGTHS)  # at least four hidden states of each token
    assert sizes[LAYERS] < 0.35 * sizes[0]


# Adapters, which are gone from the layers when the backward runs --------------------------------


def trained(model: LoadedModel, seed: int, rank: int) -> LoraAdapter:
    adapter = new_adapter(model, rank=rank, alpha=8.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.low_ranks().values():
        layer.b.normal_(std=0.2, generator=generator)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(True)
    return adapter


def adapter_gradients(
    model: LoadedModel, num_layers: int, *, forgets: bool = False
) -> list[Tensor]:
    """Of two adapters in a packed pass, and of the first one alone. `forgets`: the planted mistake."""
    model.module.requires_grad_(False)
    first, second = trained(model, 1, 2), trained(model, 2, 3)
    rows = texts()
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    cut = sum(lengths[:2])
    segments = [Segment(first, cut), Segment(second, len(tokens) - cut)]
    found: list[Tensor] = []
    for context, adapters in (
        (lambda: applied_by_segment(model, segments), (first, second)),
        (lambda: applied(model, first), (first,)),
    ):
        again = [] if forgets else [context]
        with context():
            hidden = packed_hidden(model, tokens, lengths, recompute=num_layers, reentries=again)
        logprobs = packed_logprobs(model, hidden, tokens.roll(-1))
        parameters = [
            p
            for adapter in adapters
            for name, p in adapter.parameters().items()
            if "lm_head" not in name
        ]
        found += torch.autograd.grad(logprobs.sum(), parameters)
    return found


@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_gradients_of_adapters_are_the_same_bits(directory, family) -> None:
    model = load_model(directory(family))
    expected, found = (adapter_gradients(model, n) for n in (0, LAYERS))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_layer_that_is_run_again_without_its_adapter_shows(directory) -> None:
    model = load_model(directory("mistral"))
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        adapter_gradients(model, LAYERS, forgets=True)


# Through the engine ---------------------------------------------------------------------------


def digest_after(path: Path, store: Path, kind: SlotKind, recompute: list[int], graph: bool) -> Any:
    engine = torch_engine()
    engine.open_model(
        OpenModel(
            model_dir=str(path),
            base_model="tiny",
            store_root=str(store),
            account="local",
            job="job-1",
            threads=1,
            max_context_length=64,
            held_graph_bytes=1 << 30,
        )
    )
    lora = LoraSpec(rank=3, seed=1) if kind is SlotKind.LORA else None
    engine.open_slot(OpenSlot(slot="policy", kind=kind, lora=lora))
    generator = np.random.default_rng(5)
    total = sum(LENGTHS)
    arrays = {
        "tokens": generator.integers(0, 97, total).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": generator.integers(0, 97, (total, 1)),
    }
    cut = [[0, 1, 2], [3, 4, 5]]
    asked = {"slot": "policy", "loss_fn": "cross_entropy", "loss_fn_config": {}}

    def plan(use: GraphUse) -> ExecutionPlan:
        return ExecutionPlan(micro_batches=cut, threads=1, recompute=recompute, graph=use)

    sizes: list[int] = []
    for _ in range(2):
        if graph:
            rows, _ = engine.forward(Forward(**asked, plan=plan(GraphUse.KEEP)), arrays)
            assert rows.graph is GraphFate.KEPT
            assert rows.held is not None
            sizes.append(rows.held.size_bytes)
        use = GraphUse.REUSE if graph else GraphUse.NONE
        rows, _ = engine.forward_backward(ForwardBackward(**asked, plan=plan(use)), arrays)
        assert rows.graph is (GraphFate.REUSED if graph else GraphFate.FREED)
        engine.optim_step(OptimStep(slot="policy", adam=AdamParams()))
    reply: Digest = engine.weights_digest(WeightsDigest("policy"))
    return reply.digest, sizes


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
@pytest.mark.parametrize("graph", [False, True], ids=["at once", "kept graph"])
def test_training_ends_with_the_same_bits_whatever_is_recomputed(
    directory, tmp_path, kind, graph
) -> None:
    runs = [
        digest_after(directory("mistral"), tmp_path, kind, recompute, graph)
        for recompute in ([], [LAYERS, 1], [LAYERS, LAYERS])
    ]
    assert len({digest for digest, _ in runs}) == 1
    if graph:
        (whole, *_), (part, *_), (least, *_) = (sizes for _, sizes in runs)
        assert whole > part > least > 0


def test_every_family_is_tried() -> None:
    assert set(CORE) <= set(SERVED) <= set(FAMILIES)
