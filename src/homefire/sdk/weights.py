"""Which weights made a completion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from homefire.wire.errors import WeightsMismatch

_HEADER = re.compile(r"^(?P<identity>[^;\s]+)\s*(?:;\s*sha=(?P<digest>[0-9A-Za-z]+))?$")


@dataclass(frozen=True)
class WeightsIdentity:
    """Example: WeightsIdentity("step_00010-4b50536f", "9f86d081884c7d65…")."""

    identity: str
    """The sampler snapshot's name; `base` before any snapshot was loaded."""
    digest: str
    """SHA-256 (hex) of the weights in memory; empty when the server did not say it."""

    @classmethod
    def from_header(cls, value: str) -> Self | None:
        """From `x-homefire-weights: <identity>; sha=<digest>`; None for anything else."""
        match = _HEADER.match(value)
        return cls(match["identity"], match["digest"] or "") if match else None


@dataclass(frozen=True)
class WeightsSpan:
    """Tokens `start` to before `end` of a completion, all drawn by one version of the weights."""

    start: int
    end: int
    weights: WeightsIdentity


def check_identity(weights: WeightsIdentity | None, expected: str | None) -> None:
    """WeightsMismatch unless `expected` is None or the identity that made the completion."""
    if expected is None:
        return
    actual = weights.identity if weights is not None else None
    if actual != expected:
        made_by = f"weights {actual!r}" if actual else "a server that does not name its weights"
        raise WeightsMismatch(
            f"the completion was made by {made_by}, not by {expected!r}",
            hint="hot-load the snapshot and wait for it before sampling",
            field="expect_identity",
        )
