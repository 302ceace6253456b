"""Whose weights lie in the one module of an engine, and the graphs that stand on them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from homefire.model.loading import LoadedModel, load_model
from homefire.model.tensors import serving_tensors
from homefire.trainer.engine.torch_graph import TorchGraph


class Resident(Protocol):
    """Weights that are computed with, and trained, in the module itself."""

    def round_into_module(self) -> int: ...


class Residence:
    """Whose weights the module holds: the base model's, or one full slot's."""

    def __init__(self, model: LoadedModel, model_dir: Path, serving_dtype: str) -> None:
        self.model = model
        self._model_dir = model_dir
        self._serving_dtype = serving_dtype
        self._owner: Resident | _Nobody | None = None
        self._base: dict[str, Tensor] | None = None
        self._graphs: WeakSet[TorchGraph] = WeakSet()

    @torch.no_grad()
    def use_base(self) -> None:
        if self._owner is None:
            return
        base = self._base_tensors()
        self._release_graphs()
        for name, parameter in self.model.module.named_parameters():
            parameter.copy_(base[name])
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

    def _base_tensors(self) -> dict[str, Tensor]:
        if self._base is None:
            again = load_model(self._model_dir, serving_dtype=self._serving_dtype)
            self._base = serving_tensors(again)
        return self._base


class _Nobody:
    """Owns a module whose slot was closed."""

    def round_into_module(self) -> int:
        return 0
