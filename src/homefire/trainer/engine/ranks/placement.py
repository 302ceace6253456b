"""Which part of a slot's tensors this rank holds.

Masters, moments and gradients of a slot are plain tensors of this rank's own elements, so that an
optimizer step is the same code on one rank and on many. What needs all elements (norms, files) asks
the placement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from homefire.wire.tensors import RawTensor, Tensors

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel


class Placement(Protocol):
    """Every method with "all ranks" in its text is a collective: all ranks call it, in one order."""

    @property
    def is_shared(self) -> bool:
        """Other ranks take part, so no rank may leave a pass out."""
        ...

    def part(self, leaf: Tensor) -> Tensor:
        """This rank's elements of a live parameter; writing to it changes the parameter."""
        ...

    def part_of_whole(self, whole: Tensor, leaf: Tensor) -> Tensor:
        """This rank's elements of a whole tensor that is shaped like `leaf`."""
        ...

    def gradients(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each `.grad`, summed over all ranks. Leaves without one are left out."""
        ...

    def norms(self, of_parts: Sequence[float]) -> list[float]:
        """Norms of whole tensors, from all ranks' norms of their parts."""
        ...

    def total(self, of_parts: int) -> int:
        """A count over all ranks' parts."""
        ...

    def largest(self, of_part: float) -> float:
        """The largest of all ranks' values."""
        ...

    def shape(self, name: str, part: Tensor) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        """The whole tensor from all ranks' parts, at rank 0; None elsewhere. May view `part`."""
        ...

    def kept(self, whole: RawTensor) -> RawTensor:
        """The same, where it may stay until it is written. Of `whole`'s result, before the next one."""
        ...

    def spread(self, name: str, part: Tensor, whole: Tensor | None) -> None:
        """Fills all ranks' `part` from the whole tensor, which rank 0 alone has."""
        ...


class Undivided:
    """Implements `Placement`: one rank has everything."""

    @property
    def is_shared(self) -> bool:
        return False

    def part(self, leaf: Tensor) -> Tensor:
        return leaf.detach()

    def part_of_whole(self, whole: Tensor, leaf: Tensor) -> Tensor:
        return whole

    def gradients(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def norms(self, of_parts: Sequence[float]) -> list[float]:
        return list(of_parts)

    def total(self, of_parts: int) -> int:
        return of_parts

    def largest(self, of_part: float) -> float:
        return of_part

    def shape(self, name: str, part: Tensor) -> tuple[int, ...]:
        return tuple(part.shape)

    def whole(self, name: str, part: Tensor) -> Tensor | None:
        return part

    def kept(self, whole: RawTensor) -> RawTensor:
        return whole

    def spread(self, name: str, part: Tensor, whole: Tensor | None) -> None:
        if whole is None:
            raise ValueError(f"{name!r} comes from nowhere: there is no other rank")
        part.copy_(whole)


class Placements(Protocol):
    """The placement of each kind of slot."""

    def of_module(self, model: LoadedModel) -> Placement: ...

    def of_adapter(self) -> Placement: ...

    def read_base(self, model: LoadedModel, directory: Path) -> bool:
        """Reads this rank's parts of the base model into the module; False where it has to be loaded
        whole."""
        ...


class OneRank:
    """Implements `Placements`."""

    def of_module(self, model: LoadedModel) -> Placement:
        return Undivided()

    def of_adapter(self) -> Placement:
        return Undivided()

    def read_base(self, model: LoadedModel, directory: Path) -> bool:
        return False


@dataclass(frozen=True)
class Incoming:
    """What a slot takes over. Only rank 0 has the tensors; it spreads them."""

    updates: int | None
    """Of the optimizer; None: a fresh one."""
    gradient_names: Sequence[str]
    masters: Tensors | None
    moments: Tensors | None
    """`first:<name>` and `second:<name>`."""
    gradient: Tensors | None
