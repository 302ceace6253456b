"""The order of one model's requests: strictly by `seq_id`, whatever order they arrive in. Pure.

Clients send the chunks of one call out of order (the first one last) and wait for each to be
accepted, so an early arrival is held, never refused. A number that never comes is given up after a
while, together with what was held behind it.
"""

from __future__ import annotations

import msgspec

FIRST_SEQ = 1


class SequenceOrder(msgspec.Struct):
    """Invariant: every number in `held` is greater than `next`."""

    next: int = FIRST_SEQ
    """The number that may run next."""
    held: dict[int, str] = {}
    """Arrived early: seq -> request id."""

    def arrive(self, seq: int, request_id: str) -> list[str]:
        """The requests that may run now, in order: empty while `seq` is early.

        `seq` must not have arrived before and must not lie behind `next`.
        """
        if seq < self.next or seq in self.held:
            raise ValueError(f"seq {seq} arrived before")
        self.held[seq] = request_id
        ready: list[str] = []
        while self.next in self.held:
            ready.append(self.held.pop(self.next))
            self.next += 1
        return ready

    @property
    def missing(self) -> int | None:
        """The number that held requests wait for; None when nothing is held."""
        return self.next if self.held else None

    def give_up(self) -> list[str]:
        """Stops waiting: everything held, in order. What is missing will never run."""
        released = [self.held[seq] for seq in sorted(self.held)]
        self.next = max(self.held, default=self.next - 1) + 1
        self.held.clear()
        return released
