"""The embedded engine against a plain transformers forward over the whole text.

Tolerance 1e-4 on logprobs; measured differences are about 1e-6. The base models have weights of unit gain,
so that a misplaced key or a broken mask shows as an error of order 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, RepetitionPenaltyLogitsProcessor

from homefire.inference.engine.protocol import (
    Prefilled,
    PromptScoring,
    Sampling,
    SequenceRequest,
    ServedWeights,
    WeightSet,
)
from homefire.model import lora
from homefire.model.loading import load_model
from homefire.model.tensors import raw
from homefire.wire.errors import DigestMismatch
from homefire.wire.ids import Identity
from homefire.wire.manifest import CheckpointKind, LoraManifest, whole_digest
from homefire.wire.tensors import digest_tensors
from parity.sampler_models import (
    full_set,
    merged,
    open_bench,
    prompt,
    reference,
    small_qwen3,
    swap,
    worst,
)
from unit.inference.scheduler_bench import tokens_of

TOLERANCE = 1e-4
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Path]:
    def make(tied: bool, seed: int) -> Path:
        return small_qwen3(tmp_path_factory.getbasetemp(), tied=tied, seed=seed)

    return make


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model_directory(request: Any, directory: Callable[[bool, int], Path]) -> Path:
    return directory(request.param, 1)


def test_logprobs_of_mixed_lengths_with_late_arrivals_and_departures(model_directory: Path) -> None:
    bench, logprobs = open_bench(model_directory, max_running=3), reference(model_directory)
    shapes = [(5, 20), (17, 7), (9, 33), (30, 12), (30, 9), (1, 70), (100, 5)]
    requests = [
        SequenceRequest(prompt(length, i), new, seed=i) for i, (length, new) in enumerate(shapes)
    ]
    recorders = [bench.submit(request)[1] for request in requests[:4]]
    for _ in range(6):
        bench.step()
    recorders += [bench.submit(request)[1] for request in requests[4:]]
    bench.run()
    errors = [worst(logprobs, *pair) for pair in zip(requests, recorders, strict=True)]
    assert max(errors) < TOLERANCE


def test_a_group_of_samples_shares_its_prompt_exactly(model_directory: Path) -> None:
    bench, logprobs = open_bench(model_directory), reference(model_directory)
    request = SequenceRequest(prompt(40, 3), 10)
    singles = [bench.submit(request)[1] for _ in range(6)]
    bench.run()
    assert [r.of(Prefilled)[0].num_cached_tokens for r in singles] == [0, 40, 40, 40, 40, 40]
    assert max(worst(logprobs, request, recorder) for recorder in singles) < TOLERANCE
    assert len({tuple(tokens_of(recorder)) for recorder in singles}) > 1


def test_greedy_is_the_model_s_own_greedy(model_directory: Path) -> None:
    bench, logprobs = open_bench(model_directory), reference(model_directory)
    requests = [SequenceRequest(prompt(n, n), 12, sampling=GREEDY) for n in (3, 8, 8, 21)]
    recorders = [bench.submit(request)[1] for request in requests]
    bench.run()
    for request, recorder in zip(requests, recorders, strict=True):
        text = list(request.prompt)
        for _ in range(12):
            text.append(int(logprobs(text)[-1].argmax()))
        assert tokens_of(recorder) == text[len(request.prompt) :]


def test_scoring_a_prompt_equals_the_forward_pass(model_directory: Path) -> None:
    bench, logprobs = open_bench(model_directory), reference(model_directory)
    for length, score_from in ((9, 0), (30, 12), (2, 1), (1, 0)):
        request = SequenceRequest(prompt(length, length), 0, scoring=PromptScoring(score_from, 2))
        _, recorder = bench.submit(request)
        bench.run()
        (update,) = recorder.of(Prefilled)
        table = logprobs(list(request.prompt))
        for at, (logprob, tops) in enumerate(
            zip(update.logprobs, update.alternatives, strict=True), start=score_from
        ):
            if at == 0:
                assert (logprob, tops) == (0.0, [])
                continue
            assert logprob == pytest.approx(table[at - 1, request.prompt[at]].item(), abs=TOLERANCE)
            assert tops[0][0] == int(table[at - 1].argmax())
        assert len(update.logprobs) == length - score_from


def test_a_seeded_draw_is_the_same_alone_and_in_company(model_directory: Path) -> None:
    """The seed is chosen once; a border between tokens within float noise would show as a change."""

    def draw(company: int) -> list[int]:
        bench = open_bench(model_directory, max_running=4)
        for i in range(company):
            bench.submit(SequenceRequest(prompt(3 + 5 * i, i), 4 + 3 * i))
        _, recorder = bench.submit(SequenceRequest(prompt(6, 99), 40, seed=5))
        bench.run()
        return tokens_of(recorder)

    assert draw(0) == draw(1) == draw(6)


def test_a_seeded_draw_with_penalties_is_the_same_alone_and_in_company(
    model_directory: Path,
) -> None:
    sampling = Sampling(
        top_p=0.9, presence_penalty=0.5, repetition_penalty=1.2, logit_bias=((3, 2.0), (4, -100.0))
    )

    def draw(company: int) -> list[int]:
        bench = open_bench(model_directory, max_running=4, prefill_tokens=16)
        for i in range(company):
            bench.submit(SequenceRequest(prompt(3 + 9 * i, i), 4 + 3 * i, seed=i))
        _, recorder = bench.submit(SequenceRequest(prompt(40, 99), 40, sampling=sampling, seed=5))
        bench.run()
        return tokens_of(recorder)

    alone = draw(0)
    assert alone == draw(1) == draw(6)
    assert 4 not in alone


def test_repetition_penalty_is_transformers_own(model_directory: Path) -> None:
    bench, logprobs = open_bench(model_directory), reference(model_directory)
    penalty = RepetitionPenaltyLogitsProcessor(1.4)
    request = SequenceRequest(
        prompt(21, 4), 12, sampling=Sampling(temperature=0.0, repetition_penalty=1.4)
    )
    _, recorder = bench.submit(request)
    bench.run()
    module = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    text = list(request.prompt)
    for _ in range(12):
        tokens = torch.tensor([text])
        with torch.inference_mode():
            logits = module(input_ids=tokens).logits[:, -1]
        text.append(int(penalty(tokens, logits).argmax()))
    assert tokens_of(recorder) == text[21:]
    assert worst(logprobs, request, recorder) < TOLERANCE


# weights -------------------------------------------------------------------------------------


def test_swapped_weights_reach_every_copy_and_come_back(
    model_directory: Path, directory: Callable[[bool, int], Path]
) -> None:
    other = directory("True" in model_directory.name, 2)
    bench = open_bench(model_directory)
    base = bench.scheduler.serving
    request = SequenceRequest(prompt(7, 7), 15, seed=1)
    for weights, source in (
        (full_set(other, "step-1"), other),
        (bench.scheduler._network.base_weights(), model_directory),
    ):
        swap(bench, weights)
        _, recorder = bench.submit(request)
        bench.run()
        assert worst(reference(source), request, recorder) < TOLERANCE
    assert bench.scheduler.serving.served == base.served


def test_a_stale_tied_head_is_refused_and_would_be_seen(
    directory: Callable[[bool, int], Path],
) -> None:
    """The planted fault: weights change, the head's copy does not."""
    bench = open_bench(directory(True, 1))
    network: Any = bench.scheduler._network
    network._head.refresh = lambda own=None: None
    with pytest.raises(DigestMismatch, match="tied head"):
        swap(bench, full_set(directory(True, 2), "step-1"))
    network._head.verify = lambda: None
    swap(bench, full_set(directory(True, 2), "step-1"))
    request = SequenceRequest(prompt(7, 7), 15, seed=1)
    _, recorder = bench.submit(request)
    bench.run()
    assert worst(reference(directory(True, 2)), request, recorder) > 0.1


def test_an_adapter_is_served_on_the_base_and_dropped_again(
    model_directory: Path, directory: Callable[[bool, int], Path]
) -> None:
    model = load_model(model_directory)
    adapter = lora.new_adapter(model, rank=4, alpha=8.0, seed=3)
    for layer in adapter.layers.values():
        layer.b.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    tensors = {name: raw(t) for name, t in lora.peft_tensors(adapter).items()}
    served = ServedWeights(Identity("lora-1"), whole_digest(digest_tensors(tensors)))
    weights = WeightSet(served, CheckpointKind.LORA, tensors, LoraManifest(4, 8.0))
    bench = open_bench(model_directory)
    request = SequenceRequest(prompt(7, 7), 15, seed=1)

    swap(bench, full_set(directory("True" in model_directory.name, 2), "step-1"))
    swap(bench, weights)
    _, recorder = bench.submit(request)
    bench.run()
    assert worst(merged(model_directory, adapter), request, recorder) < TOLERANCE
    assert worst(reference(model_directory), request, recorder) > 0.1

    swap(bench, bench.scheduler._network.base_weights())
    _, recorder = bench.submit(request)
    bench.run()
    assert worst(reference(model_directory), request, recorder) < TOLERANCE
