"""Which full weights the network holds, and putting others in their place: install, verify, or restore.

pending ──drained, or out of time──▶ install ──digest and canary right──▶ serving
                                        └── anything else: the old ones are put back
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from homefire.foundation.clock import Clock
from homefire.inference.engine.network import Network
from homefire.inference.engine.proof import prove
from homefire.inference.engine.protocol import Stragglers, Swapped, WeightSet
from homefire.inference.engine.swap_gate import SwapGate
from homefire.wire.errors import (
    DigestMismatch,
    EngineFailed,
    FailedPrecondition,
    HomefireError,
    HotLoadFailed,
    UserError,
)
from homefire.wire.internal import CanaryVerdict


@dataclass
class PendingSwap:
    weights: WeightSet
    began_at: float
    deadline: float
    stragglers: Stragglers
    reset_prompt_cache: bool
    done: Future[Swapped]
    has_touched: bool = False
    """The weights in memory may be neither the old nor the new ones."""

    @property
    def name(self) -> str:
        return self.weights.served.name


class WeightSwaps:
    """Used by the engine's thread. `serving` may be read by others."""

    def __init__(self, network: Network, weights: WeightSet, clock: Clock) -> None:
        self.serving = weights
        self.gate = SwapGate()
        self.pending: PendingSwap | None = None
        self._network = network
        self._clock = clock

    def begin(
        self,
        weights: WeightSet,
        *,
        drain_timeout_s: float,
        stragglers: Stragglers,
        reset_prompt_cache: bool,
        done: Future[Swapped],
    ) -> None:
        """`done` hears how it went; from now on it cannot be cancelled."""
        if not done.set_running_or_notify_cancel():
            return
        if self.pending is not None:
            done.set_exception(FailedPrecondition("another swap of weights is under way"))
            return
        now = self._clock.monotonic()
        self.pending = PendingSwap(
            weights, now, now + drain_timeout_s, stragglers, reset_prompt_cache, done
        )
        self.gate.close(now)

    def install(self, swap: PendingSwap, *, num_stragglers: int) -> bool:
        """Whether the new weights serve now; if not, the old ones do, bit for bit."""
        drained_at = self._clock.monotonic()
        try:
            verdict = self._put_in_place(swap)
        except UserError as refusal:  # found before anything was changed
            self.finish(swap, refusal)
            return False
        except DigestMismatch as mismatch:
            self._restore()
            self.finish(swap, mismatch)
            return False
        self.serving = swap.weights
        now = self._clock.monotonic()
        self.finish(
            swap,
            Swapped(
                drain_ms=1000 * (drained_at - swap.began_at),
                apply_ms=1000 * (now - drained_at),
                canary=verdict,
                num_stragglers=num_stragglers,
            ),
        )
        return True

    def time_out(self, swap: PendingSwap, num_running: int) -> None:
        waited_s = self._clock.monotonic() - swap.began_at
        self.finish(
            swap,
            HotLoadFailed(
                f"{num_running} sequences still ran after {waited_s:.0f} s,"
                f" so {swap.name!r} was not loaded",
                hint="load it again, ask for fewer tokens, or raise drain_timeout_s",
            ),
        )

    def finish(self, swap: PendingSwap, result: Swapped | HomefireError) -> None:
        self.pending = None
        self.gate.open(self._clock.monotonic())
        if isinstance(result, Swapped):
            swap.done.set_result(result)
        else:
            swap.done.set_exception(result)

    def recover(self, error: HomefireError) -> None:
        """After a step broke, perhaps in the middle of an installation."""
        if self.pending is not None and self.pending.has_touched:
            self._restore()
            self.finish(self.pending, error)

    def fail(self, error: HomefireError) -> None:
        if self.pending is not None:
            self.finish(self.pending, error)

    def _put_in_place(self, swap: PendingSwap) -> CanaryVerdict:
        weights = swap.weights
        swap.has_touched = True
        digest = self._network.install(weights)
        if digest != weights.served.digest:
            raise DigestMismatch(
                f"{swap.name!r} should have digest {weights.served.digest[:16]}…,"
                f" the weights in memory had {digest[:16]}…",
                hint="the old weights were put back; save the snapshot again",
            )
        return prove(self._network, weights.canary, name=swap.name)

    def _restore(self) -> None:
        """The base model is not kept beside itself in memory, so it is read from disk again. When this
        fails nothing may be served any more."""
        served = self.serving.served
        old = self._network.base_weights() if served.identity is None else self.serving
        if self._network.install(old) != served.digest:
            raise EngineFailed(
                f"the weights of {served.name!r} could not be restored after a failed swap",
                hint="restart the replica",
            )
