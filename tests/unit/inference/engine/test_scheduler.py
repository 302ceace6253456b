from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.foundation.clock import ManualClock
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.network import PrefillRow
from homefire.inference.engine.prefix_cache import PrefixCache
from homefire.inference.engine.protocol import (
    Failed,
    Prefilled,
    PromptScoring,
    Sampled,
    Sampling,
    SequenceRequest,
    Started,
    Stragglers,
    Swapped,
    WeightSet,
)
from homefire.inference.engine.scheduler import Scheduler, SchedulerLimits
from homefire.wire.completions import FinishReason
from homefire.wire.errors import (
    DigestMismatch,
    EngineFailed,
    FailedPrecondition,
    HotLoadFailed,
    InvalidArgument,
)
from unit.inference.canaries import GREEDY, canary_set
from unit.inference.scheduler_bench import Bench, deliver, tokens_of


def request(*prompt: int, new: int = 4, **options: Any) -> SequenceRequest:
    return SequenceRequest(prompt or (1, 2), new, **{"sampling": GREEDY, **options})


class Spy(BigramNetwork):
    """Records what the scheduler asks of the network."""

    def __init__(self, directory: Any) -> None:
        super().__init__(directory, max_context_length=1 << 20)
        self.prefills: list[list[PrefillRow]] = []
        self.decodes: list[int] = []
        self.moves: list[tuple[int, int]] = []
        self.break_next = False

    def prefill(self, rows: Any, plan: Any, uniforms: Any) -> Any:
        self.prefills.append(list(rows))
        return super().prefill(rows, plan, uniforms)

    def decode(self, tokens: Any, plan: Any, uniforms: Any, adapters: Any) -> Any:
        if self.break_next:
            self.break_next = False
            raise MemoryError("out of memory")
        self.decodes.append(len(tokens))
        return super().decode(tokens, plan, uniforms, adapters)

    def move(self, *, source: int, destination: int) -> None:
        self.moves.append((source, destination))
        super().move(source=source, destination=destination)


@pytest.fixture
def spy(tiny_directory: Any) -> Spy:
    return Spy(tiny_directory)


def swap(bench: Any, weights: WeightSet, *, timeout_s: float = 90.0) -> Future[Swapped]:
    done: Future[Swapped] = Future()
    bench.scheduler.begin_swap(weights, drain_timeout_s=timeout_s, done=done)
    return done


def test_a_generation_is_started_prefilled_and_sampled_to_its_length(make_bench: Any) -> None:
    bench = make_bench()
    _, recorder = bench.submit(request(new=3))
    bench.run()
    assert [type(update) for update in recorder.updates[:2]] == [Started, Prefilled]
    assert len(tokens_of(recorder)) == 3
    assert recorder.of(Sampled)[-1].finish is FinishReason.LENGTH
    assert recorder.of(Started)[0].weights.identity is None


def test_a_stop_token_ends_the_sequence_and_is_among_its_tokens(make_bench: Any) -> None:
    bench = make_bench()
    bench.scheduler._network.install(canary_set(9))
    _, recorder = bench.submit(request(new=50, stop_token_ids=frozenset({9})))
    bench.run()
    assert tokens_of(recorder) == [9]
    assert recorder.of(Sampled)[-1].finish is FinishReason.STOP


def test_no_more_sequences_run_than_there_are_slots_and_the_others_follow(make_bench: Any) -> None:
    bench = make_bench(max_running=3)
    recorders = [bench.submit(request(new=2 + i % 3))[1] for i in range(8)]
    most = 0
    while not bench.scheduler.is_idle:
        bench.step()
        most = max(most, bench.scheduler.num_running)
    assert most <= 3
    assert [len(tokens_of(r)) for r in recorders] == [2 + i % 3 for i in range(8)]


def test_slots_stay_packed_and_only_living_sequences_are_moved(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy)
    for new in (2, 9, 2, 9, 2):
        bench.submit(request(new=new))
    bench.run()
    assert spy.decodes[0] == 5
    assert spy.decodes[1] == 2
    assert spy.moves == [(3, 0)]


def test_equal_prompts_of_one_admission_are_prefilled_once(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy)
    _, group = bench.submit(*[request(5, 6, 7) for _ in range(4)])
    _, other = bench.submit(request(8))
    bench.run()
    assert [(row.tokens, row.slots) for row in spy.prefills[0]] == [
        ((8,), (4,)),
        ((5, 6, 7), (0, 1, 2, 3)),
    ]
    assert [update.num_cached_tokens for update in group.of(Prefilled)] == [0, 3, 3, 3]
    assert other.of(Prefilled)[0].num_cached_tokens == 0


def test_a_pass_over_prompts_keeps_to_its_token_budget(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy, prefill_tokens=64)
    recorders = [bench.submit(request(*range(200), new=1))[1]]
    recorders += [bench.submit(request(*range(i, i + 20), new=1))[1] for i in range(1, 8)]
    bench.run()
    computed = [sum(row.num_computed for row in rows) for rows in spy.prefills]
    assert max(computed) <= 64
    assert sum(computed) == 200 + 7 * 20
    assert [len(tokens_of(recorder)) for recorder in recorders] == [1] * 8


def test_a_long_prompt_neither_stalls_who_runs_nor_who_comes_after_it(make_bench: Any) -> None:
    bench = make_bench(prefill_tokens=64)
    _, running = bench.submit(request(1, new=100))
    bench.step()
    _, long = bench.submit(request(*[i % 300 for i in range(1000)], new=1))
    _, short = bench.submit(request(5, 6, new=1))
    for step in range(1, 16):
        bench.step()
        assert len(tokens_of(running)) == 2 + step
        assert len(tokens_of(short)) == 1
    assert long.updates == []
    bench.run()
    assert [type(update) for update in long.updates] == [Started, Prefilled, Sampled]


def test_the_second_of_two_long_prompts_waits_while_short_ones_pass_it(
    make_bench: Any, spy: Spy
) -> None:
    bench = make_bench(spy, prefill_tokens=64)
    first = bench.submit(request(*[7] * 300, new=1))[1]
    second = bench.submit(request(*[8] * 300, new=1))[1]
    short = bench.submit(request(9, new=1))[1]
    bench.step()
    assert short.of(Sampled) != []
    while not first.updates:
        bench.step()
    assert second.updates == []
    bench.run()
    assert len(tokens_of(second)) == 1


def test_samples_that_come_while_their_long_prompt_is_computed_share_it(
    make_bench: Any, spy: Spy
) -> None:
    bench = make_bench(spy, prefill_tokens=64)
    prompt = [i % 300 for i in range(500)]
    recorders = [bench.submit(request(*prompt, new=2))[1] for _ in range(2)]
    bench.step()
    recorders += [bench.submit(request(*prompt, new=2))[1] for _ in range(2)]
    bench.run()
    assert sum(row.num_computed for rows in spy.prefills for row in rows) == 500
    cached = [recorder.of(Prefilled)[0].num_cached_tokens for recorder in recorders]
    assert cached == [0, 500, 500, 500]


def test_a_client_that_leaves_during_its_prefill_frees_it_at_once(
    make_bench: Any, spy: Spy
) -> None:
    bench = make_bench(spy, prefill_tokens=64, max_running=1)
    generation, gone = bench.submit(request(*[7] * 1000, new=5))
    _, other = bench.submit(request(1, new=1))
    bench.step()
    bench.step()
    assert bench.scheduler.num_running == 1
    bench.scheduler.cancel(generation)
    assert bench.scheduler.num_running == 0
    bench.step()
    assert len(tokens_of(other)) == 1
    bench.run()
    assert gone.updates == []
    assert sum(row.num_computed for rows in spy.prefills for row in rows) == 2 * 64 + 1


def test_a_swap_waits_for_a_prompt_that_is_half_computed(make_bench: Any) -> None:
    bench = make_bench(prefill_tokens=64)
    _, old = bench.submit(request(*[7] * 200, new=1))
    bench.step()
    done = swap(bench, canary_set(9))
    _, new = bench.submit(request(1, new=1))
    bench.run()
    assert done.result().apply_ms >= 0
    assert old.of(Started)[0].weights.identity is None
    assert tokens_of(new) == [9]


def test_a_broken_pass_ends_a_prompt_that_is_half_computed(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy, prefill_tokens=64)
    _, recorder = bench.submit(request(*[7] * 200, new=1))
    bench.step()
    deliver(bench.scheduler.recover(EngineFailed("the engine failed")))
    assert [type(update) for update in recorder.updates] == [Failed]
    assert bench.scheduler.is_idle
    _, again = bench.submit(request(*[7] * 200, new=1))
    bench.run()
    assert again.of(Prefilled)[0].num_cached_tokens == 0


# the prefix cache ----------------------------------------------------------------------------


def cached(recorder: Any) -> int:
    return recorder.of(Prefilled)[0].num_cached_tokens


def ask(bench: Any, *prompt: int, **options: Any) -> Any:
    _, recorder = bench.submit(request(*prompt, **options))
    bench.run()
    return recorder


def test_a_prompt_seen_before_is_not_computed_again(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy)
    prompt = range(100)
    assert [cached(ask(bench, *prompt)) for _ in range(3)] == [0, 96, 96]
    assert cached(ask(bench, *range(96))) == 95, "the last token is computed: something follows it"
    assert cached(ask(bench, 1, *prompt)) == 0


def test_a_later_turn_goes_on_from_the_answer_before_it(make_bench: Any) -> None:
    bench = make_bench()
    first = ask(bench, *range(40), new=60)
    dialogue = [*range(40), *tokens_of(first)]
    assert len(dialogue) == 100
    assert cached(ask(bench, *dialogue, 5, 6, 7)) == 96


def test_prompts_that_begin_alike_compute_the_beginning_once(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy)
    instructions = range(160)
    for i in range(5):
        bench.submit(request(*instructions, 200 + i, 7, 8))
    bench.run()
    assert sum(row.num_computed for rows in spy.prefills for row in rows) == 163 + 4 * 3


def test_a_scored_prompt_takes_from_the_cache_only_what_comes_before_its_scores(
    make_bench: Any,
) -> None:
    bench = make_bench()
    prompt = [*range(100)]
    plain = ask(bench, *prompt, scoring=PromptScoring(60))
    again = ask(bench, *prompt, scoring=PromptScoring(60))
    assert (cached(plain), cached(again)) == (0, 59)
    assert again.of(Prefilled)[0].logprobs == plain.of(Prefilled)[0].logprobs
    assert cached(ask(bench, *prompt, scoring=PromptScoring(0))) == 0


def test_prompts_of_other_weights_are_never_found(make_bench: Any) -> None:
    bench = make_bench()
    prompt = [*range(100)]
    ask(bench, *prompt)
    for weights in (canary_set(9), canary_set(8)):
        swap(bench, weights)
        bench.run()
        assert cached(ask(bench, *prompt)) == 0
        assert cached(ask(bench, *prompt)) == 96


def test_a_cache_that_forgot_whose_weights_a_block_has_would_be_seen(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: prompts are looked up whatever the weights."""
    look_up = PrefixCache.lookup
    monkeypatch.setattr(PrefixCache, "lookup", lambda cache, _, tokens: look_up(cache, "", tokens))
    bench = make_bench()
    ask(bench, *range(100))
    done: Future[Swapped] = Future()
    bench.scheduler.begin_swap(
        canary_set(9), drain_timeout_s=1.0, done=done, reset_prompt_cache=False
    )
    bench.run()
    with pytest.raises(AssertionError, match="other weights"):
        ask(bench, *range(100))


@pytest.mark.parametrize(("reset", "found"), [(True, 0), (False, 96)])
def test_a_swap_frees_the_cache_or_keeps_it_for_the_weights_it_belongs_to(
    make_bench: Any, reset: bool, found: int
) -> None:
    bench = make_bench()
    base = bench.scheduler.serving
    ask(bench, *range(100))
    for weights in (canary_set(9), base):
        done: Future[Swapped] = Future()
        bench.scheduler.begin_swap(
            bench.scheduler._network.base_weights() if weights is base else weights,
            drain_timeout_s=1.0,
            done=done,
            reset_prompt_cache=reset,
        )
        bench.run()
        done.result()
    assert cached(ask(bench, *range(100))) == found


def test_the_cache_keeps_to_its_blocks_and_forgets_the_longest_unused(
    make_bench: Any, tiny_directory: Any
) -> None:
    network = BigramNetwork(tiny_directory, max_context_length=1 << 20, num_blocks=10)
    bench = make_bench(network)
    for first in (1, 2, 1, 3):  # four blocks each
        ask(bench, *[first] * 64, new=1)
    assert cached(ask(bench, *[1] * 64, new=1)) == 63
    assert cached(ask(bench, *[2] * 64, new=1)) < 63
    assert len(network._blocks) <= 10


def test_a_prompt_larger_than_the_cache_is_computed_whole(
    make_bench: Any, tiny_directory: Any
) -> None:
    network = BigramNetwork(tiny_directory, max_context_length=1 << 20, num_blocks=3)
    bench = make_bench(network, prefill_tokens=32)
    recorder = ask(bench, *range(200), new=2)
    assert len(tokens_of(recorder)) == 2


def test_a_network_that_keeps_nothing_serves_all_the_same(
    make_bench: Any, tiny_directory: Any
) -> None:
    network = BigramNetwork(tiny_directory, max_context_length=1 << 20, num_blocks=0)
    bench = make_bench(network, prefill_tokens=32)
    assert [cached(ask(bench, *range(200), new=2)) for _ in range(2)] == [0, 0]


@given(data=st.data())
def test_whatever_comes_and_goes_every_sequence_ends_and_every_block_is_right(
    tiny_directory: Any, data: st.DataObject
) -> None:
    """The fake network checks each block it is handed, every token is the one of the weights that it names,
    and what is pinned must be given back."""
    num_blocks = data.draw(st.sampled_from([0, 2, 7, 40]))
    network = BigramNetwork(
        tiny_directory, max_context_length=1 << 20, num_blocks=num_blocks, block_tokens=4
    )
    limits = SchedulerLimits(max_running=3, prefill_tokens=data.draw(st.sampled_from([3, 8, 50])))
    clock = ManualClock()
    scheduler = Scheduler(network, network.base_weights(), limits=limits, clock=clock)
    bench = Bench(scheduler, clock)
    live: list[Any] = []
    for action in data.draw(st.lists(st.sampled_from("sssncwi"), max_size=12)):
        if action == "s":
            prompt = [data.draw(st.integers(0, 1))] * data.draw(st.integers(1, 30))
            count = data.draw(st.integers(1, 3))
            live.append(bench.submit(*[request(*prompt, new=3)] * count))
        elif action == "c" and live:
            generation, _ = live.pop()
            scheduler.cancel(generation)
        elif action in "wi" and scheduler._swaps.pending is None:
            done: Future[Swapped] = Future()
            scheduler.begin_swap(
                canary_set(data.draw(st.integers(2, 4))),
                drain_timeout_s=1e9 if action == "w" else 0.0,
                done=done,
                stragglers=Stragglers.GO_ON,
                reset_prompt_cache=data.draw(st.booleans()),
            )
        else:
            bench.step()
    bench.run()
    assert all(recorder.of(Failed) == [] for _, recorder in live)
    assert all(
        [update.finish for update in recorder.of(Sampled)].count(FinishReason.LENGTH)
        == len({update.index for update in recorder.of(Sampled)})
        for _, recorder in live
    )
    assert all(
        update.weights.name in ("base", f"canary-{token}")
        for _, recorder in live
        for update in recorder.of(Sampled)
        for token in update.tokens
    )
    cache = scheduler._prefills._cache
    cache.evict_idle()
    assert cache.num_used == 0


def test_nothing_is_generated_when_nothing_is_asked(make_bench: Any) -> None:
    bench = make_bench()
    _, recorder = bench.submit(request(1, 2, 3, new=0, scoring=PromptScoring(0)))
    bench.run()
    assert recorder.of(Prefilled)[0].logprobs[0] == 0.0
    assert len(recorder.of(Prefilled)[0].logprobs) == 3
    assert recorder.of(Sampled)[-1].tokens == []
    assert recorder.of(Sampled)[-1].finish is FinishReason.LENGTH


def test_cancelling_frees_the_slots_and_ends_the_updates(make_bench: Any) -> None:
    bench = make_bench(max_running=2)
    generation, cancelled = bench.submit(request(new=1000), request(new=1000), request(new=1000))
    _, waiting = bench.submit(request(new=2))
    bench.step()
    assert bench.scheduler.num_running == 2
    seen = len(cancelled.updates)
    bench.scheduler.cancel(generation)
    assert bench.scheduler.num_running == 0
    bench.run()
    assert len(cancelled.updates) == seen
    assert len(tokens_of(waiting)) == 2


def test_a_generation_cancelled_while_it_waits_never_starts(make_bench: Any) -> None:
    bench = make_bench()
    generation, recorder = bench.submit(request())
    bench.scheduler.cancel(generation)
    assert bench.scheduler.num_queued == 0
    bench.run()
    assert recorder.updates == []


def test_seeded_draws_do_not_depend_on_the_company(make_bench: Any) -> None:
    def draw(company: int) -> list[int]:
        bench = make_bench(max_running=4)
        for i in range(company):
            bench.submit(request(i, new=3 + i, sampling=Sampling()))
        _, recorder = bench.submit(request(3, 4, new=20, sampling=Sampling(), seed=11))
        bench.run()
        return tokens_of(recorder)

    assert draw(0) == draw(7)
    assert len(set(draw(0))) > 1


def test_unseeded_draws_differ(make_bench: Any) -> None:
    bench = make_bench()
    _, recorder = bench.submit(*[request(1, new=16, sampling=Sampling()) for _ in range(2)])
    bench.run()
    assert tokens_of(recorder, 0) != tokens_of(recorder, 1)


def test_tokens_are_handed_over_together_but_not_late(make_bench: Any) -> None:
    bench = make_bench(delivery_interval_s=1.0)
    _, recorder = bench.submit(request(new=1000))
    for _ in range(8):
        bench.step(0.125)
    assert recorder.updates == []
    bench.step(0.125)
    assert [len(update.tokens) for update in recorder.of(Sampled)] == [10]


# swapping weights ----------------------------------------------------------------------------


def test_a_swap_waits_for_what_runs_and_new_sequences_wait_for_the_swap(make_bench: Any) -> None:
    bench = make_bench()
    _, old = bench.submit(request(new=5))
    bench.step()
    done = swap(bench, canary_set(7))
    _, new = bench.submit(request(new=2))
    bench.step()
    assert not done.done()
    assert new.updates == []
    bench.run()
    assert done.result().drain_ms >= 0
    assert old.of(Started)[0].weights.identity is None
    assert new.of(Started)[0].weights.identity == "canary-7"
    assert tokens_of(new) == [7, 7]
    assert 7 not in tokens_of(old)


def test_a_generation_ends_on_the_weights_that_it_began_on(make_bench: Any) -> None:
    """Four sequences, one slot: three of them still wait when the swap comes."""
    bench = make_bench(max_running=1)
    bench.scheduler._network.install(canary_set(3))
    _, group = bench.submit(*[request(new=2) for _ in range(4)])
    bench.step()
    swap(bench, canary_set(5))
    bench.run()
    assert tokens_of(group) == [3] * 8
    assert bench.scheduler.serving.served.identity == "canary-5"


def test_waiting_for_a_swap_is_not_queue_time(make_bench: Any) -> None:
    bench = make_bench()
    bench.submit(request(new=6))
    bench.step()
    swap(bench, canary_set(7))
    bench.clock.advance(2.0)
    _, recorder = bench.submit(request(new=1))
    bench.run(seconds=1.0)
    started = recorder.of(Started)[0]
    assert started.weight_swap_wait_s == pytest.approx(5.0)
    assert started.prefill_queue_s == pytest.approx(0.0)


def test_waiting_for_a_slot_is_queue_time(make_bench: Any) -> None:
    bench = make_bench(max_running=1)
    bench.submit(request(new=3))
    _, recorder = bench.submit(request(new=1))
    bench.run(seconds=1.0)
    started = recorder.of(Started)[0]
    assert started.prefill_queue_s == pytest.approx(3.0)
    assert started.weight_swap_wait_s == 0.0


def test_a_drain_that_takes_too_long_fails_the_load_and_nothing_else(make_bench: Any) -> None:
    bench = make_bench()
    _, long = bench.submit(request(new=50))
    bench.step()
    done = swap(bench, canary_set(7), timeout_s=10.0)
    _, waiting = bench.submit(request(new=1))
    bench.step(9.0)
    assert not done.done()
    bench.step(2.0)
    assert isinstance(done.exception(), HotLoadFailed)
    assert "canary-7" in str(done.exception())
    bench.run()
    assert len(tokens_of(long)) == 50
    assert waiting.of(Started)[0].weights.identity is None


def test_weights_with_another_digest_than_promised_are_taken_back(make_bench: Any) -> None:
    bench = make_bench()
    swap(bench, canary_set(3))
    bench.run()
    lying = WeightSet(canary_set(5).served, canary_set(4).kind, canary_set(4).tensors)
    done = swap(bench, lying)
    bench.run()
    assert isinstance(done.exception(), DigestMismatch)
    _, recorder = bench.submit(request(new=2))
    bench.run()
    assert tokens_of(recorder) == [3, 3]
    assert recorder.of(Started)[0].weights == canary_set(3).served


def test_weights_of_another_model_are_refused_untouched(make_bench: Any) -> None:
    bench = make_bench()
    done = swap(bench, canary_set(5, vocab_size=16))
    bench.run()
    assert isinstance(done.exception(), InvalidArgument)
    assert bench.scheduler.serving.served.identity is None


def test_back_to_the_base_after_a_snapshot(make_bench: Any) -> None:
    bench = make_bench()
    _, before = bench.submit(request(new=5))
    bench.run()
    for weights in (canary_set(3), bench.scheduler._network.base_weights()):
        done = swap(bench, weights)
        bench.run()
        done.result()
    _, after = bench.submit(request(new=5))
    bench.run()
    assert tokens_of(after) == tokens_of(before)


def test_a_second_swap_during_one_is_refused(make_bench: Any) -> None:
    bench = make_bench()
    swap(bench, canary_set(3))
    second = swap(bench, canary_set(4))
    assert isinstance(second.exception(), FailedPrecondition)


# failures ------------------------------------------------------------------------------------


def test_a_step_that_breaks_fails_its_batch_and_the_others_go_on(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy, max_running=2)
    _, first = bench.submit(request(new=9), request(new=9))
    _, second = bench.submit(request(new=3))
    spy.break_next = True
    with pytest.raises(MemoryError):
        bench.scheduler.step()
    deliver(bench.scheduler.recover(EngineFailed("out of memory")))
    assert [type(u) for u in first.updates].count(Failed) == 1
    bench.run()
    assert len(tokens_of(second)) == 3


def test_a_swap_that_breaks_half_way_puts_the_old_weights_back(make_bench: Any, spy: Spy) -> None:
    bench = make_bench(spy)
    swap(bench, canary_set(3))
    bench.run()
    real = spy.install

    def break_half_way(weights: WeightSet) -> str:
        real(weights)
        if weights.served.identity == "canary-5":
            raise RuntimeError("the disk is gone")
        return real(weights)

    spy.install = break_half_way
    done = swap(bench, canary_set(5))
    with pytest.raises(RuntimeError):
        bench.scheduler.step()
    bench.scheduler.recover(EngineFailed("the disk is gone"))
    assert isinstance(done.exception(), EngineFailed)
    _, recorder = bench.submit(request(new=2))
    bench.run()
    assert tokens_of(recorder) == [3, 3]


def test_ending_fails_everything_that_is_left(make_bench: Any) -> None:
    bench = make_bench(max_running=1)
    _, running = bench.submit(request(new=100), request(new=100))
    _, waiting = bench.submit(request())
    bench.step()
    done = swap(bench, canary_set(1))
    deliver(bench.scheduler.fail_all(EngineFailed("stopping")))
    assert [len(r.of(Failed)) for r in (running, waiting)] == [1, 1]
    assert isinstance(done.exception(), EngineFailed)
