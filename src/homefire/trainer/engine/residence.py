"""Whose weights lie in the one module of an engine, and the graphs that stand on them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from homefire.model.loading import LoadedModel, load_model
from homefire.model.tensors import live_tensors, served_dtype, serving_tensors
from homefire.trainer.engine.ranks.placement import OneRank, Placements
from homefire.trainer.engine.torch_graph import TorchGraph


class Resident(Protocol):
    """Weights that are computed with, and trained, in the module itself."""

    def round_into_module(self) -> int: ...


class Residence:
    """Whose weights the module holds: the base model's, or one full slot's."""

    def __init__(
        self,
        model: LoadedModel,
        model_dir: Path,
        serving_dtype: str,
        placements: Placements | None = None,
    ) -> None:
        self.model = model
        self.placements = placements or OneRank()
        self.layout = self.placements.of_module(model)
        """Where the module's own parameters are."""
        self._model_dir = model_dir
        self._serving_dtype = serving_dtype
        self._owner: Resident | _Nobody | None = None
        self._base: dict[str, Tensor] | None = None
        self._graphs: WeakSet[TorchGraph] = WeakSet()

    @torch.no_grad()
    def use_base(self) -> None:
        if self._owner is None:
            return
        self._release_graphs()
        if not self.placements.read_base(self.model, self._model_dir):
            base = self._base_parts()
            for name, parameter in self.model.module.named_parameters():
                self.layout.part(parameter).copy_(base[name])
        self._owner = None

    def use(self, weights: Resident) -> None:
        """Rounding masters again gives the same bits as at the last step."""
        if self._owner is not weights:
            self._release_graphs()
            weights.round_into_module()
            self._owner = weights

    def forget(self, weights: object) -> None:
        """The slot is closed: what it left in the module is nobody's."""
        if self._owner is weights:
            self._owner = _Nobody()

    def watch(self, graph: TorchGraph) -> None:
        """It is released when other weights move in: it stands on those that lie here now."""
        self._graphs.add(graph)

    def _release_graphs(self) -> None:
        for graph in self._graphs:
            graph.release()
        self._graphs.clear()

    @torch.no_grad()
    def serving(self) -> dict[str, Tensor]:
        """What a snapshot of the module holds now, as fresh CPU tensors; empty but at rank 0."""
        if not self.layout.is_shared:
            return serving_tensors(self.model)
        found: dict[str, Tensor] = {}
        for name, tensor in live_tensors(self.model):
            dtype = served_dtype(tensor, self.model.serving_dtype)
            part = self.layout.part(tensor).to(dtype, copy=True)
            whole = self.layout.whole(name, part)
            if whole is not None:
                found[name] = whole.cpu().contiguous()
        return found

    def _base_parts(self) -> dict[str, Tensor]:
        if self._base is None:
            again = serving_tensors(load_model(self._model_dir, serving_dtype=self._serving_dtype))
            self._base = {
                name: self.layout.part_of_whole(again[name], parameter).clone()
                for name, parameter in self.model.module.named_parameters()
            }
        return self._base


class _Nobody:
    """Owns a module whose slot was closed."""

    def round_into_module(self) -> int:
        return 0
