"""Adapters on their way into the network: each waits for room, is put in place, and proves its digest."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from homefire.inference.engine.adapter_table import AdapterLimits, AdapterTable
from homefire.inference.engine.network import Network
from homefire.inference.engine.proof import prove
from homefire.inference.engine.protocol import ServedWeights, WeightSet
from homefire.wire.errors import CanaryMismatch, DigestMismatch, EngineFailed, HomefireError
from homefire.wire.manifest import Canary

log = logging.getLogger(__name__)
InUse = Callable[[], frozenset[ServedWeights]]


class AdapterLoads:
    """Used by the engine's thread; its table by any."""

    def __init__(self, network: Network, limits: AdapterLimits) -> None:
        self.table = AdapterTable(limits)
        self._network = network
        self._waiting: deque[tuple[WeightSet, Future[None]]] = deque()
        self._unproven: dict[ServedWeights, Canary] = {}
        self._refused: dict[ServedWeights, CanaryMismatch] = {}
        """Resident for those who hold them, and never computed with."""

    def request(self, weights: WeightSet, done: Future[None]) -> None:
        """`done` hears when it is resident and held; a wait can be cancelled."""
        self._waiting.append((weights, done))

    def hold(self, adapter: ServedWeights) -> bool:
        """False when it is not resident, or has to be loaded again."""
        return adapter not in self._refused and self.table.hold(adapter)

    def refusal_of(self, adapter: ServedWeights) -> CanaryMismatch | None:
        """Scores its canary when it is first wanted: until then others than the base model may serve."""
        canary = self._unproven.pop(adapter, None)
        if canary is not None:
            try:
                prove(self._network, canary, name=adapter.name, adapter=adapter)
            except CanaryMismatch as mismatch:
                log.error("adapter %s is refused: %s", adapter.name, mismatch)
                self._refused[adapter] = mismatch
        return self._refused.get(adapter)

    def advance(self, in_use: InUse) -> None:
        """Loads what there is room for, in the order of the requests."""
        while self._waiting:
            weights, done = self._waiting[0]
            if not done.cancelled() and not self._is_ready(weights, in_use):
                return
            self._waiting.popleft()
            if done.set_running_or_notify_cancel():
                self._finish(weights, done)

    def fail_all(self, error: HomefireError) -> None:
        while self._waiting:
            _, done = self._waiting.popleft()
            if done.set_running_or_notify_cancel():
                done.set_exception(error)

    def _is_ready(self, weights: WeightSet, in_use: InUse) -> bool:
        """True also for one that will be refused: that is said at once."""
        if weights.served in self.table or not self.table.can_fit(weights.size_bytes):
            return True
        while not self.table.has_room(weights.size_bytes):
            evicted = self.table.evict_idle(in_use())
            if evicted is None:
                return False
            self._drop(evicted)
            log.info("adapter %s was evicted", evicted.name)
        return True

    def _finish(self, weights: WeightSet, done: Future[None]) -> None:
        try:
            self._load(weights)
        except HomefireError as error:
            done.set_exception(error)
        except Exception as error:  # noqa: BLE001 - a worker: whoever waits is told
            text = (
                f"adapter {weights.served.name!r} was not loaded: {type(error).__name__}: {error}"
            )
            done.set_exception(EngineFailed(text))
        else:
            done.set_result(None)

    def _load(self, weights: WeightSet) -> None:
        adapter = weights.served
        if self.hold(adapter):
            return
        self.table.check_fits(adapter, weights.size_bytes)
        self._put_in_place(weights)
        if not self.table.hold(adapter):
            self.table.add(adapter, weights.size_bytes)

    def _put_in_place(self, weights: WeightSet) -> None:
        """Over what was refused, if it is still held."""
        adapter = weights.served
        digest = self._network.add_adapter(weights)
        if digest != adapter.digest:
            if adapter not in self.table:
                self._network.drop_adapter(adapter)
            raise DigestMismatch(
                f"adapter {adapter.name!r} should have digest {adapter.digest[:16]}…, what is in"
                f" memory has {digest[:16]}…",
                hint="it is not served; save the snapshot again",
            )
        self._refused.pop(adapter, None)
        if weights.canary is not None:
            self._unproven[adapter] = weights.canary

    def _drop(self, adapter: ServedWeights) -> None:
        self._network.drop_adapter(adapter)
        self._unproven.pop(adapter, None)
        self._refused.pop(adapter, None)
