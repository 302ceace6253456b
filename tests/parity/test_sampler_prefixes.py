"""Prompts taken from the prefix cache, and prompts computed in chunks, against plain forward passes.

Tolerance 1e-5 on logprobs: summation order alone, measured at about 1e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from homefire.inference.engine.prefix_cache import PrefixCache
from homefire.inference.engine.protocol import (
    Prefilled,
    PromptScoring,
    Sampling,
    SequenceRequest,
)
from parity.sampler_models import (
    full_set,
    logprobs_of,
    open_bench,
    prompt,
    reference,
    small_qwen3,
    swap,
    worst,
)
from unit.inference.scheduler_bench import Bench, Recorder, tokens_of

TOLERANCE = 1e-5
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_qwen3(tmp_path_factory.getbasetemp(), tied=True, seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_qwen3(tmp_path_factory.getbasetemp(), tied=True, seed=2)


def ask(bench: Bench, request: SequenceRequest) -> Recorder:
    _, recorder = bench.submit(request)
    bench.run()
    return recorder


def cached(recorder: Recorder) -> int:
    return recorder.of(Prefilled)[0].num_cached_tokens


def test_a_cached_prompt_gives_the_same_numbers_and_the_same_greedy_tokens(directory: Path) -> None:
    bench, logprobs = open_bench(directory), reference(directory)
    for sampling in (GREEDY, Sampling()):
        request = SequenceRequest(prompt(90, 5), 20, sampling=sampling, seed=3)
        fresh = ask(open_bench(directory), request)
        ask(bench, request)
        again = ask(bench, request)
        assert (cached(fresh), cached(again)) == (0, 80)
        assert tokens_of(again) == tokens_of(fresh)
        assert logprobs_of(again) == pytest.approx(logprobs_of(fresh), abs=TOLERANCE)
        assert worst(logprobs, request, again) < TOLERANCE


def test_turns_of_a_dialogue_are_exact(directory: Path) -> None:
    bench, logprobs = open_bench(directory), reference(directory)
    text = prompt(20, 1)
    hits = []
    for turn in range(4):
        request = SequenceRequest(text, 17, seed=turn)
        recorder = ask(bench, request)
        assert worst(logprobs, request, recorder) < TOLERANCE
        hits.append(cached(recorder))
        text = (*text, *tokens_of(recorder), *prompt(9, turn))
    assert hits == [0, 32, 48, 80]


def test_a_prompt_in_chunks_is_exact_beside_running_ones(directory: Path) -> None:
    bench, logprobs = open_bench(directory, prefill_tokens=32), reference(directory)
    requests = [SequenceRequest(prompt(n, n), 30, seed=n) for n in (4, 200, 11, 150, 33)]
    recorders = [bench.submit(request)[1] for request in requests]
    bench.run()
    errors = [worst(logprobs, *pair) for pair in zip(requests, recorders, strict=True)]
    assert max(errors) < TOLERANCE


def test_scores_behind_a_cached_beginning_are_exact(directory: Path) -> None:
    bench, logprobs = open_bench(directory), reference(directory)
    request = SequenceRequest(prompt(90, 5), 0, scoring=PromptScoring(50))
    ask(bench, request)
    recorder = ask(bench, request)
    table = logprobs(list(request.prompt))
    expected = [table[at - 1, request.prompt[at]].item() for at in range(50, 90)]
    assert cached(recorder) == 49
    assert recorder.of(Prefilled)[0].logprobs == pytest.approx(expected, abs=TOLERANCE)


def error_after_a_swap(directory: Path, other: Path) -> float:
    """Of a prompt that the old weights computed, under the new ones; nothing was freed between."""
    bench, request = open_bench(directory), SequenceRequest(prompt(90, 5), 20, seed=3)
    ask(bench, request)
    swap(bench, full_set(other, "step-1"), reset_prompt_cache=False)
    return worst(reference(other), request, ask(bench, request))


def test_new_weights_never_see_what_old_ones_cached(directory: Path, other: Path) -> None:
    assert error_after_a_swap(directory, other) < TOLERANCE


def test_a_cache_that_served_other_weights_would_be_seen(
    directory: Path, other: Path, monkeypatch: Any
) -> None:
    """The planted fault: prompts are looked up whatever the weights."""
    look_up = PrefixCache.lookup
    monkeypatch.setattr(PrefixCache, "lookup", lambda cache, _, tokens: look_up(cache, "", tokens))
    assert error_after_a_swap(directory, other) > 0.1
