"""How the number of completions at once follows the server: arithmetic, without tasks or clocks.

Source: the protocol's concurrency controllers (AIMD on prefill queue time), both generations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from homefire.sdk.metrics import ServerMetrics

_MIN_EMA_S = 0.001
_MAX_GROWTH = 4.0
_OVERLOADED = frozenset({429, 503})
_STUBBORN_ATTEMPT = 3
"""From this attempt on, an overloaded server halves the window twice."""


@dataclass(frozen=True)
class WindowRule:
    """What the window follows. Every count is of completions, every duration in seconds."""

    initial_window: int = 16
    min_window: int = 1
    max_window: int = 256
    prefill_queue_target: float = 0.5
    """Queue time up to which the window grows."""
    additive_increase: float = 1.0
    multiplicative_decrease: float = 0.5
    ema_alpha: float = 0.3
    """Weight of the newest mean queue time against those before."""
    adjustment_interval: int = 0
    """Completions after which the window is adjusted within a step; 0 = at the ends of steps only."""
    shrink_cooldown_s: float = 1.0
    """Refusals of one burst come together: they shrink the window once."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_window <= self.initial_window <= self.max_window:
            raise ValueError(
                f"initial_window {self.initial_window}, min_window {self.min_window} and max_window "
                f"{self.max_window} must satisfy 1 <= min_window <= initial_window <= max_window"
            )
        if not self.prefill_queue_target > 0:
            raise ValueError(
                f"prefill_queue_target is {self.prefill_queue_target}: use seconds > 0"
            )
        if not self.additive_increase >= 0:
            raise ValueError(f"additive_increase is {self.additive_increase}: use a number >= 0")
        if not 0 < self.multiplicative_decrease < 1:
            raise ValueError(
                f"multiplicative_decrease is {self.multiplicative_decrease}: "
                "use a number between 0 and 1"
            )
        if not 0 < self.ema_alpha <= 1:
            raise ValueError(f"ema_alpha is {self.ema_alpha}: use a number in (0, 1]")
        if self.adjustment_interval < 0:
            raise ValueError(
                f"adjustment_interval is {self.adjustment_interval}: "
                "use a count, or 0 for step ends only"
            )
        if not self.shrink_cooldown_s >= 0:
            raise ValueError(f"shrink_cooldown_s is {self.shrink_cooldown_s}: use seconds >= 0")


@dataclass
class Mean:
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
class _Interval:
    """Completions since the last adjustment."""

    completions: int = 0
    prefill_queue_s: Mean = field(default_factory=Mean)
    successes: int = 0
    refusals: int = 0


class AdaptiveWindow:
    """One window and what it learnt. Used by one thread at a time.

    At each adjustment `avg` is the mean prefill queue time since the last one and
    `ema = ema_alpha·avg + (1 − ema_alpha)·ema`. Above the target the window is multiplied by
    `multiplicative_decrease`; else it grows by `additive_increase · min(target / max(ema, 1 ms), 4)`.
    A server that reports no queue time is judged by its statuses: refusals shrink the window at once,
    an interval of successes alone adds `additive_increase`.
    """

    def __init__(self, rule: WindowRule) -> None:
        self._rule = rule
        self._size = float(rule.initial_window)
        self._ema_s: float | None = None
        self._interval = _Interval()
        self._shrunk_at_s = float("-inf")

    @property
    def size(self) -> int:
        """Completions that may run at once: the integer part counts."""
        return int(self._size)

    @property
    def ema_prefill_queue_s(self) -> float | None:
        return self._ema_s

    def note(self, metrics: ServerMetrics | None) -> bool:
        """A completion ended (None: it said nothing). True when the window was adjusted to it."""
        self._interval.completions += 1
        if metrics is not None and metrics.prefill_queue_duration is not None:
            self._interval.prefill_queue_s.add(metrics.prefill_queue_duration)
        elif metrics is not None and _succeeded(metrics):
            self._interval.successes += 1
        if 0 < self._rule.adjustment_interval <= self._interval.completions:
            self.adjust()
            return True
        return False

    def note_refusal(self, metrics: ServerMetrics, now_s: float) -> bool:
        """An attempt failed; `now_s` is of any monotonic clock. True when that shrank the window."""
        if not is_refusal(metrics):
            return False
        self._interval.refusals += 1
        if now_s - self._shrunk_at_s < self._rule.shrink_cooldown_s:
            return False
        self._shrunk_at_s = now_s
        is_stubborn = (metrics.retry_attempt or 0) >= _STUBBORN_ATTEMPT
        self._resize(self._size * self._rule.multiplicative_decrease ** (2 if is_stubborn else 1))
        return True

    def adjust(self) -> None:
        """To the completions since the last time; without any that told something nothing changes."""
        interval, self._interval = self._interval, _Interval()
        if interval.prefill_queue_s.count:
            self._follow(interval.prefill_queue_s.value)
        elif interval.successes and not interval.refusals:
            self._resize(self._size + self._rule.additive_increase)

    def _follow(self, average_s: float) -> None:
        rule, before_s = self._rule, self._ema_s
        ema_s = (
            average_s
            if before_s is None
            else rule.ema_alpha * average_s + (1 - rule.ema_alpha) * before_s
        )
        self._ema_s = ema_s
        if ema_s > rule.prefill_queue_target:
            self._resize(self._size * rule.multiplicative_decrease)
        else:
            growth = min(rule.prefill_queue_target / max(ema_s, _MIN_EMA_S), _MAX_GROWTH)
            self._resize(self._size + rule.additive_increase * growth)

    def _resize(self, size: float) -> None:
        self._size = min(max(size, self._rule.min_window), self._rule.max_window)


def is_refusal(metrics: ServerMetrics) -> bool:
    """Whether the server was too busy to answer, or to be reached."""
    return metrics.transport_error or metrics.http_status_code in _OVERLOADED


def _succeeded(metrics: ServerMetrics) -> bool:
    return metrics.http_status_code is not None and 200 <= metrics.http_status_code < 300
