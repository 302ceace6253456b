"""What `InferenceEngine` promises, on every engine that there is: see `engine_kits.py` to add one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from homefire.checkpoints import RawTensor, digest_tensors, whole_digest
from homefire.checkpoints.canary import canary_tokens
from homefire.inference.engine.protocol import (
    Failed,
    InferenceEngine,
    Load,
    Prefilled,
    PromptScoring,
    Sampled,
    Sampling,
    SequenceRequest,
    ServedWeights,
    Started,
    Stragglers,
    WeightSet,
)
from homefire.wire.completions import FinishReason
from homefire.wire.errors import (
    CanaryMismatch,
    DigestMismatch,
    InvalidArgument,
    Unavailable,
    WeightsMismatch,
)
from homefire.wire.ids import Identity
from homefire.wire.internal import CanaryVerdict
from homefire.wire.manifest import Canary
from unit.inference.canaries import GREEDY
from unit.inference.engine_kits import KITS, EngineKit
from unit.inference.scheduler_bench import Waiting, deliver, tokens_of

TIMEOUT_S = 60
TOLERANCE = 1e-4
"""Nats, between one way to a logprob and another."""
FREE = Sampling(temperature=1.0)


@pytest.fixture(params=list(KITS))
def kit(request: pytest.FixtureRequest, tiny_directory: Path) -> EngineKit:
    return KITS[request.param](tiny_directory)


@pytest.fixture
def engine(kit: EngineKit) -> Iterator[InferenceEngine]:
    engine = kit.open(deliver)
    yield engine
    engine.close()


def request(*prompt: int, new: int = 4, **options: Any) -> SequenceRequest:
    return SequenceRequest(prompt or (5, 6, 7), new, **{"sampling": GREEDY, **options})


def run(
    engine: InferenceEngine, *sequences: SequenceRequest, weights: ServedWeights | None = None
) -> Waiting:
    return ended(submit(engine, *sequences, weights=weights))


def submit(
    engine: InferenceEngine, *sequences: SequenceRequest, weights: ServedWeights | None = None
) -> Waiting:
    listener = Waiting(len(sequences))
    listener.ticket = engine.submit(sequences, listener, weights=weights)
    return listener


def ended(listener: Waiting) -> Waiting:
    assert listener.over.wait(TIMEOUT_S)
    return listener


def failure(listener: Waiting) -> Exception:
    (failed,) = ended(listener).of(Failed)
    return failed.error


def swap(engine: InferenceEngine, weights: WeightSet, **options: Any) -> Any:
    return engine.swap_weights(weights, **{"drain_timeout_s": 60.0, **options}).result(TIMEOUT_S)


def logprobs_of(listener: Waiting, field: str = "logprobs") -> list[float]:
    return [value for update in listener.of(Sampled) for value in getattr(update, field)]


# sampling ------------------------------------------------------------------------------------


def test_a_generation_is_started_prefilled_and_sampled_in_that_order(
    engine: InferenceEngine,
) -> None:
    listener = run(engine, request(new=5))
    kinds = [type(update) for update in listener.updates]
    assert kinds[:3] == [Started, Prefilled, Sampled]
    assert set(kinds[3:]) <= {Sampled}
    assert len(tokens_of(listener)) == 5
    finishes = [update.finish for update in listener.of(Sampled)]
    assert finishes == [None] * (len(finishes) - 1) + [FinishReason.LENGTH]
    assert {update.weights for update in listener.of(Sampled)} == {engine.serving()}


@pytest.mark.parametrize("sampling", [GREEDY, FREE])
def test_a_seeded_sequence_is_the_same_alone_and_among_others(
    engine: InferenceEngine, sampling: Sampling
) -> None:
    asked = [
        request(*range(3, 5 + i % 7), new=6 + i % 3, sampling=sampling, seed=i) for i in range(16)
    ]
    alone = [tokens_of(run(engine, one)) for one in asked]
    together = [ended(listener) for listener in [submit(engine, one) for one in asked]]
    assert [tokens_of(listener) for listener in together] == alone


def test_a_stop_token_ends_a_sequence_and_is_among_its_tokens(engine: InferenceEngine) -> None:
    tokens = tokens_of(run(engine, request(new=6)))
    stopped = run(engine, request(new=6, stop_token_ids=frozenset({tokens[2]})))
    first = tokens.index(tokens[2])
    assert tokens_of(stopped) == tokens[: first + 1]
    assert stopped.of(Sampled)[-1].finish is FinishReason.STOP


def test_a_stop_condition_sees_every_token_once(engine: InferenceEngine) -> None:
    class After:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def push(self, token: int) -> bool:
            self.seen.append(token)
            return len(self.seen) == 3

    stop = After()
    listener = run(engine, request(new=9, stop=stop))
    assert tokens_of(listener) == stop.seen
    assert len(stop.seen) == 3


def test_the_sequences_of_a_generation_are_told_apart_and_share_their_prompt(
    engine: InferenceEngine,
) -> None:
    listener = run(engine, *[request(*range(40), new=2 + i) for i in range(4)])
    assert [len(tokens_of(listener, i)) for i in range(4)] == [2, 3, 4, 5]
    assert len(listener.of(Started)) == 1
    cached = {update.index: update.num_cached_tokens for update in listener.of(Prefilled)}
    assert sorted(cached.values()) == [0, 40, 40, 40]


def test_greedy_takes_the_likeliest_and_its_sampling_logprob_is_certain(
    engine: InferenceEngine,
) -> None:
    listener = run(engine, request(new=4, num_alternatives=3))
    alternatives = [a for update in listener.of(Sampled) for a in update.alternatives]
    assert [a[0][0] for a in alternatives] == tokens_of(listener)
    assert [a[0][1] for a in alternatives] == pytest.approx(logprobs_of(listener), abs=TOLERANCE)
    assert all(a == sorted(a, key=lambda entry: -entry[1]) for a in alternatives)
    assert logprobs_of(listener, "sampling_logprobs") == [0.0] * 4


def test_a_sampled_token_scores_the_same_as_a_part_of_the_prompt(engine: InferenceEngine) -> None:
    listener = run(engine, request(new=5, sampling=FREE, seed=3))
    text = (5, 6, 7, *tokens_of(listener))
    scored = run(engine, request(*text, new=0, scoring=PromptScoring(logprobs_from=3)))
    (prefilled,) = scored.of(Prefilled)
    assert prefilled.logprobs == pytest.approx(logprobs_of(listener), abs=TOLERANCE)
    assert tokens_of(scored) == []


def test_the_sampling_logprob_is_of_the_distribution_that_was_cut(engine: InferenceEngine) -> None:
    one = Sampling(temperature=2.0, top_k=1)
    listener = run(engine, request(new=3, sampling=one, seed=1))
    assert logprobs_of(listener, "sampling_logprobs") == pytest.approx([0.0] * 3, abs=TOLERANCE)
    assert all(value < 0 for value in logprobs_of(listener))


def test_a_bias_decides(engine: InferenceEngine) -> None:
    forced = Sampling(logit_bias=((42, 100.0),))
    assert tokens_of(run(engine, request(new=3, sampling=forced, seed=1))) == [42] * 3


def test_a_later_prompt_finds_what_an_earlier_one_computed(engine: InferenceEngine) -> None:
    prompt = tuple(range(50))
    first = tokens_of(run(engine, request(*prompt)))
    again = run(engine, request(*prompt))
    assert tokens_of(again) == first
    assert again.of(Prefilled)[0].num_cached_tokens > 0


# weights -------------------------------------------------------------------------------------


def test_swapped_weights_serve_and_the_base_comes_back(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    base, before = engine.serving(), tokens_of(run(engine, request()))
    swapped = swap(engine, kit.full(7))
    assert swapped.canary is CanaryVerdict.ABSENT
    assert engine.serving() == kit.full(7).served == engine.serving_set().served
    assert tokens_of(run(engine, request())) == [7] * 4
    swap(engine, engine.base_weights())
    assert engine.serving() == base
    assert tokens_of(run(engine, request())) == before


def test_what_runs_ends_on_its_weights_and_what_comes_finds_the_new_ones(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    swap(engine, kit.full(3))
    early = [submit(engine, request(new=20 + i)) for i in range(5)]
    assert all(listener.started.wait(TIMEOUT_S) for listener in early)
    swapped = engine.swap_weights(kit.full(4), drain_timeout_s=60.0)
    late = [submit(engine, request()) for _ in range(5)]
    assert swapped.result(TIMEOUT_S).num_stragglers == 0
    assert {token for listener in early for token in tokens_of(ended(listener))} == {3}
    assert {token for listener in late for token in tokens_of(ended(listener))} == {4}


def test_what_goes_on_in_place_names_the_weights_of_every_token(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    swap(engine, kit.full(3))
    listener = submit(engine, request(new=kit.long))
    assert listener.started.wait(TIMEOUT_S)
    go_on = Stragglers.GO_ON
    swapped = swap(engine, kit.full(4), drain_timeout_s=0.0, stragglers=go_on)
    ended(listener)
    assert swapped.num_stragglers == 1
    for update in listener.of(Sampled):
        assert {f"full-{token}" for token in update.tokens} <= {update.weights.name}
    assert set(tokens_of(listener)) == {3, 4}
    assert len(tokens_of(listener)) == kit.long


def test_a_prompt_that_other_weights_computed_is_not_found(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    prompt = tuple(range(50))
    run(engine, request(*prompt))
    swap(engine, kit.full(3), reset_prompt_cache=False)
    assert run(engine, request(*prompt)).of(Prefilled)[0].num_cached_tokens == 0


def test_weights_with_another_digest_than_they_claim_are_not_served(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    swap(engine, kit.full(3))
    lying = replace(kit.full(4), served=ServedWeights(Identity("full-4"), "0" * 64))
    with pytest.raises(DigestMismatch, match="'full-4'"):
        swap(engine, lying)
    assert engine.serving() == kit.full(3).served
    assert tokens_of(run(engine, request())) == [3] * 4
    assert not engine.failure


def test_weights_of_another_model_are_refused(engine: InferenceEngine, kit: EngineKit) -> None:
    weights = kit.full(4)
    name = next(iter(weights.tensors))
    fewer = {n: tensor for n, tensor in weights.tensors.items() if n != name}
    with pytest.raises(InvalidArgument):
        swap(engine, replace(weights, tensors=fewer))
    assert engine.serving().identity is None


def test_the_canary_is_scored_before_anything_is_served(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    tokens = canary_tokens(engine.vocab_size, engine.max_context_length)
    scoring = PromptScoring(logprobs_from=1)
    of_base = run(engine, request(*tokens, new=0, scoring=scoring)).of(Prefilled)[0].logprobs
    swap(engine, kit.full(3))
    own = run(engine, request(*tokens, new=0, scoring=scoring)).of(Prefilled)[0].logprobs
    right = Canary(tokens, tuple(own), tuple(of_base), "float32")
    assert swap(engine, replace(kit.full(3), canary=right)).canary is CanaryVerdict.PASS
    wrong = Canary(tokens, tuple(of_base), None, "float32")
    with pytest.raises(CanaryMismatch):
        swap(engine, replace(kit.full(3), canary=wrong))
    assert tokens_of(run(engine, request())) == [3] * 4


def test_weights_that_give_no_number_are_not_served(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    """As after a loss that was not finite. Their answers show it, where a digest does not: an engine may
    write a NaN in other bits."""
    swap(engine, kit.full(3))
    with pytest.raises(DigestMismatch, match="'nan'"):
        swap(engine, without_numbers(kit.full(4)))
    assert tokens_of(run(engine, request())) == [3] * 4


def without_numbers(weights: WeightSet) -> WeightSet:
    nan = np.frombuffer(b"\xc0\x7f", np.uint8)
    tensors = {
        name: RawTensor("BF16", tensor.shape, np.tile(nan, len(tensor.data) // 2))
        for name, tensor in weights.tensors.items()
    }
    served = ServedWeights(Identity("nan"), whole_digest(digest_tensors(tensors)))
    return replace(weights, served=served, tensors=tensors)


def test_weights_that_are_insisted_on_are_had_or_refused(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    base = engine.serving()
    assert len(tokens_of(run(engine, request(), weights=base))) == 4
    swap(engine, kit.full(3))
    assert isinstance(failure(submit(engine, request(), weights=base)), WeightsMismatch)


def test_adapters_and_the_base_run_in_one_batch_as_each_does_alone(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    adapters = [kit.adapter(token) for token in (5, 6)]
    for adapter in adapters:
        assert not engine.hold_adapter(adapter.served)
        engine.load_adapter(adapter).result(TIMEOUT_S)
        assert engine.hold_adapter(adapter.served)
    wanted = [None, *(adapter.served for adapter in adapters)]
    alone = [tokens_of(run(engine, request(new=6), weights=w)) for w in wanted]
    listeners = [submit(engine, request(new=6), weights=w) for w in wanted * 3]
    assert [tokens_of(ended(listener)) for listener in listeners] == alone * 3
    assert len({tuple(tokens) for tokens in alone}) == 3
    names = {update.weights for listener in listeners for update in listener.of(Sampled)}
    assert names == {engine.serving(), *wanted[1:]}


def test_an_adapter_with_another_digest_is_not_held(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    lying = replace(kit.adapter(5), served=ServedWeights(Identity("adapter-5"), "0" * 64))
    with pytest.raises(DigestMismatch, match="'adapter-5'"):
        engine.load_adapter(lying).result(TIMEOUT_S)
    assert not engine.hold_adapter(lying.served)


# life ----------------------------------------------------------------------------------------


def test_a_cancelled_generation_is_told_nothing_more_and_frees_its_slots(
    engine: InferenceEngine, kit: EngineKit
) -> None:
    listener = submit(engine, *[request(new=kit.long)] * 3)
    assert listener.started.wait(TIMEOUT_S)
    engine.cancel(listener.ticket)
    others = [ended(submit(engine, request(new=2))) for _ in range(2)]
    told = len(listener.updates)
    assert engine.load() == Load(running=0, queued=0)
    run(engine, request(new=2))
    assert len(listener.updates) == told
    assert not any(update.finish for update in listener.of(Sampled))
    assert all(len(tokens_of(other)) == 2 for other in others)


def test_cancelling_what_has_ended_is_fine(engine: InferenceEngine) -> None:
    listener = run(engine, request())
    engine.cancel(listener.ticket)
    assert len(tokens_of(run(engine, request()))) == 4


def test_closing_fails_what_is_left_and_refuses_what_comes(kit: EngineKit) -> None:
    engine = kit.open(deliver)
    listener = submit(engine, request(new=kit.long))
    assert listener.started.wait(TIMEOUT_S)
    engine.close()
    assert listener.over.is_set()
    with pytest.raises(Unavailable):
        engine.submit([request()], Waiting())
    assert engine.failure


def test_what_it_serves_is_attested(engine: InferenceEngine) -> None:
    assert engine.attested_by in ("memory", "loaded_bytes+canary")
    assert len(engine.serving().digest) == 64
