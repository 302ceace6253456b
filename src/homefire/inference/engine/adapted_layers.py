"""Several adapters in one forward pass: each linear layer adds, to each row, its own adapter's update.

The base product runs once for all rows; every adapter then adds its low-rank product to the rows that are
its own. While no row has an adapter the layers carry no hook.

Axes: T rows of one pass, I inputs, O outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from homefire.model.experts import ExpertBlock, LowRank, RoutedTokens, block_of, fused_experts
from homefire.model.loading import LoadedModel
from homefire.model.lora import LoraAdapter
from homefire.model.packed_lora import add_product


@dataclass(frozen=True)
class Segment:
    """The rows of one adapter: a slice where they stand together, else their indices."""

    adapter: LoraAdapter
    rows: slice | Tensor


Segments = Sequence[Segment]


def segments(
    adapters: Sequence[LoraAdapter | None], lengths: Sequence[int] | None = None
) -> list[Segment]:
    """One segment per adapter; entry i has `lengths[i]` rows, or one each."""
    spans: dict[int, list[tuple[int, int]]] = {}
    by_id: dict[int, LoraAdapter] = {}
    start = 0
    for adapter, length in zip(adapters, lengths or [1] * len(adapters), strict=True):
        if adapter is not None:
            by_id[id(adapter)] = adapter
            spans.setdefault(id(adapter), []).append((start, start + length))
        start += length
    return [Segment(adapter, _rows(spans[key], adapter.device)) for key, adapter in by_id.items()]


def _rows(spans: list[tuple[int, int]], device: torch.device) -> slice | Tensor:
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    return torch.cat([torch.arange(start, end, device=device) for start, end in spans])


class AdaptedLayers:
    """Owns the hooks of one module. `route` says whose rows the next passes have."""

    def __init__(self, model: LoadedModel) -> None:
        self._head_path = model.head_path
        """Found once: a search through all modules took 8 % of a step with one sequence."""
        self._linears = {
            path: module
            for path, module in model.module.named_modules()
            if type(module) is nn.Linear and path != self._head_path
        }
        self._layers: dict[str, _AdaptedLayer] = {}
        owners = fused_experts(model.module).items()
        self._experts = {
            path: _AdaptedExperts(path, block)
            for path, owner in owners
            if (block := block_of(owner)) is not None
        }

    def route(self, routed: Segments) -> None:
        """Takes effect for every pass until the next call."""
        paths = {path for segment in routed for path in segment.adapter.layers}
        for path in self._layers.keys() - paths:
            self._layers.pop(path).remove()
        for path in paths & self._linears.keys():
            if path not in self._layers:
                self._layers[path] = _AdaptedLayer(self._linears[path])
            self._layers[path].parts = _parts(path, routed)
        for experts in self._experts.values():
            experts.route(routed)

    def adapt_head(self, logits: Tensor, hidden: Tensor, routed: Segments) -> Tensor:
        """Adds the head's updates to logits [T, V] of hidden [T, H], in place; the head is not routed,
        since its rows are others than the layers'."""
        for part in _parts(self._head_path, routed):
            part.add_to(logits, hidden)
        return logits


@dataclass(frozen=True)
class _Part:
    layer: LowRank
    scaling: float
    rows: slice | Tensor

    def add_to(self, output_TO: Tensor, input_TI: Tensor) -> None:
        low = F.linear(input_TI[self.rows].to(self.layer.a.dtype), self.layer.a)
        if isinstance(self.rows, slice):
            add_product(output_TO[self.rows], low, self.layer.b, self.scaling)
        else:
            update = F.linear(low, self.layer.b).to(output_TO.dtype)
            output_TO.index_add_(0, self.rows, update, alpha=self.scaling)


def _parts(path: str, routed: Segments) -> list[_Part]:
    return [
        _Part(segment.adapter.layers[path], segment.adapter.scaling, segment.rows)
        for segment in routed
        if path in segment.adapter.layers
    ]


class _AdaptedLayer:
    """A forward hook of a linear layer, whose fresh output it may change in place."""

    def __init__(self, linear: nn.Linear) -> None:
        self.parts: list[_Part] = []
        self._handle: RemovableHandle = linear.register_forward_hook(self)

    def remove(self) -> None:
        self._handle.remove()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for part in self.parts:
            part.add_to(output.view(-1, output.shape[-1]), inputs[0].flatten(0, -2))


class _AdaptedExperts:
    """Stands in for a block of routed experts while adapters of it are routed: the rows of each run
    with it, and the others together."""

    def __init__(self, path: str, block: ExpertBlock) -> None:
        self._path = path
        self._block = block
        self._routed: list[Segment] = []

    def route(self, routed: Segments) -> None:
        self._routed = [segment for segment in routed if self._path in segment.adapter.experts]
        attributes = vars(self._block.module)
        if self._routed:
            attributes["forward"] = self._forward
        else:
            attributes.pop("forward", None)

    def _forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        outputs = torch.empty_like(hidden)
        unadapted = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        given = RoutedTokens(hidden, top_k_index, top_k_weights)
        for segment in self._routed:
            rows, adapter = segment.rows, segment.adapter
            low_rank = adapter.experts[self._path]
            outputs[rows] = self._block.forward(given.rows(rows), low_rank, adapter.scaling)
            unadapted[rows] = False
        rows = unadapted.nonzero()[:, 0]
        if len(rows):
            outputs[rows] = self._block.forward(given.rows(rows), None, 1.0)
        return outputs
