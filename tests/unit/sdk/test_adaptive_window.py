"""The adaptive window against a simulated server: what it converges to, and what it must not do."""

from __future__ import annotations

from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.sdk import AdaptiveConcurrencyController, ServerMetrics
from homefire.sdk.adaptive_window import AdaptiveWindow, WindowRule
from unit.sdk.simulated_server import Server, Simulation, StepOutcome

STEP_SIZE = 256
WARM_UP_STEPS = 60
SHORT = [Server(2, 0.02), Server(8, 0.5), Server(17, 0.1), Server(64, 0.5)]
"""Completions that take no longer than the queue time that the rule aims at (0.5 s)."""
LONG = [Server(8, 2.0), Server(32, 1.0), Server(64, 2.0)]


def steady_steps(server: Server, rule: WindowRule, *, seed: int, steps: int = 40):
    simulation = Simulation(server, [AdaptiveWindow(rule)], step_size=STEP_SIZE, seed=seed)
    return simulation.run(WARM_UP_STEPS + steps)[0][WARM_UP_STEPS:]


def mean_throughput(outcomes: list[StepOutcome]) -> float:
    return fmean(outcome.throughput for outcome in outcomes)


def best_fixed_throughput(server: Server, *, seed: int) -> float:
    """Of every power of two and of the number of slots itself."""
    sizes = {server.slots, *(2**power for power in range(9))}
    return max(
        mean_throughput(steady_steps(server, fixed_window(size), seed=seed, steps=8))
        for size in sizes
    )


def fixed_window(size: int) -> WindowRule:
    return WindowRule(initial_window=size, min_window=size, max_window=size)


def refused(status: int | None = 429, attempt: int = 0) -> ServerMetrics:
    return ServerMetrics.of_failure(status, attempt)


@pytest.mark.parametrize("server", SHORT, ids=str)
def test_a_step_s_throughput_is_that_of_the_best_fixed_window_and_does_not_swing(server):
    outcomes = steady_steps(server, WindowRule(), seed=1)
    mean = mean_throughput(outcomes)
    assert mean >= 0.95 * best_fixed_throughput(server, seed=1)
    assert all(0.7 * mean <= outcome.throughput <= 1.3 * mean for outcome in outcomes)


@pytest.mark.parametrize("server", LONG, ids=str)
def test_a_gentler_decrease_keeps_long_completions_busy_too(server):
    """Halving empties slots where completions take longer than the queue time that is aimed at."""
    rule = WindowRule(multiplicative_decrease=0.8)
    adaptive = mean_throughput(steady_steps(server, rule, seed=1))
    assert adaptive >= 0.95 * best_fixed_throughput(server, seed=1)


def test_halving_within_a_step_would_fail_the_bound_that_these_tests_set():
    """The newer rule on long completions: those sent before a decrease ask for the next one."""
    server = Server(slots=64, service_s=2.0)
    outcomes = steady_steps(server, WindowRule(adjustment_interval=32), seed=1)
    assert mean_throughput(outcomes) < 0.95 * best_fixed_throughput(server, seed=1)


@settings(max_examples=30)
@given(
    server=st.builds(Server, slots=st.integers(1, 300), service_s=st.floats(0.001, 60)),
    low=st.integers(1, 40),
    spread=st.integers(0, 200),
    interval=st.sampled_from([0, 1, 32]),
    seed=st.integers(0, 1000),
)
def test_the_window_and_what_is_in_flight_stay_within_their_bounds(
    server, low, spread, interval, seed
):
    rule = WindowRule(
        initial_window=low,
        min_window=low,
        max_window=low + spread,
        adjustment_interval=interval,
    )
    simulation = Simulation(server, [AdaptiveWindow(rule)], step_size=64, seed=seed)
    for outcome in simulation.run(20)[0]:
        assert low <= outcome.window <= low + spread
        assert 1 <= outcome.in_flight <= low + spread


@pytest.mark.parametrize("server", SHORT[1:], ids=str)
@pytest.mark.parametrize(("interval", "unfairness"), [(0, 2.2), (32, 1.35)])
def test_two_clients_of_one_server_end_with_like_shares(server, interval, unfairness):
    """At ends of steps alone a client with the larger window adjusts more often, and stays ahead."""
    windows = [
        AdaptiveWindow(WindowRule(initial_window=size, adjustment_interval=interval))
        for size in (1, 100)
    ]
    outcomes = Simulation(server, windows, step_size=STEP_SIZE, seed=1).run(100)
    first, second = (mean_throughput(steps[WARM_UP_STEPS:]) for steps in outcomes)
    assert 1 / unfairness <= first / second <= unfairness


def test_the_window_comes_back_after_a_slow_time():
    fast, slow = Server(slots=32, service_s=0.25), Server(slots=2, service_s=0.25)
    simulation = Simulation(fast, [AdaptiveWindow(WindowRule())], step_size=STEP_SIZE, seed=1)
    before = simulation.run(WARM_UP_STEPS)[0][-20:]
    simulation.set_server(slow)
    during = simulation.run(WARM_UP_STEPS * 2)[0][-20:]
    simulation.set_server(fast)
    after = simulation.run(WARM_UP_STEPS * 4)[0][-20:]
    assert max(outcome.window for outcome in during) < min(outcome.window for outcome in before)
    assert mean_throughput(after) == pytest.approx(mean_throughput(before), rel=0.05)


def test_refusals_of_one_burst_shrink_the_window_once():
    window = AdaptiveWindow(WindowRule(initial_window=64))
    shrunk = [window.note_refusal(refused(), now_s=5.0 + 0.01 * number) for number in range(50)]
    assert shrunk.count(True) == 1
    assert window.size == 32
    assert window.note_refusal(refused(503), now_s=6.0)
    assert window.size == 16


def test_a_server_that_stays_overloaded_or_unreachable_shrinks_the_window_faster():
    window = AdaptiveWindow(WindowRule(initial_window=64))
    window.note_refusal(refused(None, attempt=3), now_s=0.0)
    assert window.size == 16


def test_an_error_that_is_no_refusal_changes_nothing():
    window = AdaptiveWindow(WindowRule(initial_window=64))
    assert not window.note_refusal(refused(400), now_s=0.0)
    assert window.size == 64


def test_a_server_without_queue_times_is_judged_by_its_statuses():
    window = AdaptiveWindow(WindowRule(initial_window=8))
    window.note(ServerMetrics(http_status_code=200))
    window.adjust()
    assert window.size == 9
    window.note(ServerMetrics(http_status_code=200))
    window.note_refusal(refused(), now_s=0.0)
    window.adjust()
    assert window.size == 4


def test_a_burst_that_queues_halves_the_window_once_when_calm_follows():
    window = AdaptiveWindow(WindowRule(initial_window=64))
    sizes = []
    for queue_s in (0.2, 1.5, 0.1, 0.1, 0.1):
        window.note(ServerMetrics(prefill_queue_duration=queue_s))
        window.adjust()
        sizes.append(window.size)
    assert sizes[1] == 33
    assert sizes[1:] == sorted(sizes[1:])


async def test_the_controller_s_clock_spaces_the_shrinking():
    now = [0.0]
    controller = AdaptiveConcurrencyController(64, monotonic=lambda: now[0])
    await controller.acquire()
    controller.note_refusal(refused())
    controller.note_refusal(refused())
    assert (controller.window_size, controller.in_flight) == (32, 1)
    now[0] = 1.0
    controller.note_refusal(refused())
    controller.release(None)
    summary = controller.step_completed()
    assert (summary["window_after"], summary["refusals"]) == (16, 3)
