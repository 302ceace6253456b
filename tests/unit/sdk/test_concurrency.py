from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.sdk import AdaptiveConcurrencyController, FixedConcurrencyController, ServerMetrics
from homefire.sdk.gate import Gate


def queued(seconds: float) -> ServerMetrics:
    return ServerMetrics(prefill_queue_duration=seconds)


def complete(controller, *durations: float | None) -> None:
    """One completion after another, outside any window limit."""

    async def run() -> None:
        for duration in durations:
            await controller.acquire()
            controller.release(None if duration is None else queued(duration))

    asyncio.run(run())


def reference_step(window, ema, samples, *, low, high, target, increase, decrease, alpha):
    """The rule of fireworks.md §5.5, in ten lines."""
    if not samples:
        return window, ema
    average = sum(samples) / len(samples)
    ema = average if ema is None else alpha * average + (1 - alpha) * ema
    if ema > target:
        window *= decrease
    else:
        window += increase * min(target / max(ema, 0.001), 4.0)
    return min(max(window, low), high), ema


@given(
    steps=st.lists(st.lists(st.floats(0, 5), max_size=6), max_size=12),
    low=st.integers(1, 8),
    spread=st.integers(0, 60),
    target=st.floats(0.01, 2),
    decrease=st.floats(0.1, 0.9),
    alpha=st.floats(0.05, 1),
)
def test_the_window_follows_the_protocol_s_rule(steps, low, spread, target, decrease, alpha):
    controller = AdaptiveConcurrencyController(
        initial_window=low,
        min_window=low,
        max_window=low + spread,
        prefill_queue_target=target,
        multiplicative_decrease=decrease,
        ema_alpha=alpha,
    )
    window, ema = float(low), None
    for samples in steps:
        complete(controller, *samples)
        summary = controller.step_completed()
        window, ema = reference_step(
            window, ema, samples, low=low, high=low + spread, target=target, increase=1.0,
            decrease=decrease, alpha=alpha,
        )  # fmt: skip
        assert controller.window_size == int(window)
        assert controller.ema_prefill_queue == pytest.approx(ema)
        assert summary["window_after"] == controller.window_size
        assert low <= controller.window_size <= low + spread


def test_a_calm_server_grows_the_window_and_a_queueing_one_halves_it():
    controller = AdaptiveConcurrencyController(initial_window=16)
    complete(controller, 0.0)
    controller.step_completed()
    assert controller.window_size == 20
    complete(controller, 60.0)
    controller.step_completed()
    assert controller.window_size == 10


def test_a_step_without_samples_changes_nothing():
    controller = AdaptiveConcurrencyController()
    complete(controller, None, None)
    summary = controller.step_completed()
    assert controller.window_size == 16
    assert controller.ema_prefill_queue is None
    assert summary["requests"] == 2


def test_the_step_s_summary_counts_its_requests_and_starts_again():
    controller = AdaptiveConcurrencyController(initial_window=4)

    async def run() -> None:
        for cached in (0, 30):
            await controller.acquire()
            controller.release(
                ServerMetrics(
                    prefill_queue_duration=0.25, prompt_tokens=60, cached_prompt_tokens=cached
                )
            )

    asyncio.run(run())
    assert controller.step_completed() == {
        "window": 4.0,
        "requests": 2.0,
        "refusals": 0.0,
        "max_in_flight": 1.0,
        "avg_pq": 0.25,
        "window_after": 6.0,
        "cache_hit_rate": 0.25,
        "ema_pq": 0.25,
    }
    assert controller.step_completed()["requests"] == 0


def test_by_default_only_the_end_of_a_step_adjusts():
    controller = AdaptiveConcurrencyController(initial_window=16)
    complete(controller, *[0.0] * 100)
    assert controller.window_size == 16


def test_an_interval_adjusts_after_so_many_completions():
    controller = AdaptiveConcurrencyController(initial_window=16, adjustment_interval=32)
    complete(controller, *[0.0] * 31)
    assert controller.window_size == 16
    complete(controller, 0.0)
    assert controller.window_size == 20


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_window": 0}, "min_window"),
        ({"initial_window": 300}, "initial_window"),
        ({"prefill_queue_target": 0.0}, "prefill_queue_target"),
        ({"additive_increase": -1.0}, "additive_increase"),
        ({"multiplicative_decrease": 1.0}, "multiplicative_decrease"),
        ({"ema_alpha": 0.0}, "ema_alpha"),
        ({"adjustment_interval": -1}, "adjustment_interval"),
        ({"shrink_cooldown_s": -0.5}, "shrink_cooldown_s"),
    ],
)
def test_bad_parameters_are_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        AdaptiveConcurrencyController(**options)


def test_a_fixed_window_needs_at_least_one_slot():
    with pytest.raises(ValueError, match="max_concurrency"):
        FixedConcurrencyController(0)


@given(
    limit=st.integers(1, 5),
    moves=st.lists(st.sampled_from(["start", "finish", "cancel", "grow", "shrink"]), max_size=40),
)
def test_the_gate_never_lets_more_in_than_its_limit_and_never_loses_a_slot(limit, moves):
    async def run() -> None:
        gate = Gate(limit)
        room = limit
        inside: list[asyncio.Task[None]] = []
        outside: list[asyncio.Task[None]] = []
        for move in moves:
            before = gate.in_flight
            if move == "start":
                outside.append(asyncio.create_task(gate.enter()))
            elif move == "finish" and inside:
                inside.pop()
                gate.leave()
            elif move == "cancel" and outside:
                outside.pop().cancel()
            elif move in ("grow", "shrink"):
                room = max(1, room + (1 if move == "grow" else -1))
                gate.resize(room)
            for _ in range(4):
                await asyncio.sleep(0)
            inside += [task for task in outside if task.done()]
            outside = [task for task in outside if not task.done()]
            assert gate.in_flight == len(inside)
            assert gate.in_flight <= max(room, before)
            assert not outside or gate.in_flight >= room
        for task in outside:
            task.cancel()
        await asyncio.gather(*outside, return_exceptions=True)
        assert gate.in_flight == len(inside)

    asyncio.run(run())


async def test_waiting_tasks_get_their_slots_in_the_order_they_came():
    controller, order = FixedConcurrencyController(1), []

    async def work(number: int) -> None:
        await controller.acquire()
        order.append(number)
        await asyncio.sleep(0)
        controller.release()

    await asyncio.gather(*[work(number) for number in range(5)])
    assert order == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "make", [lambda: FixedConcurrencyController(2), lambda: AdaptiveConcurrencyController(2)]
)
def test_one_controller_serves_several_event_loops_one_after_another(make):
    controller, most = make(), 0

    async def step() -> None:
        running = 0

        async def work() -> None:
            nonlocal running, most
            await controller.acquire()
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1
            controller.release()

        await asyncio.gather(*[work() for _ in range(10)])

    for _ in range(3):
        asyncio.run(step())
    assert most == 2


async def test_a_task_cancelled_while_it_waits_takes_no_slot():
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    waiting = asyncio.create_task(controller.acquire())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    controller.release()
    await controller.acquire()


def test_a_release_too_many_is_an_error():
    with pytest.raises(RuntimeError, match="release"):
        FixedConcurrencyController(1).release()
