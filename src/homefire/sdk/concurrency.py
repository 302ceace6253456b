"""How many completions may run at once: a fixed number, or one that follows the server's queue.

Both controllers work in any event loop, in several one after another (`asyncio.run` per step) and
in several threads at once. A release hands its slot straight to the longest-waiting task.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from homefire.sdk.adaptive_window import AdaptiveWindow, Mean, WindowRule
from homefire.sdk.gate import Gate
from homefire.sdk.metrics import ServerMetrics


class ConcurrencyController(Protocol):
    """What a sampler asks before, and tells after, each completion."""

    async def acquire(self) -> None: ...

    def release(self, metrics: ServerMetrics | None = None) -> None: ...


@runtime_checkable
class RefusalListener(Protocol):
    """A controller that also wants to hear of attempts that the server refused and that are made again."""

    def note_refusal(self, metrics: ServerMetrics) -> None: ...


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
class _StepCounters:
    requests: int = 0
    refusals: int = 0
    max_in_flight: int = 0
    prefill_queue_s: Mean = field(default_factory=Mean)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, metrics: ServerMetrics | None) -> None:
        self.requests += 1
        if metrics is None:
            return
        if metrics.prefill_queue_duration is not None:
            self.prefill_queue_s.add(metrics.prefill_queue_duration)
        self.prompt_tokens += metrics.prompt_tokens or 0
        self.cached_tokens += metrics.cached_prompt_tokens or 0

    @property
    def cache_hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class AdaptiveConcurrencyController:
    """A window that grows and shrinks (AIMD) with the server's prefill queue time.

    The rule is that of `AdaptiveWindow`; parameters and their bounds are those of `WindowRule`.
    By default only `step_completed()` adjusts ("between steps"); `adjustment_interval=32` also
    adjusts after every 32 released completions, as newer SDKs do. Requests that the server refuses
    (429, 503) or that do not reach it shrink the window at once, at most every `shrink_cooldown_s`.
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
        shrink_cooldown_s: float = 1.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._window = AdaptiveWindow(
            WindowRule(
                initial_window=initial_window,
                min_window=min_window,
                max_window=max_window,
                prefill_queue_target=prefill_queue_target,
                additive_increase=additive_increase,
                multiplicative_decrease=multiplicative_decrease,
                ema_alpha=ema_alpha,
                adjustment_interval=adjustment_interval,
                shrink_cooldown_s=shrink_cooldown_s,
            )
        )
        self._monotonic = monotonic
        self._step = _StepCounters()
        self._state = threading.Lock()
        self._gate = Gate(self.window_size)

    @property
    def window_size(self) -> int:
        """Completions that may run at once now."""
        return self._window.size

    @property
    def in_flight(self) -> int:
        """Completions that run now."""
        return self._gate.in_flight

    @property
    def ema_prefill_queue(self) -> float | None:
        """The smoothed prefill queue time in seconds; None before the first adjustment."""
        return self._window.ema_prefill_queue_s

    async def acquire(self) -> None:
        """Waits for a free slot of the window."""
        await self._gate.enter()

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Frees the slot and notes the completion's metrics (None: it failed or said nothing)."""
        with self._state:
            self._step.max_in_flight = max(self._step.max_in_flight, self.in_flight)
            self._step.add(metrics)
            was_adjusted = self._window.note(metrics)
        if was_adjusted:
            self._gate.resize(self.window_size)
        self._gate.leave()

    def note_refusal(self, metrics: ServerMetrics) -> None:
        """An attempt failed and will be made again; its slot stays taken.

        `http_status_code`, `transport_error` and `retry_attempt` of `metrics` are looked at.
        """
        with self._state:
            self._step.refusals += 1
            did_shrink = self._window.note_refusal(metrics, self._monotonic())
        if did_shrink:
            self._gate.resize(self.window_size)

    def step_completed(self) -> dict[str, float]:
        """Adjusts the window to the step that ended, and sums the step up for logging.

        Keys: window, requests, refusals (attempts that failed), max_in_flight, avg_pq (s),
        window_after, cache_hit_rate, ema_pq (s). The counters start again.
        """
        with self._state:
            before, step = self.window_size, self._step
            self._window.adjust()
            self._step = _StepCounters()
        self._gate.resize(self.window_size)
        return {
            "window": float(before),
            "requests": float(step.requests),
            "refusals": float(step.refusals),
            "max_in_flight": float(step.max_in_flight),
            "avg_pq": step.prefill_queue_s.value,
            "window_after": float(self.window_size),
            "cache_hit_rate": step.cache_hit_rate,
            "ema_pq": self.ema_prefill_queue or 0.0,
        }
