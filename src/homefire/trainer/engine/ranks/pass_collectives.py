"""The collectives of a pass, counted, so that a rank that drops out of one can catch up.

All ranks gather and reduce in one order. A rank whose pass breaks in the middle owes the others the
rest of it: it computes a token of its own again from the start, leaves out what it has already taken
part in, and takes part in what comes then. Its numbers are worthless, which it says when it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup, Work
from torch.distributed.fsdp import FSDPModule

from homefire.foundation.failpoints import failpoint

# Renamed in torch 2.13, where the old names warn at every call.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class PassCollectives:
    """Of one rank. Not for concurrent passes."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._root: FSDPModule | None = None
        self._taken = 0
        """Collectives of this pass that this rank has taken part in."""
        self._left_out = 0
        """How many of the next ones are left out."""
        self.has_begun = False
        """Before that, collectives belong to the opening of the model."""

    def watch(self, root: nn.Module) -> None:
        """`root` is the outermost module that `fully_shard` was applied to."""
        self._root = cast(FSDPModule, root)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(cast(Any, _Gather(self)))
                module.set_custom_reduce_scatter(cast(Any, _Reduce(self)))

    def begin(self) -> None:
        self.has_begun = True
        self._taken = self._left_out = 0

    def begin_again(self) -> None:
        """After a pass that broke: the next one leaves out what this one has done."""
        assert self._root is not None
        self._root.reset_iter_state()
        self._taken, self._left_out = 0, self._taken

    def takes_part(self) -> bool:
        """Asked once before each collective."""
        self._taken += 1
        return self._taken > self._left_out


class _Counted:
    """What `set_custom_all_gather` and `set_custom_reduce_scatter` ask of a communication."""

    name: str

    def __init__(self, collectives: PassCollectives) -> None:
        self._collectives = collectives

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self._collectives.has_begun:
            failpoint(f"rank.{self._collectives.rank}.{self.name}")
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Counted):
    name = "gather"

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> Work | None:
        if self._collectives.takes_part():
            return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        output_tensor.zero_()
        return None


class _Reduce(_Counted):
    name = "reduce"

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Work | None:
        if self._collectives.takes_part():
            return _reduce_scatter(
                output_tensor, input_tensor, op=op, group=group, async_op=async_op
            )
        output_tensor.zero_()
        return None
