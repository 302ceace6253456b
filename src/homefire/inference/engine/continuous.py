"""The embedded engine: a `Scheduler` in one thread of its own, fed by a queue of commands."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from homefire.foundation.clock import Clock, SystemClock
from homefire.inference.engine.network import Network
from homefire.inference.engine.protocol import (
    Deliveries,
    Listener,
    Load,
    Publish,
    SequenceRequest,
    ServedWeights,
    Stragglers,
    Swapped,
    Ticket,
    WeightSet,
)
from homefire.inference.engine.scheduler import Scheduler, SchedulerLimits
from homefire.inference.engine.sequence import Generation
from homefire.wire.errors import EngineFailed, HomefireError, Overloaded, Unavailable

log = logging.getLogger(__name__)
_Command = Callable[[], None]


@dataclass(frozen=True)
class QueueLimits:
    """What may wait before new requests are shed."""

    requests: int = 4096
    prompt_tokens: int = 8 << 20
    """A prompt that is longer than that is taken all the same while nothing else waits."""


class ContinuousEngine:
    """An `InferenceEngine` over a network of this process, which belongs to the engine's thread."""

    def __init__(
        self,
        network: Network,
        weights: WeightSet,
        *,
        publish: Publish,
        limits: SchedulerLimits | None = None,
        queue: QueueLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`weights` is what the network holds now."""
        self._network = network
        self._publish = publish
        self._queue = queue or QueueLimits()
        self._sent_tokens = 0
        """Of prompts that the scheduler has not taken yet; guarded by `_sending`."""
        self._clock = clock or SystemClock()
        self._scheduler = Scheduler(
            network, weights, limits=limits or SchedulerLimits(), clock=self._clock
        )
        self._commands: SimpleQueue[_Command] = SimpleQueue()
        self._sending = threading.Lock()
        self._ended: HomefireError | None = None
        self._thread = threading.Thread(target=self._run, name="homefire-engine", daemon=True)
        self._thread.start()

    @property
    def vocab_size(self) -> int:
        return self._network.vocab_size

    @property
    def max_context_length(self) -> int:
        return self._network.max_context_length

    @property
    def attested_by(self) -> str:
        return "memory"

    def submit(
        self,
        sequences: Sequence[SequenceRequest],
        listener: Listener,
        *,
        weights: ServedWeights | None = None,
    ) -> Ticket:
        num_tokens = _num_prompt_tokens(sequences)
        self._check_room(num_tokens)
        generation = Generation(listener, self._clock.monotonic(), num_tokens, weights)
        with self._sending:
            self._sent_tokens += num_tokens
        self._send(lambda: self._take(generation, sequences))
        return generation

    def cancel(self, ticket: Ticket) -> None:
        if isinstance(ticket, Generation) and self._ended is None:
            self._send(lambda: self._scheduler.cancel(ticket))

    def swap_weights(
        self,
        weights: WeightSet,
        *,
        drain_timeout_s: float,
        stragglers: Stragglers = Stragglers.FAIL_SWAP,
        reset_prompt_cache: bool = True,
    ) -> Future[Swapped]:
        done: Future[Swapped] = Future()
        self._send(
            lambda: self._scheduler.begin_swap(
                weights,
                drain_timeout_s=drain_timeout_s,
                done=done,
                stragglers=stragglers,
                reset_prompt_cache=reset_prompt_cache,
            )
        )
        return done

    def hold_adapter(self, adapter: ServedWeights) -> bool:
        return self._scheduler.adapters.hold(adapter)

    def load_adapter(self, weights: WeightSet) -> Future[None]:
        done: Future[None] = Future()
        self._send(lambda: self._scheduler.adapters.request(weights, done))
        return done

    def release_adapter(self, adapter: ServedWeights) -> None:
        """Wakes the engine, since a load may wait for it."""
        self._scheduler.adapters.table.release(adapter)
        with suppress(HomefireError):
            self._send(lambda: None)

    def base_weights(self) -> WeightSet:
        return self._network.base_weights()

    def serving(self) -> ServedWeights:
        return self._scheduler.serving.served

    def serving_set(self) -> WeightSet:
        return self._scheduler.serving

    def load(self) -> Load:
        queued = self._scheduler.num_queued + self._commands.qsize()
        queued_tokens = self._scheduler.num_queued_tokens + self._sent_tokens
        return Load(self._scheduler.num_running, queued, queued_tokens)

    @property
    def failure(self) -> str:
        return "" if self._ended is None else str(self._ended)

    def close(self) -> None:
        if self._ended is None:
            self._send(lambda: self._end(Unavailable("the replica is stopping")))
        self._thread.join()

    def _check_room(self, num_tokens: int) -> None:
        load, limits = self.load(), self._queue
        hint = "retry later, with fewer requests at once"
        if load.queued >= limits.requests:
            raise Overloaded(
                f"{load.queued} requests are waiting, the limit is {limits.requests}", hint=hint
            )
        if load.queued_tokens and load.queued_tokens + num_tokens > limits.prompt_tokens:
            raise Overloaded(
                f"{load.queued_tokens} prompt tokens are waiting, with {num_tokens} more they would be "
                f"over the limit of {limits.prompt_tokens}",
                hint=hint,
            )

    def _send(self, command: _Command) -> None:
        with self._sending:
            if self._ended is not None:
                raise self._ended
            self._commands.put(command)

    # the engine's thread --------------------------------------------------------------------

    def _take(self, generation: Generation, sequences: Sequence[SequenceRequest]) -> None:
        with self._sending:
            self._sent_tokens -= generation.num_prompt_tokens
        self._scheduler.submit(generation, sequences)

    def _run(self) -> None:
        while self._ended is None:
            first = self._commands.get() if self._scheduler.is_idle else None
            self._tell(self._turn(first))
        self._obey()
        self._tell(self._scheduler.fail_all(self._ended))

    def _turn(self, first: _Command | None) -> Deliveries:
        """Obeys all commands that are there, then takes one step."""
        try:
            if first is not None:
                first()
            self._obey()
            return self._scheduler.step() if self._ended is None else ()
        except Exception as error:  # the worker loop: it reports and goes on
            log.error("a step of the engine failed", exc_info=error)
            return self._recover(error)

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _recover(self, error: Exception) -> Deliveries:
        failure = EngineFailed(f"the engine failed on this batch: {type(error).__name__}: {error}")
        try:
            return self._scheduler.recover(failure)
        except Exception as fatal:  # the weights are lost: nothing may be served
            log.critical("the engine cannot go on", exc_info=fatal)
            self._end(EngineFailed(f"the engine is broken: {fatal}", hint="restart the replica"))
            return ()

    def _end(self, reason: HomefireError) -> None:
        with self._sending:
            self._ended = reason

    def _tell(self, deliveries: Deliveries) -> None:
        if deliveries:
            self._publish(deliveries)


def _num_prompt_tokens(sequences: Sequence[SequenceRequest]) -> int:
    """Samples of one prompt share it."""
    prompts = {id(request.prompt): request.prompt for request in sequences}
    return sum(len(prompt) for prompt in prompts.values())
