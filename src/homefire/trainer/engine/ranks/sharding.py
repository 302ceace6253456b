"""FSDP2 over an unmodified model: one group per decoder layer, one for the rest.

Losses are sums over tokens, so gradients are summed over the ranks, never averaged. Compute weights
are float32 values of the serving dtype here as on one rank; a shard is rounded like a whole tensor,
since rounding looks at one element at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from homefire.model.loading import LoadedModel
from homefire.model.partial_loading import read_parts
from homefire.model.recompute import decoder_layers
from homefire.model.tensors import live_tensors
from homefire.trainer.engine.ranks.placement import Placement, Undivided
from homefire.trainer.engine.ranks.rank_group import RankGroup
from homefire.trainer.engine.ranks.spool import spooled
from homefire.wire.errors import Unsupported
from homefire.wire.tensors import RawTensor

Output = TypeVar("Output")


class PassRoot(nn.Module):
    """The outermost FSDP module. A pass reads the head's weight outside of the model's own forward, so
    the pass as a whole is what gathers and releases."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[], Output]) -> Output:
        return run()


def shard_model(model: LoadedModel, group: RankGroup) -> LoadedModel:
    """Shards the parameters in place, or on `meta`. All ranks hold the same model before; none may run it
    alone afterwards."""
    _refuse_scalars(model)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=group.mesh, reshard_after_forward=True)
    root = PassRoot(model.module)
    # After a forward whose backward never comes, nothing may stay gathered: it would be stale.
    fully_shard(root, mesh=group.mesh, reshard_after_forward=True)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    return replace(model, root=root)


def materialise(root: nn.Module, device: torch.device) -> None:
    """Gives sharded parameters on `meta` this rank's memory, uninitialised; what is real moves there."""

    def placed(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_like(tensor, device=device)
        return tensor.to(device)

    root._apply(placed)


@torch.no_grad()
def read_own_parts(model: LoadedModel, group: RankGroup, directory: Path) -> None:
    """The base model's weights, from the files that `model_without_weights` found to fit."""

    def rows_of(leaf: Tensor) -> slice:
        return own_rows(group, tuple(leaf.shape), local_part(leaf))

    for leaf, part in read_parts(model, directory, rows_of):
        local_part(leaf).copy_(part)


def own_rows(group: RankGroup, shape: tuple[int, ...], part: Tensor) -> slice:
    """Which rows of a whole tensor this rank's part is."""
    start = group.rank * rows_per_rank(group, shape)
    return slice(start, start + len(part))


def rows_per_rank(group: RankGroup, shape: tuple[int, ...]) -> int:
    """The last ranks have fewer, or none: `torch.chunk`'s cut, which FSDP uses."""
    return -(-shape[0] // group.num_ranks)


def _refuse_scalars(model: LoadedModel) -> None:
    for name, parameter in model.module.named_parameters():
        if parameter.dim() == 0:
            raise Unsupported(
                f"{name!r} of {model.architecture!r} models is a scalar, which cannot be divided"
                " among ranks",
                hint="train with one rank",
            )


class Sharded:
    """Implements `Placement`: rows of each parameter's first axis, in the order of the ranks."""

    def __init__(self, group: RankGroup, leaves: Mapping[str, Tensor], spool: Path) -> None:
        self._group = group
        self._spool = spool
        self._shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        self._copied = {n for n, leaf in leaves.items() if not isinstance(leaf.detach(), DTensor)}
        """Buffers: every rank has them whole."""

    @property
    def is_shared(self) -> bool:
        return True

    def part(self, leaf: Tensor) -> Tensor:
        return local_part(leaf)

    def part_of_whole(self, whole: Tensor, leaf: Tensor) -> Tensor:
        return whole[own_rows(self._group, tuple(whole.shape), local_part(leaf))]

    def gradients(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: local_part(leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None
        }

    def norms(self, of_parts: Sequence[float]) -> list[float]:
        everyone = self._group.gather_values(of_parts)
        return [math.hypot(*column) for column in zip(*everyone, strict=True)]

    def total(self, of_parts: int) -> int:
        return sum(int(count) for (count,) in self._group.gather_values([float(of_parts)]))

    def largest(self, of_part: float) -> float:
        return max(value for (value,) in self._group.gather_values([of_part]))

    def shape(self, name: str, part: Tensor) -> tuple[int, ...]:
        return self._shapes[name]

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        shape = self._shapes[name]
        if name in self._copied:
            return part if self._group.is_first else None
        everyone = self._group.gather_at_first(self._padded(part, shape))
        return None if everyone is None else torch.cat(everyone)[: shape[0]]

    def kept(self, whole: RawTensor) -> RawTensor:
        return spooled(whole, self._spool)

    def spread(self, name: str, part: Tensor, whole: Tensor | None) -> None:
        shape = self._shapes[name]
        rows = rows_per_rank(self._group, shape)
        into = part.new_empty((rows, *shape[1:]))
        pieces = None
        if whole is not None:
            live = whole.to(part.device)
            pieces = [
                self._padded(live[rank * rows : (rank + 1) * rows], shape)
                for rank in range(self._group.num_ranks)
            ]
        self._group.scatter_from_first(pieces, into)
        part.copy_(into[: len(part)])

    def _padded(self, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Collectives want one shape on every rank."""
        padded = part.new_zeros((rows_per_rank(self._group, shape), *shape[1:]))
        padded[: len(part)] = part
        return padded


class Copied(Undivided):
    """Implements `Placement`: every rank has all of an adapter, and of its gradient the part that came
    from its own rows."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    @property
    def is_shared(self) -> bool:
        return True

    def gradients(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One sum for all. A leaf that only other ranks' rows reached counts as zero here."""
        mine = {
            name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            for name, leaf in leaves.items()
        }
        flat = torch.cat([gradient.reshape(-1) for gradient in mine.values()])
        self._group.sum_in_place(flat)
        pieces = flat.split([gradient.numel() for gradient in mine.values()])
        return {
            name: piece.view(gradient.shape)
            for (name, gradient), piece in zip(mine.items(), pieces, strict=True)
        }

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        return part if self._group.is_first else None

    def spread(self, name: str, part: Tensor, whole: Tensor | None) -> None:
        num_ranks = self._group.num_ranks
        pieces = None if whole is None else [whole.to(part.device).contiguous()] * num_ranks
        into = torch.empty_like(part, memory_format=torch.contiguous_format)
        self._group.scatter_from_first(pieces, into)
        part.copy_(into)


class ManyRanks:
    """Implements `Placements`."""

    def __init__(self, group: RankGroup, *, spool: Path, reads_parts: bool = False) -> None:
        self._group = group
        self._spool = spool
        self._reads_parts = reads_parts

    def read_base(self, model: LoadedModel, directory: Path) -> bool:
        if self._reads_parts:
            read_own_parts(model, self._group, directory)
        return self._reads_parts

    def of_module(self, model: LoadedModel) -> Placement:
        return Sharded(self._group, dict(live_tensors(model)), self._spool)

    def of_adapter(self) -> Placement:
        return Copied(self._group)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's elements of a sharded tensor: its live memory, outside of autograd."""
    live = tensor.detach()
    return live.to_local() if isinstance(live, DTensor) else live
