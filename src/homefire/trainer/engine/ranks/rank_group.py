"""The collectives among the ranks of one engine.

Ranks find each other through a file (`torch.distributed.FileStore`) in the job's folder: no port is
chosen by us and none is known beforehand. On one machine gloo's own connections stay on loopback.
Sums run in the order of the ranks, so the same ranks give the same bits.
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class RankPlace:
    """Which rank this process is, and where it meets the others."""

    rank: int
    num_ranks: int
    rendezvous: Path
    """A file that does not exist yet, of this start of the engine alone."""
    timeout_s: float = 600.0
    """After so long in one collective, a rank counts as lost."""


class RankGroup:
    """One per process; owns the default process group."""

    def __init__(self, place: RankPlace, device: torch.device) -> None:
        self.rank = place.rank
        self.num_ranks = place.num_ranks
        self.device = device
        self.mesh: DeviceMesh = init_device_mesh(device.type, (place.num_ranks,))

    @classmethod
    def join(cls, place: RankPlace, device: torch.device) -> RankGroup:
        """Blocks until every rank is here; raises when one is missing after the timeout."""
        _stay_on_loopback()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=FileStore(str(place.rendezvous), place.num_ranks),
            rank=place.rank,
            world_size=place.num_ranks,
            timeout=datetime.timedelta(seconds=place.timeout_s),
        )
        return cls(place, device)

    def leave(self) -> None:
        dist.destroy_process_group()

    def gather_values(self, values: Sequence[float]) -> list[list[float]]:
        """[rank][value], in float64, on every rank."""
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(everyone, mine)
        return [one.tolist() for one in everyone]

    def sum_in_place(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)

    def gather_at_first(self, tensor: Tensor) -> list[Tensor] | None:
        """Everyone's tensor, of one shape, at rank 0; None elsewhere."""
        slots = [torch.empty_like(tensor) for _ in range(self.num_ranks)] if self.is_first else None
        dist.gather(tensor, slots, dst=0)
        return slots

    def scatter_from_first(self, parts: list[Tensor] | None, into: Tensor) -> None:
        """Rank 0's `parts[rank]`, of one shape, arrives in `into`."""
        dist.scatter(into, parts, src=0)

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def _stay_on_loopback() -> None:
    """gloo binds the interface of the host's name otherwise, where others could reach it."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
