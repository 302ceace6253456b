"""How many completions may run at once: a fixed number, or one that follows the server's queue.

Both controllers work in any event loop, in several one after another (`asyncio.run` per step) and
in several threads at once. A release hands its slot straight to the longest-waiting task.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from homefire.sdk.metrics import ServerMetrics

_MIN_EMA_S = 0.001
_MAX_GROWTH = 4.0


class ConcurrencyController(Protocol):
    """What a sampler asks before, and tells after, each completion."""

    async def acquire(self) -> None: ...

    def release(self, metrics: ServerMetrics | None = None) -> None: ...


@dataclass(eq=False)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Future[None]
    has_slot: bool = False


class Gate:
    """Counts slots in use and queues tasks for them, first come first served."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._waiters: deque[_Waiter] = deque()
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def try_enter(self) -> bool:
        """Takes a slot if one is free and nobody waits for it."""
        with self._lock:
            is_free = self._in_flight < self._limit and not self._waiters
            self._in_flight += is_free
            return is_free

    async def enter(self) -> None:
        if self.try_enter():
            return
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, loop.create_future())
        with self._lock:
            self._waiters.append(waiter)
            self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise

    def leave(self) -> None:
        with self._lock:
            if self._in_flight == 0:
                raise RuntimeError("release() without acquire(): call each once per completion")
            self._in_flight -= 1
            self._grant()

    def resize(self, limit: int) -> None:
        """A smaller limit takes effect as slots are released; nothing in flight is cut."""
        with self._lock:
            self._limit = limit
            self._grant()

    def _abandon(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.has_slot:
                self._in_flight -= 1
            else:
                self._waiters.remove(waiter)
            self._grant()

    def _grant(self) -> None:
        while self._waiters and self._in_flight < self._limit:
            waiter = self._waiters.popleft()
            try:
                waiter.loop.call_soon_threadsafe(_resolve, waiter.granted)
            except RuntimeError:
                # Its loop was closed with the task still waiting: it takes no slot along.
                continue
            waiter.has_slot = True
            self._in_flight += 1


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class FixedConcurrencyController:
    """At most `max_concurrency` completions at once."""

    def __init__(self, max_concurrency: int) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}: use a whole number >= 1")
        self._window = max_concurrency
        self._gate = Gate(max_concurrency)

    @property
    def window_size(self) -> int:
        return self._window

    async def acquire(self) -> None:
        """Waits for a free slot."""
        await self._gate.enter()

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Frees the slot; `metrics` are not looked at."""
        self._gate.leave()

    def step_completed(self) -> dict[str, float]:
        """The window, for logging; nothing changes."""
        return {"window": float(self._window)}


@dataclass
class _Mean:
    """Sum and count, not samples: a caller may never end its step."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class _StepCounters:
    requests: int = 0
    prefill_queue_s: _Mean = field(default_factory=_Mean)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, metrics: ServerMetrics) -> None:
        if metrics.prefill_queue_duration is not None:
            self.prefill_queue_s.add(metrics.prefill_queue_duration)
        self.prompt_tokens += metrics.prompt_tokens or 0
        self.cached_tokens += metrics.cached_prompt_tokens or 0


class AdaptiveConcurrencyController:
    """A window that grows and shrinks (AIMD) with the server's prefill queue time.

    At each adjustment `avg` is the mean prefill queue time (seconds) since the last one and
    `ema = ema_alpha·avg + (1 − ema_alpha)·ema`. Above `prefill_queue_target` the window is
    multiplied by `multiplicative_decrease`; else it grows by
    `additive_increase · min(target / max(ema, 1 ms), 4)`. It stays within
    [min_window, max_window]; its integer part counts. Without samples nothing changes.

    By default only `step_completed()` adjusts ("between steps"); `adjustment_interval=32` also
    adjusts after every 32 released completions, as newer SDKs do.
    """

    def __init__(
        self,
        initial_window: int = 16,
        min_window: int = 1,
        max_window: int = 256,
        prefill_queue_target: float = 0.5,
        additive_increase: float = 1.0,
        multiplicative_decrease: float = 0.5,
        ema_alpha: float = 0.3,
        *,
        adjustment_interval: int = 0,
    ) -> None:
        _check_aimd(
            initial_window, min_window, max_window, prefill_queue_target, additive_increase,
            multiplicative_decrease, ema_alpha, adjustment_interval,
        )  # fmt: skip
        self._window = float(initial_window)
        self._min_window, self._max_window = min_window, max_window
        self._target_s = prefill_queue_target
        self._increase = additive_increase
        self._decrease = multiplicative_decrease
        self._alpha = ema_alpha
        self._interval = adjustment_interval
        self._ema_s: float | None = None
        self._fresh_s = _Mean()
        self._since_adjustment = 0
        self._step = _StepCounters()
        self._state = threading.Lock()
        self._gate = Gate(self.window_size)

    @property
    def window_size(self) -> int:
        """Completions that may run at once now."""
        return int(self._window)

    @property
    def ema_prefill_queue(self) -> float | None:
        """The smoothed prefill queue time in seconds; None before the first adjustment."""
        return self._ema_s

    async def acquire(self) -> None:
        """Waits for a free slot of the window."""
        await self._gate.enter()

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Frees the slot and notes the completion's metrics (None: it failed or said nothing)."""
        with self._state:
            self._note(metrics)
            is_due = 0 < self._interval <= self._since_adjustment
            if is_due:
                self._adjust()
        if is_due:
            self._gate.resize(self.window_size)
        self._gate.leave()

    def step_completed(self) -> dict[str, float]:
        """Adjusts the window to the step that ended, and sums the step up for logging.

        Keys: window, requests, avg_pq (s), window_after, cache_hit_rate, ema_pq (s). The counters
        start again.
        """
        with self._state:
            before, step = self.window_size, self._step
            self._adjust()
            self._step = _StepCounters()
        self._gate.resize(self.window_size)
        return {
            "window": float(before),
            "requests": float(step.requests),
            "avg_pq": step.prefill_queue_s.value,
            "window_after": float(self.window_size),
            "cache_hit_rate": step.cached_tokens / step.prompt_tokens
            if step.prompt_tokens
            else 0.0,
            "ema_pq": self._ema_s or 0.0,
        }

    def _note(self, metrics: ServerMetrics | None) -> None:
        self._step.requests += 1
        self._since_adjustment += 1
        if metrics is not None:
            self._step.add(metrics)
            if metrics.prefill_queue_duration is not None:
                self._fresh_s.add(metrics.prefill_queue_duration)

    def _adjust(self) -> None:
        samples, self._fresh_s = self._fresh_s, _Mean()
        self._since_adjustment = 0
        if not samples.count:
            return
        average_s = samples.value
        previous_s = self._ema_s
        self._ema_s = (
            average_s
            if previous_s is None
            else self._alpha * average_s + (1 - self._alpha) * previous_s
        )
        if self._ema_s > self._target_s:
            self._window *= self._decrease
        else:
            growth = min(self._target_s / max(self._ema_s, _MIN_EMA_S), _MAX_GROWTH)
            self._window += self._increase * growth
        self._window = min(max(self._window, self._min_window), self._max_window)


def _check_aimd(
    initial: int,
    smallest: int,
    largest: int,
    target_s: float,
    increase: float,
    decrease: float,
    alpha: float,
    interval: int,
) -> None:
    if not 1 <= smallest <= initial <= largest:
        raise ValueError(
            f"initial_window {initial}, min_window {smallest} and max_window {largest} must satisfy "
            "1 <= min_window <= initial_window <= max_window"
        )
    if not target_s > 0:
        raise ValueError(f"prefill_queue_target is {target_s}: use seconds > 0")
    if not increase >= 0:
        raise ValueError(f"additive_increase is {increase}: use a number >= 0")
    if not 0 < decrease < 1:
        raise ValueError(f"multiplicative_decrease is {decrease}: use a number between 0 and 1")
    if not 0 < alpha <= 1:
        raise ValueError(f"ema_alpha is {alpha}: use a number in (0, 1]")
    if interval < 0:
        raise ValueError(f"adjustment_interval is {interval}: use a count, or 0 for step ends only")
