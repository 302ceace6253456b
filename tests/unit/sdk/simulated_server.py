"""Loops of steps against a server with so many slots, in virtual time: no tasks, no clocks."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

from homefire.sdk import ServerMetrics
from homefire.sdk.adaptive_window import AdaptiveWindow


@dataclass(frozen=True)
class Server:
    slots: int
    service_s: float
    """A completion's time in its slot, on average; each takes between half and one and a half."""


@dataclass(frozen=True)
class StepOutcome:
    window: int
    """When the step began."""
    in_flight: int
    """At most."""
    queue_s: float
    """On average."""
    throughput: float
    """Completions per second."""


@dataclass(frozen=True)
class _Request:
    client: int
    sent_s: float


@dataclass
class _Client:
    window: AdaptiveWindow
    to_send: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    step_began_s: float = 0.0
    window_before: int = 0
    queued_s: list[float] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)


class Simulation:
    """Clients that each run steps of `step_size` completions, one after another, on one server."""

    def __init__(self, server: Server, windows: list[AdaptiveWindow], *, step_size: int, seed: int):
        self._server = server
        self._step_size = step_size
        self._numbers = random.Random(seed)
        self._now_s = 0.0
        self._queue: deque[_Request] = deque()
        self._busy = 0
        self._ends: list[tuple[float, int, int, float]] = []
        """(time, order, client, seconds in the queue)"""
        self._order = 0
        self._clients = [_Client(window) for window in windows]

    def run(self, num_steps: int) -> list[list[StepOutcome]]:
        """Until every client ended `num_steps`; those that are faster go on meanwhile."""
        for number in range(len(self._clients)):
            self._begin_step(number)
        while any(len(client.outcomes) < num_steps for client in self._clients):
            self._now_s, _, number, queue_s = heapq.heappop(self._ends)
            self._busy -= 1
            self._serve()
            self._complete(number, queue_s)
        return [client.outcomes for client in self._clients]

    def set_server(self, server: Server) -> None:
        self._server = server

    def _begin_step(self, number: int) -> None:
        client = self._clients[number]
        client.to_send = self._step_size
        client.step_began_s, client.window_before = self._now_s, client.window.size
        client.most_in_flight, client.queued_s = 0, []
        self._send(number)

    def _send(self, number: int) -> None:
        client = self._clients[number]
        while client.to_send and client.in_flight < client.window.size:
            client.to_send -= 1
            client.in_flight += 1
            client.most_in_flight = max(client.most_in_flight, client.in_flight)
            self._queue.append(_Request(number, self._now_s))
        self._serve()

    def _serve(self) -> None:
        while self._queue and self._busy < self._server.slots:
            request = self._queue.popleft()
            self._busy += 1
            self._order += 1
            service_s = self._server.service_s * self._numbers.uniform(0.5, 1.5)
            end = (
                self._now_s + service_s,
                self._order,
                request.client,
                self._now_s - request.sent_s,
            )
            heapq.heappush(self._ends, end)

    def _complete(self, number: int, queue_s: float) -> None:
        client = self._clients[number]
        client.in_flight -= 1
        client.queued_s.append(queue_s)
        client.window.note(ServerMetrics(prefill_queue_duration=queue_s))
        if client.to_send or client.in_flight:
            self._send(number)
            return
        client.outcomes.append(
            StepOutcome(
                window=client.window_before,
                in_flight=client.most_in_flight,
                queue_s=sum(client.queued_s) / len(client.queued_s),
                throughput=self._step_size / (self._now_s - client.step_began_s),
            )
        )
        client.window.adjust()
        self._begin_step(number)
