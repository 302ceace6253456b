"""Which checkpoints of a job stay: its policy, what pruning would do, and why."""

from __future__ import annotations

import math

import msgspec

from homefire.wire.errors import InvalidArgument


class RetentionPolicy(
    msgspec.Struct, frozen=True, rename="camel", kw_only=True, forbid_unknown_fields=True
):
    """A checkpoint stays when any rule here keeps it; without rules everything stays.

    Example: RetentionPolicy(keep_last=5, keep_every=100, keep_best="reward").
    """

    keep_last: int | None = None
    """The newest of each slot, snapshots and states counted apart."""
    keep_every: int | None = None
    """Those of steps that are multiples of it."""
    ttl_seconds: float | None = None
    """Those that are younger."""
    keep_best: str | None = None
    """A score's name: the snapshot with the best evaluation by it. Without it every snapshot that was
    evaluated stays."""
    lower_is_better: bool = False
    """Of `keep_best`."""

    @property
    def is_empty(self) -> bool:
        rules = (self.keep_last, self.keep_every, self.ttl_seconds, self.keep_best)
        return all(rule is None for rule in rules)

    def check(self, *, field: str = "retention") -> RetentionPolicy:
        """The policy itself; InvalidArgument names the rule that makes no sense."""
        for name, count in (("keepLast", self.keep_last), ("keepEvery", self.keep_every)):
            if count is not None and count < 1:
                raise _refused(field, name, count, "is not positive")
        ttl = self.ttl_seconds
        if ttl is not None and not (math.isfinite(ttl) and ttl > 0):
            raise _refused(field, "ttlSeconds", ttl, "is no positive number of seconds")
        if self.keep_best == "":
            raise _refused(field, "keepBest", "", "names no score")
        if self.lower_is_better and self.keep_best is None:
            raise _refused(field, "lowerIsBetter", True, "needs keepBest")
        return self


class PruneRequest(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Body of `POST …/checkpoints:prune`."""

    policy: RetentionPolicy | None = None
    """For this time only; the job's own when absent."""
    dry_run: bool = False


class PrunedRow(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """One checkpoint, and what pruning does with it. Example: keep `step_40`, why `a multiple of 20`."""

    checkpoint: str
    slot: str
    kind: str
    step: int
    size_bytes: int
    keep: bool
    why: list[str]
    """Every rule and dependency that keeps it, or why it goes."""


class PruneReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    policy: RetentionPolicy
    dry_run: bool
    checkpoints: list[PrunedRow]
    """Oldest first."""
    freed_bytes: int
    """Of those that go, or would; files that copies share are freed with the last of them."""


def _refused(field: str, name: str, value: object, reason: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}.{name} {value!r} {reason}",
        hint=f"give {name} a positive value, or leave it out",
        field=f"{field}.{name}",
    )
