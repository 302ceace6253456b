"""One replica: its engine, its hot loads, and the status that control watches."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from homefire.checkpoints import open_store
from homefire.foundation.clock import Clock
from homefire.foundation.events import EventLog
from homefire.foundation.versioned import Versioned
from homefire.inference.engine.protocol import Deliveries, InferenceEngine, Publish, ServedWeights
from homefire.inference.replica.chat_template import ChatTemplate
from homefire.inference.replica.hot_load import HotLoader
from homefire.inference.replica.order import ModelLimits
from homefire.inference.replica.session_weights import SessionWeights
from homefire.inference.replica.tinker_futures import SampleFutures
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.wire.errors import Unavailable
from homefire.wire.internal import HotLoadRequest, ReplicaStatus
from homefire.wire.specs import ReplicaSpec

log = logging.getLogger(__name__)
OpenEngine = Callable[[ReplicaSpec, Publish], InferenceEngine]


class Replica:
    """Owned by one event loop. Answers status from the start, completions once the engine is open."""

    def __init__(self, spec: ReplicaSpec, open_engine: OpenEngine, clock: Clock) -> None:
        self.spec = spec
        self.clock = clock
        self._open_engine = open_engine
        self._engine: InferenceEngine | None = None
        self._tokenizer: ModelTokenizer | None = None
        self._template: ChatTemplate | None = None
        self._failure = ""
        self._opening: asyncio.Task[None] | None = None
        self._events = EventLog(Path(spec.replica_dir) / "events.jsonl", clock)
        self._versioned: Versioned[None] = Versioned(None)
        store = open_store(spec.store_root, clock)
        self._loader = HotLoader(
            store,
            events=self._events,
            clock=clock,
            drain_timeout_s=spec.drain_timeout_s,
            on_change=lambda: self._versioned.set(None),
        )
        self.session_weights = SessionWeights(spec, store, self._loader)
        self.futures = SampleFutures(spec.deployment, clock)
        self.num_asked = 0
        self.closing = asyncio.Event()
        """Set before the server stops: it waits for requests in progress, and a long poll would hold it."""

    def start(self) -> None:
        self._opening = asyncio.create_task(self._open())

    async def release_watchers(self) -> None:
        self.closing.set()
        self._versioned.set(None)

    async def stop(self) -> None:
        await self.futures.stop()
        await self.session_weights.stop()
        await self._loader.stop()
        if self._opening is not None:
            await self._opening
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        self._events.close()

    @property
    def engine(self) -> InferenceEngine:
        if self._engine is None:
            raise Unavailable(self._failure or "the replica is loading its model")
        return self._engine

    @property
    def tokenizer(self) -> ModelTokenizer:
        if self._tokenizer is None:
            raise Unavailable(self._failure or "the replica is loading its model")
        return self._tokenizer

    @property
    def template(self) -> ChatTemplate | None:
        return self._template

    @property
    def limits(self) -> ModelLimits:
        return ModelLimits(self.engine.vocab_size, self.engine.max_context_length)

    def model_name(self, weights: ServedWeights) -> str:
        """`model` in answers, e.g. `accounts/fireworks/models/qwen3-8b@step_00010-4b50536f`."""
        return f"{self.spec.base_model}@{weights.name}"

    def check_open(self) -> None:
        """SwapInProgress while a transition that refuses new requests swaps the weights."""
        self._loader.check_open()

    def hot_load(self, request: HotLoadRequest) -> ReplicaStatus:
        self._loader.request(request)
        return self.status()

    async def status_beyond(self, after: int | None, wait_s: float) -> ReplicaStatus:
        timeout_s = 0.0 if self.closing.is_set() else wait_s
        await self._versioned.wait_beyond(after=after, timeout_s=timeout_s)
        return self.status()

    def status(self) -> ReplicaStatus:
        loader = self._loader
        status = ReplicaStatus(
            version=self._versioned.version,
            nonce=self.spec.nonce,
            ready=False,
            identity=None,
            digest="",
            stage=loader.stage,
            target=loader.target,
            error=loader.error or self._failure,
            error_code=loader.error_code,
            num_asked=self.num_asked,
            ledger=loader.ledger,
        )
        if self._engine is None:
            return status
        with_engine = _with_engine(
            status, self._engine, num_waiting=self.session_weights.num_waiting
        )
        canary = loader.canary_of(self._engine.serving())
        return msgspec.structs.replace(with_engine, canary=canary)

    async def _open(self) -> None:
        began_at = self.clock.monotonic()
        try:
            publish = _publisher(asyncio.get_running_loop())
            engine = await asyncio.to_thread(self._read_model, publish)
        except Exception as error:  # a worker: the replica stays up to say why it cannot serve
            log.error("the engine cannot start", exc_info=error)
            self._failure = f"the engine cannot start: {error}"
        else:
            self._engine = engine
            self._report_start(engine, self.clock.monotonic() - began_at)
            self._loader.attach(engine)
        self._versioned.set(None)

    def _read_model(self, publish: Publish) -> InferenceEngine:
        directory = Path(self.spec.model_dir)
        self._tokenizer = ModelTokenizer.open(directory)
        self._template = ChatTemplate.open(directory)
        return self._open_engine(self.spec, publish)

    def _report_start(self, engine: InferenceEngine, seconds: float) -> None:
        served = engine.serving()
        log.info("serving %s after %.2f s", served.name, seconds)
        self._events.append(
            "started",
            pid=os.getpid(),
            seconds=seconds,
            identity=served.name,
            digest=served.digest,
        )


def identity_asked(model: str) -> str | None:
    """`accounts/a/models/m@step_00010#d` -> `step_00010`; None when any weights will do."""
    for part in model.split("#"):
        _, at, identity = part.partition("@")
        if at:
            return identity
    return None


def _publisher(loop: asyncio.AbstractEventLoop) -> Publish:
    def publish(deliveries: Deliveries) -> None:
        loop.call_soon_threadsafe(_deliver, deliveries)

    return publish


def _deliver(deliveries: Deliveries) -> None:
    for listener, update in deliveries:
        listener.receive(update)


def _with_engine(
    status: ReplicaStatus, engine: InferenceEngine, *, num_waiting: int
) -> ReplicaStatus:
    served, load = engine.serving(), engine.load()
    return msgspec.structs.replace(
        status,
        ready=not engine.failure,
        error=engine.failure or status.error,
        identity=served.identity,
        digest=served.digest,
        attested_by=engine.attested_by,
        running=load.running,
        queued=load.queued + num_waiting,
    )
