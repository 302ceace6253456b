"""Weights that change under running sequences: every token names the weights that drew it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from homefire.checkpoints.canary import canary_tokens
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.protocol import (
    Failed,
    Sampled,
    SequenceRequest,
    Started,
    Stragglers,
    Swapped,
    WeightSet,
)
from homefire.wire.errors import (
    CanaryMismatch,
    FailedPrecondition,
    HotLoadFailed,
    WeightsMismatch,
)
from homefire.wire.internal import CanaryVerdict
from unit.inference.canaries import GREEDY, canary_adapter, canary_of, canary_set
from unit.inference.scheduler_bench import Recorder, tokens_of


def request(*prompt: int, new: int = 6) -> SequenceRequest:
    return SequenceRequest(prompt or (1, 2), new, GREEDY)


def swap_in_place(
    bench: Any, weights: WeightSet, *, after_s: float = 0.0, **options: Any
) -> Future[Swapped]:
    done: Future[Swapped] = Future()
    bench.scheduler.begin_swap(
        weights, drain_timeout_s=after_s, done=done, stragglers=Stragglers.GO_ON, **options
    )
    return done


def labels(recorder: Recorder) -> list[tuple[int, str]]:
    """Each token with the name of its weights."""
    return [
        (token, update.weights.name) for update in recorder.of(Sampled) for token in update.tokens
    ]


def test_what_runs_goes_on_between_two_tokens_and_each_names_its_weights(make_bench: Any) -> None:
    bench = make_bench()
    swap_in_place(bench, canary_set(3))
    bench.run()
    _, recorder = bench.submit(request(new=5))
    bench.step()
    bench.step()
    swapped = swap_in_place(bench, canary_set(4))
    bench.run()
    assert labels(recorder) == [(3, "canary-3")] * 3 + [(4, "canary-4")] * 2
    assert swapped.result().num_stragglers == 1
    (started,) = recorder.of(Started)
    assert started.weights.name == "canary-3"


def test_tokens_that_wait_to_be_told_keep_the_name_of_the_weights_that_drew_them(
    make_bench: Any,
) -> None:
    bench = make_bench(delivery_interval_s=1e9)
    swap_in_place(bench, canary_set(3))
    bench.run()
    _, recorder = bench.submit(request(new=9))
    for token in (4, 5):
        bench.step()
        bench.step()
        swap_in_place(bench, canary_set(token))
    bench.run()
    assert {(token, f"canary-{token}") for token, _ in labels(recorder)} == set(labels(recorder))
    assert [token for token, _ in labels(recorder)][::4] == [3, 4, 5]


def test_a_bounded_drain_waits_first_and_counts_who_went_on(make_bench: Any) -> None:
    bench = make_bench()
    _, short = bench.submit(request(new=2))
    _, long = bench.submit(request(new=12))
    bench.step()
    swapped = swap_in_place(bench, canary_set(4), after_s=5.0)
    bench.run(seconds=1.0)
    assert {name for _, name in labels(short)} == {"base"}
    assert [name for _, name in labels(long)].count("canary-4") == 12 - 6
    assert swapped.result().num_stragglers == 1


def test_a_strict_drain_fails_the_swap_instead(make_bench: Any) -> None:
    bench = make_bench()
    _, recorder = bench.submit(request(new=12))
    bench.step()
    done: Future[Swapped] = Future()
    bench.scheduler.begin_swap(canary_set(4), drain_timeout_s=5.0, done=done)
    bench.run(seconds=1.0)
    assert {name for _, name in labels(recorder)} == {"base"}
    with pytest.raises(HotLoadFailed, match="1 sequences still ran"):
        done.result()


def test_who_insists_on_weights_fails_rather_than_going_on_under_others(make_bench: Any) -> None:
    bench = make_bench()
    _, insisting = bench.submit(request(), weights=bench.scheduler.serving.served)
    _, other = bench.submit(request())
    bench.step()
    swap_in_place(bench, canary_set(4))
    bench.run()
    (failed,) = insisting.of(Failed)
    assert isinstance(failed.error, WeightsMismatch)
    assert {name for _, name in labels(insisting)} == {"base"}
    assert len(tokens_of(other)) == 6


def test_a_prompt_that_is_half_computed_begins_again(make_bench: Any) -> None:
    """Its blocks under both versions stay apart: the fake network checks what each was computed with."""
    bench = make_bench(prefill_tokens=32)
    prompt = tuple(range(100))
    _, recorder = bench.submit(request(*prompt, new=2))
    bench.step()
    swap_in_place(bench, canary_set(4), reset_prompt_cache=False)
    bench.run()
    assert labels(recorder) == [(4, "canary-4")] * 2
    _, again = bench.submit(request(*prompt, new=2))
    bench.run()
    assert labels(again) == [(4, "canary-4")] * 2


def test_what_was_cached_under_two_versions_is_kept_for_nobody(make_bench: Any) -> None:
    bench = make_bench()
    _, recorder = bench.submit(request(*range(16), new=40))
    for _ in range(20):
        bench.step()
    swap_in_place(bench, canary_set(4), reset_prompt_cache=False)
    bench.run()
    turn = (*range(16), *tokens_of(recorder))
    _, later = bench.submit(request(*turn, new=1))
    bench.run()
    assert labels(later) == [(4, "canary-4")]


def test_no_base_is_replaced_below_adapters_that_run(make_bench: Any) -> None:
    bench = make_bench()
    adapter = canary_adapter(5)
    bench.load(adapter).result()
    _, recorder = bench.submit(request(), weights=adapter.served)
    bench.step()
    refused = swap_in_place(bench, canary_set(4))
    bench.run()
    with pytest.raises(FailedPrecondition, match="running adapters"):
        refused.result()
    assert tokens_of(recorder) == [5] * 6


class Faulty(BigramNetwork):
    """Reports the digest that it was given and answers as before: what only the canary can see."""

    def install(self, weights: WeightSet) -> str:
        return weights.served.digest


def test_a_wrong_answer_in_place_keeps_the_old_weights_and_their_names(
    make_bench: Any, tiny_directory: Any
) -> None:
    bench = make_bench(Faulty(tiny_directory, max_context_length=4096))
    _, recorder = bench.submit(request())
    bench.step()
    done = swap_in_place(bench, canary_set(4, canary=canary_of(4, parent=None)))
    bench.run()
    with pytest.raises(CanaryMismatch, match="'canary-4'"):
        done.result()
    assert {name for _, name in labels(recorder)} == {"base"}
    assert bench.scheduler.serving.served.identity is None


@pytest.mark.parametrize(
    ("parent", "verdict"),
    [(canary_tokens(320, 32)[1], CanaryVerdict.PASS), (4, CanaryVerdict.INCONCLUSIVE)],
)
def test_the_canary_of_right_weights_passes_beside_what_runs(
    make_bench: Any, parent: int, verdict: CanaryVerdict
) -> None:
    bench = make_bench()
    _, recorder = bench.submit(request())
    bench.step()
    done = swap_in_place(bench, canary_set(4, canary=canary_of(4, parent=parent)))
    bench.run()
    assert done.result().canary is verdict
    assert len(tokens_of(recorder)) == 6


class Slow(BigramNetwork):
    """Takes three seconds to install weights."""

    clock: Any = None

    def install(self, weights: WeightSet) -> str:
        self.clock.advance(3.0)
        return super().install(weights)


def test_the_time_of_a_swap_in_place_is_not_queue_time(
    make_bench: Any, tiny_directory: Any
) -> None:
    network = Slow(tiny_directory, max_context_length=4096)
    bench = make_bench(network)
    network.clock = bench.clock
    bench.submit(request())
    bench.step()
    swap_in_place(bench, canary_set(4))
    _, late = bench.submit(request())
    bench.run()
    (started,) = late.of(Started)
    assert started.weights.name == "canary-4"
    assert (started.prefill_queue_s, started.weight_swap_wait_s) == (0.0, 3.0)
