"""Who holds which part of the machine. Pure: computed from the rows, stored nowhere else.

Two engines that both take every core of a machine run slower than one after the other, so engines
get a share of the threads each, and what does not fit waits with a reason instead of starting.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from homefire.control.db.rows import DeploymentRow, JobRow, Need, ReplicaRow
from homefire.wire.resources import JobState

_MEMORY_RESERVE = 0.15
"""Part of the machine's memory that is never handed out."""
_HOLDING = frozenset({JobState.CREATING, JobState.RUNNING, JobState.CANCELLING, JobState.DELETING})


@dataclass(frozen=True)
class Capacity:
    """What may be handed out in all."""

    threads: int
    memory_bytes: int

    @classmethod
    def of_machine(cls, *, threads: int = 0, memory_bytes: int = 0) -> Capacity:
        """Zeros mean: twice the cores, and the memory less a reserve."""
        return cls(threads or 2 * num_cores(), memory_bytes or _machine_memory_bytes())


@dataclass(frozen=True)
class Ledger:
    """The capacity, and what the admitted processes hold of it."""

    capacity: Capacity
    threads_used: int
    memory_used_bytes: int

    @classmethod
    def of(
        cls,
        capacity: Capacity,
        jobs: Iterable[JobRow],
        deployments: Iterable[DeploymentRow],
        replicas: Iterable[ReplicaRow],
    ) -> Ledger:
        needs = [job.config.need for job in jobs if holds_capacity(job)]
        need_of = {row.id: row.config.need for row in deployments}
        needs += [need_of[replica.deployment] for replica in replicas]
        threads = sum(need.threads for need in needs)
        return cls(capacity, threads, sum(need.memory_bytes for need in needs))

    def shortfall(self, need: Need) -> str | None:
        """Why `need` does not fit now; None when it does."""
        threads = self.capacity.threads - self.threads_used
        if need.threads > threads:
            total = self.capacity.threads
            return (
                f"waiting for {need.threads} engine threads: {max(0, threads)} of {total} are free"
            )
        memory = self.capacity.memory_bytes - self.memory_used_bytes
        if need.memory_bytes > memory:
            return (
                f"waiting for {_gib(need.memory_bytes)} of memory: {_gib(max(0, memory))} of"
                f" {_gib(self.capacity.memory_bytes)} are free"
            )
        return None

    def with_(self, need: Need) -> Ledger:
        return Ledger(
            self.capacity,
            self.threads_used + need.threads,
            self.memory_used_bytes + need.memory_bytes,
        )


def holds_capacity(job: JobRow) -> bool:
    """An admitted job holds its part until its process has gone, whatever became of the job."""
    return job.state in _HOLDING or job.supervision.process is not None


def never_fits(capacity: Capacity, need: Need) -> str | None:
    """What the machine lacks for `need` even when nothing else runs."""
    return Ledger(capacity, 0, 0).shortfall(need)


def num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_per_engine() -> int:
    """Half the cores, so that a trainer and a replica run side by side."""
    return max(1, num_cores() // 2)


def _machine_memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(total * (1 - _MEMORY_RESERVE))


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB"
