"""Adapters beside the base model in one running batch: who is computed with what, and who may stay."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from homefire.inference.engine.adapter_table import AdapterLimits, AdapterTable
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.protocol import (
    Failed,
    Prefilled,
    PromptDraws,
    PromptScoring,
    Sampling,
    SequenceRequest,
    ServedWeights,
    Started,
)
from homefire.wire.errors import (
    CanaryMismatch,
    DigestMismatch,
    EngineFailed,
    InvalidArgument,
    WeightsMismatch,
)
from homefire.wire.ids import Identity
from unit.inference.canaries import GREEDY, adapter_canary, canary_adapter, canary_set
from unit.inference.scheduler_bench import Bench, tokens_of

A, B, C = (canary_adapter(token) for token in (11, 22, 33))


def request(*prompt: int, new: int = 4, **options: Any) -> SequenceRequest:
    return SequenceRequest(prompt or (1, 2), new, **{"sampling": GREEDY, **options})


def limited(make_bench: Any, **limits: Any) -> Bench:
    return make_bench(adapters=AdapterLimits(**limits))


def test_one_batch_mixes_the_base_and_two_adapters(make_bench: Any) -> None:
    bench = make_bench()
    for weights in (A, B):
        bench.load(weights).result()
    _, alone = bench.submit(request(new=8))
    bench.run()
    asked = [None, A.served, B.served, None, B.served, A.served]
    recorders = [
        bench.submit(request(new=2 + i), weights=weights)[1] for i, weights in enumerate(asked)
    ]
    bench.step()
    assert bench.scheduler.num_running == 5
    bench.run()
    for i, (weights, recorder) in enumerate(zip(asked, recorders, strict=True)):
        canary = tokens_of(alone) if weights is None else [int(weights.name[-2:])] * 8
        assert tokens_of(recorder) == canary[: 2 + i]
        assert recorder.of(Started)[0].weights == (weights or bench.scheduler.serving.served)


def test_equal_prompts_are_shared_among_equal_weights_only(make_bench: Any) -> None:
    bench = make_bench()
    bench.load(A).result()
    _, base = bench.submit(request(), request())
    _, adapted = bench.submit(request(), request(), weights=A.served)
    bench.run()
    for recorder in (base, adapted):
        assert [update.num_cached_tokens for update in recorder.of(Prefilled)] == [0, 2]


def test_samples_without_scores_share_the_row_of_one_with_scores(make_bench: Any) -> None:
    bench = make_bench()
    scoring = PromptScoring(0, 2)
    _, recorder = bench.submit(request(scoring=scoring), request(), request())
    bench.run()
    assert [u.num_cached_tokens for u in recorder.of(Prefilled)] == [0, 2, 2]
    assert [len(u.logprobs) for u in recorder.of(Prefilled)] == [2, 0, 0]


def test_an_adapter_that_is_not_here_is_never_replaced_by_another(make_bench: Any) -> None:
    bench = make_bench()
    bench.load(A).result()
    _, recorder = bench.submit(request(), weights=B.served)
    _, other = bench.submit(request(), weights=A.served)
    bench.run()
    assert isinstance(recorder.of(Failed)[0].error, WeightsMismatch)
    assert tokens_of(recorder) == []
    assert tokens_of(other) == [11] * 4
    assert bench.scheduler.num_queued == 0


def test_the_same_name_with_another_digest_is_another_adapter(make_bench: Any) -> None:
    bench = make_bench()
    bench.load(A).result()
    _, recorder = bench.submit(request(), weights=ServedWeights(A.served.identity, "0" * 64))
    bench.run()
    assert isinstance(recorder.of(Failed)[0].error, WeightsMismatch)


def test_an_adapter_whose_memory_has_another_digest_never_serves(make_bench: Any) -> None:
    bench = make_bench()
    lying = replace(A, tensors=B.tensors)
    assert isinstance(bench.load(lying).exception(), DigestMismatch)
    assert A.served not in bench.scheduler.adapters.table
    _, recorder = bench.submit(request(), weights=A.served)
    bench.run()
    assert isinstance(recorder.of(Failed)[0].error, WeightsMismatch)


def test_an_adapter_of_another_model_is_refused(make_bench: Any) -> None:
    bench = make_bench()
    assert isinstance(bench.load(canary_adapter(1, 16)).exception(), InvalidArgument)
    assert isinstance(bench.load(canary_set(5)).exception(), InvalidArgument)


def test_adapters_rest_while_other_full_weights_serve(make_bench: Any) -> None:
    bench = make_bench()
    bench.load(A).result()
    swapped: Future[Any] = Future()
    bench.scheduler.begin_swap(canary_set(7), drain_timeout_s=1.0, done=swapped)
    bench.run()
    _, refused = bench.submit(request(), weights=A.served)
    _, base = bench.submit(request(), weights=bench.scheduler._network.base_weights().served)
    _, full = bench.submit(request(), weights=canary_set(7).served)
    bench.run()
    assert [type(r.updates[0]) for r in (refused, base)] == [Failed, Failed]
    assert tokens_of(full) == [7] * 4
    back: Future[Any] = Future()
    bench.scheduler.begin_swap(
        bench.scheduler._network.base_weights(), drain_timeout_s=1.0, done=back
    )
    _, adapted = bench.submit(request(), weights=A.served)
    bench.run()
    assert tokens_of(adapted) == [11] * 4


def test_a_generation_keeps_its_adapter_over_a_swap_that_comes_meanwhile(make_bench: Any) -> None:
    """Four sequences, one slot: three still wait when the swap comes."""
    bench = make_bench(max_running=1)
    bench.load(A).result()
    _, group = bench.submit(*[request(new=2) for _ in range(4)], weights=A.served)
    bench.step()
    done: Future[Any] = Future()
    bench.scheduler.begin_swap(canary_set(7), drain_timeout_s=90.0, done=done)
    bench.run()
    assert tokens_of(group) == [11] * 8
    assert bench.scheduler.serving.served == canary_set(7).served


def test_cancelling_an_adapted_generation_leaves_the_others_alone(make_bench: Any) -> None:
    bench = make_bench()
    for weights in (A, B):
        bench.load(weights).result()
    cancelled, heard = bench.submit(request(new=1000), request(new=1000), weights=A.served)
    _, other = bench.submit(request(new=6), weights=B.served)
    bench.step()
    seen = len(heard.updates)
    bench.scheduler.cancel(cancelled)
    bench.run()
    assert tokens_of(other) == [22] * 6
    assert len(heard.updates) == seen


# residence -----------------------------------------------------------------------------------


def test_the_longest_idle_adapter_makes_room_and_a_held_one_never(make_bench: Any) -> None:
    bench = limited(make_bench, max_adapters=2)
    table = bench.scheduler.adapters.table
    for weights in (A, B):
        bench.load(weights).result()
    table.release(A.served)
    table.release(B.served)
    assert table.hold(A.served)
    bench.load(C).result()
    assert [weights.served in table for weights in (A, B, C)] == [True, False, True]


def test_a_load_waits_until_an_adapter_is_released(make_bench: Any) -> None:
    bench = limited(make_bench, max_adapters=1)
    bench.load(A).result()
    waiting = bench.load(B)
    assert not waiting.done()
    assert bench.scheduler.is_idle
    bench.scheduler.adapters.table.release(A.served)
    bench.step()
    assert waiting.result() is None
    assert not bench.scheduler.adapters.table.hold(A.served)


def test_an_adapter_whose_rows_run_is_not_evicted_though_it_was_released(make_bench: Any) -> None:
    bench = limited(make_bench, max_adapters=1)
    bench.load(A).result()
    _, running = bench.submit(request(new=5), weights=A.served)
    bench.step()
    bench.scheduler.adapters.table.release(A.served)
    waiting = bench.load(B)
    assert not waiting.done()
    bench.run()
    bench.step()
    assert waiting.done()
    assert tokens_of(running) == [11] * 5


def test_a_cancelled_wait_for_room_holds_nothing(make_bench: Any) -> None:
    bench = limited(make_bench, max_adapters=1)
    bench.load(A).result()
    waiting, next_one = bench.load(B), bench.load(C)
    assert waiting.cancel()
    bench.scheduler.adapters.table.release(A.served)
    bench.step()
    assert next_one.result() is None
    assert B.served not in bench.scheduler.adapters.table


def test_bytes_bound_the_residents_and_one_that_is_too_large_is_refused(make_bench: Any) -> None:
    bench = limited(make_bench, max_bytes=A.size_bytes * 3 // 2)
    bench.load(A).result()
    bench.scheduler.adapters.table.release(A.served)
    bench.load(B).result()
    assert A.served not in bench.scheduler.adapters.table
    small = limited(make_bench, max_bytes=A.size_bytes - 1)
    with pytest.raises(InvalidArgument, match="max_adapter_bytes"):
        small.load(A).result()


def test_loading_a_resident_adapter_again_only_holds_it_once_more(make_bench: Any) -> None:
    bench = limited(make_bench, max_adapters=1)
    bench.load(A).result()
    bench.load(A).result()
    bench.scheduler.adapters.table.release(A.served)
    waiting = bench.load(B)
    assert not waiting.done()


def test_an_adapter_that_breaks_the_network_fails_its_load_alone(
    make_bench: Any, tiny_directory: Any
) -> None:
    class Broken(BigramNetwork):
        def add_adapter(self, weights: Any) -> str:
            raise MemoryError("out of memory")

    bench = make_bench(Broken(tiny_directory, max_context_length=64))
    assert isinstance(bench.load(A).exception(), EngineFailed)
    _, recorder = bench.submit(request())
    bench.run()
    assert len(tokens_of(recorder)) == 4


def test_ending_fails_the_loads_that_wait(make_bench: Any) -> None:
    bench = limited(make_bench, max_adapters=1)
    bench.load(A).result()
    waiting = bench.load(B)
    bench.scheduler.fail_all(EngineFailed("stopping"))
    assert isinstance(waiting.exception(), EngineFailed)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        AdapterLimits(max_adapters=0)


def test_holds_are_counted() -> None:
    table = AdapterTable(AdapterLimits())
    table.add(A.served, 10)
    assert table.hold(A.served)
    table.release(A.served)
    assert table.evict_idle(frozenset()) is None
    table.release(A.served)
    assert table.evict_idle(frozenset({A.served})) is None
    assert table.evict_idle(frozenset()) == A.served
    assert not table.hold(ServedWeights(Identity("adapter-11"), A.served.digest))


# scoring -------------------------------------------------------------------------------------


def test_targets_alternatives_and_draws_of_a_prompt_are_the_adapter_s(make_bench: Any) -> None:
    bench = make_bench()
    bench.load(A).result()
    scoring = PromptScoring(
        logprobs_from=2,
        num_alternatives=1,
        targets=((-1, -1), (11, -1), (3, 11)),
        draws=PromptDraws(count=3, temperature=1.0, seed=5),
    )
    asked = request(5, 6, 7, 11, new=1, scoring=scoring, sampling=Sampling())
    _, recorder = bench.submit(asked, weights=A.served)
    bench.run()
    (scored,) = recorder.of(Prefilled)
    assert len(scored.logprobs) == 2
    assert scored.logprobs[1] == pytest.approx(0.0, abs=1e-6)
    assert [tops[0][0] for tops in scored.alternatives] == [11, 11]
    assert scored.target_logprobs[0] == [0.0, 0.0]
    assert scored.target_logprobs[1] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert scored.target_logprobs[2][0] < -30
    assert [[token for token, _ in drawn] for drawn in scored.draws] == [[11] * 3] * 3
    assert np.isfinite(scored.target_logprobs[2]).all()


class Unadapted(BigramNetwork):
    """Takes an adapter in, digest and all, and computes without it: once."""

    strikes = 1

    def add_adapter(self, weights: Any) -> str:
        digest = super().add_adapter(weights)
        if self.strikes:
            self.strikes -= 1
            self._adapted[weights.served] = self._base
        return digest


def test_an_adapter_that_answers_as_its_canary_says_is_served(make_bench: Any) -> None:
    bench = make_bench()
    bench.load(replace(A, canary=adapter_canary(11))).result()
    _, recorder = bench.submit(request(), weights=A.served)
    bench.run()
    assert tokens_of(recorder) == [11] * 4


def test_an_adapter_that_answers_otherwise_is_refused_until_it_is_loaded_again(
    make_bench: Any, tiny_directory: Any
) -> None:
    bench = make_bench(Unadapted(tiny_directory, max_context_length=4096))
    right = replace(A, canary=adapter_canary(11))
    bench.load(right).result()
    bench.load(B).result()
    _, beside = bench.submit(request(new=8), weights=B.served)
    bench.step()
    for _ in range(2):
        _, refused = bench.submit(request(), weights=A.served)
        bench.step()
        assert isinstance(refused.of(Failed)[0].error, CanaryMismatch)
    assert not bench.scheduler.adapters.hold(A.served)
    bench.load(right).result()
    assert bench.scheduler.adapters.hold(A.served)
    _, again = bench.submit(request(), weights=A.served)
    bench.run()
    assert tokens_of(again) == [11] * 4
    assert tokens_of(beside) == [22] * 8


def test_a_refused_adapter_whose_second_reading_is_damaged_stays_refused(
    make_bench: Any, tiny_directory: Any
) -> None:
    bench = make_bench(Unadapted(tiny_directory, max_context_length=4096))
    bench.load(replace(A, canary=adapter_canary(11))).result()
    bench.submit(request(), weights=A.served)
    bench.run()
    damaged = bench.load(replace(B, served=A.served))
    assert isinstance(damaged.exception(), DigestMismatch)
    _, refused = bench.submit(request(), weights=A.served)
    bench.run()
    assert isinstance(refused.of(Failed)[0].error, CanaryMismatch)
