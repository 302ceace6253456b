"""One function per row of the table. Every figure is a ratio of runs of the same minute.

Times are CPU seconds of this process, which computes with one thread: neighbours on the machine change
them little. Streams are timed by the clock, since two processes take part.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from contenders import Arrival, ContinuousBatching, Generate, InProcess
from floor import BareProducts
from http_streams import StreamingReplica
from model import random_prompt

PROMPT, NEW = 64, 64
ROUNDS = 3
FEW_ROUNDS = 2
"""Of the long runs."""
BATCH = 16
"""Sequences of one `generate` call in the mixed workload."""


@dataclass(frozen=True)
class Row:
    what: str
    value: float
    bar: float | None
    """None: for information."""
    is_lower_better: bool
    detail: str

    @property
    def is_met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value <= self.bar if self.is_lower_better else self.value >= self.bar


def equal_lengths(num_rows: int, *, seed: int) -> list[Arrival]:
    return [Arrival(0.0, random_prompt(PROMPT, seed + i), NEW) for i in range(num_rows)]


def batch(
    num_rows: int, bar: float, products: BareProducts, engine: InProcess, generate: Generate
) -> list[Row]:
    """Prompts are new in every round: nothing is cached. At 64 the floor holds the prefill too."""

    def floor(seed: int) -> None:
        products.decode(num_rows, NEW)
        if num_rows == 64:
            products.prefill(num_rows * PROMPT, num_rows)

    def ours(seed: int) -> None:
        engine.run(equal_lengths(num_rows, seed=seed))

    def theirs(seed: int) -> None:
        generate.run(equal_lengths(num_rows, seed=seed), batch_size=num_rows)

    candidates = {"floor": floor, "engine": ours, "generate": theirs}
    times = rounds(candidates, FEW_ROUNDS if num_rows == 64 else ROUNDS)
    rate = f"{num_rows * NEW / statistics.median(times['engine']):.0f} tokens/s"
    rows = [
        Row(f"{num_rows} sequences / floor", ratio(times, "engine", "floor"), bar, True, rate),
    ]
    gain_bar = 1.4 if num_rows == 64 else None
    gain = ratio(times, "generate", "engine")
    return [*rows, Row(f"{num_rows} sequences, gain over generate", gain, gain_bar, False, "")]


def continuous_batching(theirs: ContinuousBatching, engine: InProcess) -> Row:
    def one(seed: int) -> None:
        engine.run(equal_lengths(8, seed=seed))

    def other(seed: int) -> None:
        theirs.run(equal_lengths(8, seed=seed))

    times = rounds({"engine": one, "theirs": other})
    gain = ratio(times, "theirs", "engine")
    return Row("8 sequences, gain over transformers continuous batching", gain, None, False, "")


def mixed_lengths(engine: InProcess, generate: Generate) -> Row:
    """48 requests whose lengths have a long tail, arriving faster than they are served."""

    def workload(seed: int) -> list[Arrival]:
        draw = random.Random(seed)
        return [
            Arrival(
                0.02 * i,
                random_prompt(draw.randint(16, 128), seed + i),
                min(192, 8 + int(draw.expovariate(1 / 40))),
            )
            for i in range(3 * BATCH)
        ]

    def ours(seed: int) -> None:
        engine.run(workload(seed))

    def theirs(seed: int) -> None:
        generate.run(workload(seed), batch_size=BATCH)

    times = rounds({"engine": ours, "generate": theirs})
    return Row(
        f"mixed lengths, arrivals: gain over generate in batches of {BATCH}",
        ratio(times, "generate", "engine"),
        2.0,
        False,
        f"both run at most {BATCH} at once",
    )


def one_long_prompt(engine: InProcess, *, as_one_request: bool) -> Row:
    """16 samples of a prompt nobody has seen. Its prefill is timed with another prompt alone; decoding is
    what 16 samples of 64 tokens take beyond 16 of one token."""

    def samples(seed: int) -> list[Arrival]:
        return [Arrival(0.0, random_prompt(1024, seed), NEW)] * 16

    def prefill(seed: int) -> None:
        engine.run([Arrival(0.0, random_prompt(1024, seed + 1), 1)])

    def together(seed: int) -> None:
        cached.append(
            sum(
                u.num_cached_tokens
                for u in engine.run(samples(seed), as_one_request=as_one_request).prefilled
            )
        )

    def first_tokens(seed: int) -> None:
        prompt = random_prompt(1024, seed + 2)
        engine.run([Arrival(0.0, prompt, 1)] * 16, as_one_request=True)

    def to_the_end(seed: int) -> None:
        engine.run([Arrival(0.0, random_prompt(1024, seed + 3), NEW)] * 16, as_one_request=True)

    cached: list[int] = []
    ratios = []
    for seed in range(0, 4 * FEW_ROUNDS, 4):
        seed += 10_000 + 1000 * as_one_request
        whole, alone = elapsed(together, seed), elapsed(prefill, seed)
        decoding = elapsed(to_the_end, seed) - elapsed(first_tokens, seed)
        ratios.append(whole / (alone + decoding))
    form = "n=16" if as_one_request else "16 requests"
    least = min(cached)
    return Row(
        f"16 samples of a 1,024-token prompt, {form} / (prefill + decoding)",
        statistics.median(ratios),
        1.3,
        True,
        f"{least} of {16 * 1024} prompt tokens came from the cache",
    )


def http_streaming(replica: StreamingReplica, engine: InProcess) -> Row:
    async def measure() -> dict[str, list[float]]:
        await replica.wait()

        async def streams(seed: int) -> None:
            num_tokens = await replica.run(equal_lengths(64, seed=seed))
            assert num_tokens == 64 * NEW

        async def in_process(seed: int) -> None:
            await asyncio.to_thread(engine.run, equal_lengths(64, seed=seed))

        return await async_rounds({"http": streams, "engine": in_process})

    times = asyncio.run(measure())
    share = ratio(times, "engine", "http")
    rate = f"{64 * NEW / statistics.median(times['http']):.0f} tokens/s"
    return Row("64 HTTP streams, rate / in process", share, 0.85, False, rate)


# timing ------------------------------------------------------------------------------------------

Candidate = Callable[[int], object]


def elapsed(candidate: Candidate, seed: int) -> float:
    started = time.process_time()
    candidate(seed)
    return time.process_time() - started


def rounds(
    candidates: Mapping[str, Candidate], num_rounds: int = FEW_ROUNDS
) -> dict[str, list[float]]:
    """One after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(num_rounds):
        for name, candidate in candidates.items():
            times[name].append(elapsed(candidate, 1000 * i))
    return times


async def async_rounds(
    candidates: Mapping[str, Callable[[int], Awaitable[object]]],
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(-1, FEW_ROUNDS):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            await candidate(100_000 + 1000 * i)
            if i >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Mapping[str, list[float]], above: str, below: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
