"""Hot loading: from an identity to weights that serve, in the background, with the old ones serving on.

    idle ──request──▶ loading (read, apply, verify) ──▶ draining (swap, verify in place) ──▶ idle
                       ▲ └────────── any failure ──────────┴──▶ error (the old weights serve)
                       └── once, from its base: what is in place is not what the manifest says

One load runs at a time. Of the requests that come meanwhile the newest is taken up next; whoever calls
`load` waits for its own. What happens to requests meanwhile is `Transition` and `Drain`. A prompt cached
under one set of weights is never used under another: resetting the prompt cache frees memory and changes
no number.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from homefire.checkpoints import CheckpointStore, Held, materialize
from homefire.foundation.clock import Clock
from homefire.foundation.events import EventLog
from homefire.inference.engine.protocol import (
    InferenceEngine,
    ServedWeights,
    Stragglers,
    Swapped,
    WeightSet,
)
from homefire.wire.errors import (
    CanaryMismatch,
    DigestMismatch,
    HomefireError,
    HotLoadFailed,
    InvalidArgument,
    SwapInProgress,
    Unavailable,
)
from homefire.wire.ids import BASE_IDENTITY, Identity
from homefire.wire.internal import (
    CanaryVerdict,
    Drain,
    HotLoadRequest,
    HotLoadStage,
    LedgerEntry,
    SnapshotLocation,
    Transition,
)
from homefire.wire.manifest import CheckpointKind

log = logging.getLogger(__name__)
_LEDGER_LENGTH = 200


class HotLoader:
    """Owned by the event loop. `on_change` is called after every change of its public state."""

    def __init__(
        self,
        store: CheckpointStore,
        *,
        events: EventLog,
        clock: Clock,
        drain_timeout_s: float,
        on_change: Callable[[], object],
    ) -> None:
        self._store = store
        self._events = events
        self._clock = clock
        self._drain_timeout_s = drain_timeout_s
        self._on_change = on_change
        self._wanted: HotLoadRequest | None = None
        self._engine: InferenceEngine | None = None
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._served_from: SnapshotLocation | None = None
        self._is_refusing = False
        self.stage = HotLoadStage.IDLE
        self.target: str | None = None
        self.error = ""
        self.error_code = ""
        self._proven: tuple[ServedWeights, CanaryVerdict] | None = None
        """By the last load that was heard of."""
        self.ledger: list[LedgerEntry] = []

    def request(self, wanted: HotLoadRequest) -> None:
        """Returns at once. InvalidArgument when it does not say where the snapshot is."""
        if wanted.identity is not None and wanted.location is None:
            raise InvalidArgument(
                f"the hot load of {wanted.identity!r} has no location",
                hint="name the account, job and slot whose snapshot it is",
                field="location",
            )
        self._wanted = wanted
        if self._task is None:
            self._enter(HotLoadStage.LOADING, wanted.identity)
            self._start()

    def check_open(self) -> None:
        """SwapInProgress while a `SYNC` transition drains and swaps."""
        if self._is_refusing:
            raise SwapInProgress(
                f"the weights are being swapped to {self.target or BASE_IDENTITY!r}",
                hint="retry in a moment, or set hotLoadTransitionType to wait instead",
            )

    async def load(self, wanted: HotLoadRequest) -> None:
        """Returns when it serves. Raises why it was not loaded; Unavailable before there is an engine."""
        if self._engine is None:
            raise Unavailable("the replica is loading its model")
        async with self._one_at_a_time:
            error = await self._load_reporting(self._engine, wanted)
        if error is not None:
            raise error

    def is_serving(self, wanted: HotLoadRequest) -> bool:
        return self._engine is not None and self._is_serving(self._engine, wanted)

    def canary_of(self, served: ServedWeights) -> CanaryVerdict:
        """ABSENT also where nobody heard what it said of these weights."""
        if self._proven is None or self._proven[0] != served:
            return CanaryVerdict.ABSENT
        return self._proven[1]

    def attach(self, engine: InferenceEngine) -> None:
        """The engine is ready; what was requested before is loaded now."""
        self._engine = engine
        self._start()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _start(self) -> None:
        if self._engine is not None and self._wanted is not None:
            self._task = asyncio.create_task(self._work(self._engine))

    async def _work(self, engine: InferenceEngine) -> None:
        while self._wanted is not None:
            async with self._one_at_a_time:
                wanted, self._wanted = self._wanted, None
                if wanted is not None:
                    await self._load_reporting(engine, wanted)
        self._task = None

    async def _load_reporting(
        self, engine: InferenceEngine, wanted: HotLoadRequest
    ) -> HomefireError | None:
        """What went wrong is reported, and returned."""
        if self._is_serving(engine, wanted):
            self._confirm(engine.serving())
            self._enter(HotLoadStage.IDLE, None)
            return None
        attempt = _Attempt(self._clock)
        try:
            await self._load_or_reseed(engine, wanted, attempt)
        except Exception as error:  # noqa: BLE001 - a worker loop: the old weights serve on
            self._record_failure(wanted, error, attempt)
            self._enter(HotLoadStage.ERROR, wanted.identity, error)
            return error if isinstance(error, HomefireError) else HotLoadFailed(_text(error))
        self._enter(HotLoadStage.IDLE, None)
        return None

    async def _load_or_reseed(
        self, engine: InferenceEngine, wanted: HotLoadRequest, attempt: _Attempt
    ) -> None:
        """What was read is verified before it is applied. So when it is wrong in place, it is worth a
        second reading, whole and from the store alone."""
        weights = await self._read(engine, wanted, attempt)
        try:
            await self._serve(engine, weights, wanted, attempt)
        except DigestMismatch as mismatch:
            self._record_failure(wanted, mismatch, attempt)
            attempt.begin_again()
            weights = await self._read(engine, wanted, attempt)
            await self._serve(engine, weights, wanted, attempt)

    async def _read(
        self, engine: InferenceEngine, wanted: HotLoadRequest, attempt: _Attempt
    ) -> WeightSet:
        self._enter(HotLoadStage.LOADING, wanted.identity)
        if wanted.identity is None or wanted.location is None:
            return await asyncio.to_thread(engine.base_weights)
        held = None if attempt.reseeds else self._held(engine, wanted.location)
        weights = await asyncio.to_thread(
            read_weights, self._store, wanted.location, wanted.identity, held
        )
        if wanted.digest not in ("", weights.served.digest):
            raise DigestMismatch(
                f"snapshot {wanted.identity!r} has digest {weights.served.digest}, not the"
                f" {wanted.digest} that was asked for",
                hint="it was replaced meanwhile; hot-load it again",
            )
        return weights

    async def _serve(
        self,
        engine: InferenceEngine,
        weights: WeightSet,
        wanted: HotLoadRequest,
        attempt: _Attempt,
    ) -> None:
        load_ms = attempt.elapsed_ms
        self._enter(HotLoadStage.DRAINING, wanted.identity)
        swapped = await self._swap(engine, weights, wanted)
        self._served_from, self._proven = wanted.location, (weights.served, swapped.canary)
        self._record_success(weights.served, swapped, attempt, load_ms=load_ms)

    async def _swap(
        self, engine: InferenceEngine, weights: WeightSet, wanted: HotLoadRequest
    ) -> Swapped:
        self._is_refusing = wanted.transition is Transition.SYNC
        is_bounded = wanted.drain is Drain.BOUNDED
        try:
            done = engine.swap_weights(
                weights,
                drain_timeout_s=self._drain_s(wanted),
                stragglers=Stragglers.GO_ON if is_bounded else Stragglers.FAIL_SWAP,
                reset_prompt_cache=wanted.reset_prompt_cache,
            )
            return await asyncio.wrap_future(done)
        finally:
            self._is_refusing = False

    def _drain_s(self, wanted: HotLoadRequest) -> float:
        if wanted.transition is Transition.ASYNC and wanted.drain is Drain.BOUNDED:
            return 0.0
        if wanted.drain_timeout_s is not None:
            return wanted.drain_timeout_s
        return self._drain_timeout_s

    def _held(self, engine: InferenceEngine, location: SnapshotLocation) -> Held | None:
        """What is served, when a delta in that place may build on it."""
        serving = engine.serving_set()
        if serving.served.identity is None or serving.kind is CheckpointKind.LORA:
            return None
        is_same_place = location == self._served_from
        return Held(serving.served.identity, serving.tensors) if is_same_place else None

    def _is_serving(self, engine: InferenceEngine, wanted: HotLoadRequest) -> bool:
        is_same_place = wanted.identity is None or wanted.location == self._served_from
        serving = engine.serving()
        is_same = wanted.digest in ("", serving.digest)
        return serving.identity == wanted.identity and is_same and is_same_place

    def _enter(
        self, stage: HotLoadStage, target: str | None, error: Exception | None = None
    ) -> None:
        self.stage, self.target = stage, target
        self.error = "" if error is None else _text(error)
        self.error_code = "" if error is None else _code(error)
        self._on_change()

    def _confirm(self, served: ServedWeights) -> None:
        """After a load that was put in place, and of which the ledger knows only that nobody heard so."""
        last = self.ledger[-1] if self.ledger else None
        if last is not None and not last.ok and last.identity == served.name:
            self._record(
                LedgerEntry(
                    identity=served.name, digest=served.digest, at=self._clock.now(), ok=True
                )
            )

    def _record_success(
        self, served: ServedWeights, swapped: Swapped, attempt: _Attempt, *, load_ms: float
    ) -> None:
        entry = LedgerEntry(
            identity=served.name,
            digest=served.digest,
            at=self._clock.now(),
            ok=True,
            load_ms=load_ms + swapped.apply_ms,
            drain_ms=swapped.drain_ms,
            canary=swapped.canary,
            num_stragglers=swapped.num_stragglers,
            reseeded=attempt.reseeds,
        )
        self._record(entry)
        log.info("now serving %s, canary %s", served.name, swapped.canary)

    def _record_failure(self, wanted: HotLoadRequest, error: Exception, attempt: _Attempt) -> None:
        known, text = isinstance(error, HomefireError), _text(error)
        identity = wanted.identity or BASE_IDENTITY
        log.warning("%s was not loaded: %s", identity, text, exc_info=None if known else error)
        is_canary = isinstance(error, CanaryMismatch)
        entry = LedgerEntry(
            identity=identity,
            digest="",
            at=self._clock.now(),
            ok=False,
            load_ms=attempt.elapsed_ms,
            canary=CanaryVerdict.MISMATCH if is_canary else CanaryVerdict.ABSENT,
            reseeded=attempt.reseeds,
            error=text,
            error_code=_code(error),
        )
        self._record(entry)

    def _record(self, entry: LedgerEntry) -> None:
        self.ledger = [*self.ledger[1 - _LEDGER_LENGTH :], entry]
        self._events.append(
            "hot_load", **{k: v for k, v in msgspec.structs.asdict(entry).items() if k != "at"}
        )


class _Attempt:
    """At one load: when it began, and whether it is the second."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.reseeds = False
        self._began_at = clock.monotonic()

    def begin_again(self) -> None:
        self.reseeds = True
        self._began_at = self._clock.monotonic()

    @property
    def elapsed_ms(self) -> float:
        return 1000 * (self._clock.monotonic() - self._began_at)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, HomefireError) else f"{type(error).__name__}: {error}"


def _code(error: Exception) -> str:
    return error.code if isinstance(error, HomefireError) else HotLoadFailed.code


def read_weights(
    store: CheckpointStore, location: SnapshotLocation, identity: str, held: Held | None
) -> WeightSet:
    """A snapshot's verified tensors. Blocks."""
    found = materialize(store, location.account, location.job, location.slot, identity, held=held)
    is_adapter = found.manifest.kind is CheckpointKind.LORA
    return WeightSet(
        ServedWeights(Identity(identity), found.manifest.digest),
        CheckpointKind.LORA if is_adapter else CheckpointKind.BASE,
        found.tensors,
        found.manifest.lora,
        found.manifest.canary,
    )
