"""The weights that a sampling session names: found in the store, pinned, brought into the engine, kept there.

The base model and every adapter on it serve together; a full snapshot serves alone, in turn.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

from homefire.checkpoints import CheckpointFamily, CheckpointKey, CheckpointStore
from homefire.inference.engine.protocol import InferenceEngine, ServedWeights, WeightSet
from homefire.inference.replica.hot_load import HotLoader, read_weights
from homefire.inference.replica.weight_turns import WeightTurns
from homefire.wire.errors import DigestMismatch, InvalidArgument, UnknownSnapshot
from homefire.wire.ids import Identity
from homefire.wire.internal import Drain, HotLoadRequest, SnapshotLocation
from homefire.wire.manifest import CheckpointKind, Manifest
from homefire.wire.pooled import SamplingSession
from homefire.wire.specs import ReplicaSpec

BASE_MODEL = HotLoadRequest(identity=None, reset_prompt_cache=False, drain=Drain.STRICT)
"""Weights that are taken in turns come back, and find the prompts that were cached under them."""
_REMEMBERED_SESSIONS = 10_000


@dataclass(frozen=True)
class _Snapshot:
    """What a session's snapshot was when the session first asked."""

    location: SnapshotLocation
    weights: ServedWeights
    is_adapter: bool

    @property
    def name(self) -> str:
        return self.weights.name


class SessionWeights:
    """Owned by one event loop."""

    def __init__(self, spec: ReplicaSpec, store: CheckpointStore, loader: HotLoader) -> None:
        self._spec = spec
        self._store = store
        self._turns = WeightTurns(loader)
        self._pinned: OrderedDict[str, _Snapshot] = OrderedDict()
        self.num_waiting = 0
        """Requests whose weights are not there yet."""
        self._reading: WeakValueDictionary[ServedWeights, asyncio.Lock] = WeakValueDictionary()

    async def stop(self) -> None:
        await self._turns.stop()

    @asynccontextmanager
    async def serving(
        self, engine: InferenceEngine, session: SamplingSession
    ) -> AsyncIterator[ServedWeights]:
        """While inside, the engine serves what the session names to whoever submits with it.

        UnknownSnapshot when the store has no such snapshot, or it has expired; DigestMismatch when it is no longer the one
        that the session began with; else what kept it from being loaded.
        """
        async with AsyncExitStack() as stack:
            self.num_waiting += 1
            try:
                found = None if session.is_base else await self._find(session)
                weights = await self._enter(stack, engine, found)
            finally:
                self.num_waiting -= 1
            yield weights

    @asynccontextmanager
    async def serving_newest(
        self, engine: InferenceEngine, *, run: str = "", snapshot: str = ""
    ) -> AsyncIterator[ServedWeights]:
        """The same for a request of no session: what the store has under the name now. Without a name,
        the base model."""
        async with AsyncExitStack() as stack:
            self.num_waiting += 1
            try:
                found = await self._look_up(run, snapshot) if snapshot else None
                weights = await self._enter(stack, engine, found)
            finally:
                self.num_waiting -= 1
            yield weights

    async def run_of(self, identity: str) -> str:
        """The one run that saved a snapshot of this name. UnknownSnapshot; InvalidArgument when several
        did."""
        spec = self._spec
        manifests = await asyncio.to_thread(
            self._store.list, spec.account, spec.samples_job, family=CheckpointFamily.SAMPLER
        )
        runs = [manifest.slot for manifest in manifests if manifest.identity == identity]
        if not runs:
            raise UnknownSnapshot(
                f"deployment {spec.deployment!r} has no snapshot {identity!r}",
                hint="name one as tinker://<run>/sampler_weights/<name>",
                field="model",
            )
        if len(runs) > 1:
            paths = ", ".join(f"tinker://{run}/sampler_weights/{identity}" for run in runs)
            raise InvalidArgument(
                f"several runs saved a snapshot {identity!r}",
                hint=f"name one of {paths}",
                field="model",
            )
        return runs[0]

    async def _enter(
        self, stack: AsyncExitStack, engine: InferenceEngine, snapshot: _Snapshot | None
    ) -> ServedWeights:
        if snapshot is None:
            await stack.enter_async_context(self._turns.turn(BASE_MODEL))
            return engine.serving()
        if snapshot.is_adapter:
            await stack.enter_async_context(self._held(engine, snapshot))
            await stack.enter_async_context(self._turns.turn(BASE_MODEL))
        else:
            await stack.enter_async_context(self._turns.turn(_full(snapshot)))
        return snapshot.weights

    async def _find(self, session: SamplingSession) -> _Snapshot:
        """Pinned by the session's first request: whoever saves other weights under the same name changes
        new sessions only."""
        pinned = self._pinned.get(session.id)
        if pinned is None:
            found = await self._look_up(session.run, session.snapshot)
            pinned = self._pinned.setdefault(session.id, found)
        self._pinned.move_to_end(session.id)
        while len(self._pinned) > _REMEMBERED_SESSIONS:
            self._pinned.popitem(last=False)
        return pinned

    async def _look_up(self, run: str, snapshot: str) -> _Snapshot:
        location = SnapshotLocation(self._spec.account, self._spec.samples_job, run)
        manifest = await asyncio.to_thread(self._manifest, location, snapshot)
        return _snapshot(location, manifest)

    def _manifest(self, location: SnapshotLocation, name: str) -> Manifest:
        where = (location.account, location.job, location.slot)
        return self._store.loadable(CheckpointKey(*where, CheckpointFamily.SAMPLER, name))

    @asynccontextmanager
    async def _held(self, engine: InferenceEngine, snapshot: _Snapshot) -> AsyncIterator[None]:
        await self._hold(engine, snapshot)
        try:
            yield
        finally:
            engine.release_adapter(snapshot.weights)

    async def _hold(self, engine: InferenceEngine, snapshot: _Snapshot) -> None:
        """Read once, however many ask at a time."""
        if engine.hold_adapter(snapshot.weights):
            return
        async with self._reading.setdefault(snapshot.weights, asyncio.Lock()):
            if engine.hold_adapter(snapshot.weights):
                return
            found = await asyncio.to_thread(
                read_weights, self._store, snapshot.location, snapshot.name, None
            )
            if found.served != snapshot.weights:
                raise DigestMismatch(
                    f"snapshot {snapshot.name!r} has digest {found.served.digest}, not the"
                    f" {snapshot.weights.digest} that this session began with",
                    hint="it was replaced meanwhile; create a new sampling session",
                )
            await _load(engine, found)


def _snapshot(location: SnapshotLocation, manifest: Manifest) -> _Snapshot:
    served = ServedWeights(Identity(manifest.identity), manifest.digest)
    return _Snapshot(location, served, manifest.kind is CheckpointKind.LORA)


def _full(snapshot: _Snapshot) -> HotLoadRequest:
    served = snapshot.weights
    return HotLoadRequest(
        identity=served.identity,
        location=snapshot.location,
        digest=served.digest,
        reset_prompt_cache=False,
        drain=Drain.STRICT,
    )


async def _load(engine: InferenceEngine, adapter: WeightSet) -> None:
    """Who is cancelled while the engine loads it leaves no hold behind."""
    loading = engine.load_adapter(adapter)

    def release(done: Future[None]) -> None:
        if not done.cancelled() and done.exception() is None:
            engine.release_adapter(adapter.served)

    try:
        await asyncio.wrap_future(loading)
    except asyncio.CancelledError:
        loading.add_done_callback(release)
        raise
