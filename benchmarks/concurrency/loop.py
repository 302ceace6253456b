"""Clients that run their steps through the SDK, and what their controllers saw meanwhile."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shapes import Request, Shape

from homefire.sdk import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    FixedConcurrencyController,
    ServerMetrics,
)

Controller = AdaptiveConcurrencyController | FixedConcurrencyController


@dataclass(frozen=True)
class Deployment:
    url: str
    key: str
    model: str


@dataclass(frozen=True)
class Sample:
    """One completion that ended."""

    at_s: float
    """Since the measured steps began."""
    client: int
    window: int
    in_flight: int
    queue_s: float


@dataclass
class Run:
    """The measured steps of all clients."""

    samples: list[Sample] = field(default_factory=list)
    new_tokens: int = 0
    seconds: float = 0.0
    client_seconds: dict[int, float] = field(default_factory=dict)
    """Until each client had ended its steps."""

    @property
    def goodput(self) -> float:
        """New tokens per second, of all clients."""
        return self.new_tokens / self.seconds

    @property
    def unfairness(self) -> float:
        """The slowest client's seconds over the fastest one's, for the same steps."""
        return max(self.client_seconds.values()) / min(self.client_seconds.values())

    @property
    def p99_queue_s(self) -> float:
        ordered = sorted(sample.queue_s for sample in self.samples)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


class Watched:
    """A controller as it is, with every release noted."""

    def __init__(self, controller: Controller, client: int, recorder: Recorder) -> None:
        self._controller, self._client, self._recorder = controller, client, recorder
        self._in_flight = 0

    async def acquire(self) -> None:
        await self._controller.acquire()
        self._in_flight += 1

    def release(self, metrics: ServerMetrics | None = None) -> None:
        if metrics is None or metrics.prefill_queue_duration is None:
            raise RuntimeError("a completion failed: the figures would not be of this load")
        self._recorder.note(
            self._client,
            self._controller.window_size,
            self._in_flight,
            metrics.prefill_queue_duration,
        )
        self._in_flight -= 1
        self._controller.release(metrics)

    def step_completed(self) -> None:
        self._controller.step_completed()


class Recorder:
    """Begins when every client is warm."""

    def __init__(self, num_clients: int) -> None:
        self.run = Run()
        self._barrier = asyncio.Barrier(num_clients)
        self._began_s: float | None = None

    async def begin(self) -> None:
        await self._barrier.wait()
        if self._began_s is None:
            self._began_s = time.perf_counter()

    def note(self, client: int, window: int, in_flight: int, queue_s: float) -> None:
        if self._began_s is not None:
            at_s = time.perf_counter() - self._began_s
            self.run.samples.append(Sample(at_s, client, window, in_flight, queue_s))

    def end(self, client: int, new_tokens: int) -> None:
        assert self._began_s is not None
        self.run.seconds = time.perf_counter() - self._began_s
        self.run.client_seconds[client] = self.run.seconds
        self.run.new_tokens += new_tokens


def run_shape(
    deployment: Deployment,
    shape: Shape,
    make_controller: Callable[[], Controller],
    *,
    warm_up_steps: int,
    num_steps: int,
) -> Run:
    """The same requests whatever the controller; the first steps are not counted."""

    async def run() -> Run:
        recorder = Recorder(shape.num_clients)
        clients = []
        for client in range(shape.num_clients):
            steps = shape.steps(random.Random(client), warm_up_steps + num_steps)
            watched = Watched(make_controller(), client, recorder)
            clients.append(_run_client(deployment, watched, steps, warm_up_steps, recorder, client))
        await asyncio.gather(*clients)
        return recorder.run

    return asyncio.run(run())


async def _run_client(
    deployment: Deployment,
    controller: Watched,
    steps: Sequence[Sequence[Request]],
    warm_up_steps: int,
    recorder: Recorder,
    client: int,
) -> None:
    sampler = DeploymentSampler(
        inference_url=deployment.url,
        model=deployment.model,
        api_key=deployment.key,
        concurrency_controller=controller,
    )

    async def one(item: Request) -> None:
        await sampler.sample_with_prompt_tokens(
            item.prompt, max_tokens=item.max_new_tokens, ignore_eos=True
        )

    for number, step in enumerate(steps):
        if number == warm_up_steps:
            await recorder.begin()
        await asyncio.gather(*(one(item) for item in step))
        controller.step_completed()
    measured = steps[warm_up_steps:]
    recorder.end(client, sum(item.max_new_tokens for step in measured for item in step))
