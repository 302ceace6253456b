"""Which adapters are resident, who holds them, and which one goes when room is needed."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from homefire.inference.engine.protocol import ServedWeights
from homefire.wire.errors import InvalidArgument


@dataclass(frozen=True)
class AdapterLimits:
    max_adapters: int = 16
    max_bytes: int = 2 << 30
    """Of all resident adapters together."""

    def __post_init__(self) -> None:
        if self.max_adapters < 1 or self.max_bytes < 1:
            raise InvalidArgument("max_adapters and max_adapter_bytes must be at least 1")


@dataclass
class _Resident:
    size_bytes: int
    holds: int


class AdapterTable:
    """May be used by any thread. Least recently held first, so the first idle one is evicted."""

    def __init__(self, limits: AdapterLimits) -> None:
        self._limits = limits
        self._resident: dict[ServedWeights, _Resident] = {}
        self._lock = threading.Lock()

    def __contains__(self, adapter: ServedWeights) -> bool:
        with self._lock:
            return adapter in self._resident

    def hold(self, adapter: ServedWeights) -> bool:
        """False when it is not resident."""
        with self._lock:
            resident = self._resident.pop(adapter, None)
            if resident is None:
                return False
            resident.holds += 1
            self._resident[adapter] = resident
            return True

    def release(self, adapter: ServedWeights) -> None:
        with self._lock:
            self._resident[adapter].holds -= 1

    def add(self, adapter: ServedWeights, size_bytes: int) -> None:
        """Resident from now on, held once."""
        with self._lock:
            self._resident[adapter] = _Resident(size_bytes, holds=1)

    def can_fit(self, size_bytes: int) -> bool:
        """False for one that could not become resident even alone."""
        return size_bytes <= self._limits.max_bytes

    def check_fits(self, adapter: ServedWeights, size_bytes: int) -> None:
        if not self.can_fit(size_bytes):
            raise InvalidArgument(
                f"adapter {adapter.name!r} has {size_bytes} bytes, all adapters together may have"
                f" {self._limits.max_bytes}",
                hint="raise max_adapter_bytes, or train a smaller rank",
            )

    def has_room(self, size_bytes: int) -> bool:
        with self._lock:
            held_bytes = sum(resident.size_bytes for resident in self._resident.values())
            return (
                len(self._resident) < self._limits.max_adapters
                and held_bytes + size_bytes <= self._limits.max_bytes
            )

    def evict_idle(self, in_use: frozenset[ServedWeights]) -> ServedWeights | None:
        """Takes out the longest idle one; None when all are held or in use."""
        with self._lock:
            for adapter, resident in self._resident.items():
                if resident.holds == 0 and adapter not in in_use:
                    del self._resident[adapter]
                    return adapter
            return None
