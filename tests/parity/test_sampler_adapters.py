"""Adapters in the embedded engine: a mixed batch against each alone, and against merged weights.

Measured differences are about 1e-6; the models have weights of unit gain and the adapters change their
logprobs by more than 0.1, so that a row under another's adapter would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from homefire.inference.engine.protocol import (
    Prefilled,
    PromptDraws,
    PromptScoring,
    Sampled,
    Sampling,
    SequenceRequest,
    ServedWeights,
    Started,
    WeightSet,
)
from homefire.model import lora
from homefire.model.loading import load_model
from homefire.model.tensors import raw
from homefire.wire.errors import DigestMismatch, InvalidArgument
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
from unit.inference.scheduler_bench import Bench, Recorder, tokens_of

ALONE = 1e-5
FORWARD = 1e-4
GREEDY = Sampling(temperature=0.0)
Model = tuple[Path, dict[str, lora.LoraAdapter]]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A base and three adapters: of everything, of attention alone, of the head alone."""
    directory = small_qwen3(tmp_path_factory.getbasetemp(), tied=request.param, seed=1)
    loaded = load_model(directory)
    everything: dict[str, Any] = {}
    settings = {
        "a": everything,
        "b": {"train_mlp": False, "train_unembed": False},
        "head": {"train_mlp": False, "train_attn": False},
    }
    adapters = {
        name: lora.new_adapter(loaded, rank=2 + i, alpha=8.0, seed=i, **flags)
        for i, (name, flags) in enumerate(settings.items())
    }
    generator = torch.Generator().manual_seed(4)
    for adapter in adapters.values():
        for layer in adapter.layers.values():
            layer.b.normal_(std=0.3, generator=generator)
    return directory, adapters


def weight_set(name: str, adapter: lora.LoraAdapter) -> WeightSet:
    tensors = {key: raw(tensor) for key, tensor in lora.peft_tensors(adapter).items()}
    served = ServedWeights(Identity(name), whole_digest(digest_tensors(tensors)))
    return WeightSet(
        served, CheckpointKind.LORA, tensors, LoraManifest(adapter.rank, adapter.alpha)
    )


def bench_with_adapters(model: Model, **limits: Any) -> tuple[Bench, dict[str, ServedWeights]]:
    directory, adapters = model
    bench = open_bench(directory, **limits)
    served: dict[str, ServedWeights] = {}
    for name, adapter in adapters.items():
        weights = weight_set(name, adapter)
        bench.load(weights).result()
        served[name] = weights.served
    return bench, served


def mixture() -> Iterator[tuple[str | None, SequenceRequest]]:
    """Three of every kind, lengths and ends interleaved, some prompts equal across weights."""
    for i, name in enumerate((None, "a", "b", "head") * 3):
        yield name, SequenceRequest(prompt(4 + 3 * (i % 5), i % 3), 3 + 2 * i, sampling=GREEDY)


def run_mixture(model: Model, chosen: Callable[[str | None], bool]) -> list[Recorder]:
    bench, served = bench_with_adapters(model, max_running=5)
    recorders = []
    for name, request in mixture():
        if chosen(name):
            weights = served[name] if name else bench.scheduler.serving.served
            recorders.append(bench.submit(request, weights=weights)[1])
            bench.step()
    bench.run()
    return recorders


def logprobs_of(recorder: Recorder) -> list[float]:
    return [x for update in recorder.of(Sampled) for x in update.logprobs]


def test_every_row_of_a_mixed_batch_is_as_if_its_weights_were_alone(model: Model) -> None:
    together = run_mixture(model, lambda name: True)
    kinds = [name for name, _ in mixture()]
    for kind in (None, "a", "b", "head"):
        mixed = [r for name, r in zip(kinds, together, strict=True) if name == kind]
        alone = run_mixture(model, lambda name, kind=kind: name == kind)
        for one, other in zip(mixed, alone, strict=True):
            assert tokens_of(one) == tokens_of(other)
            assert logprobs_of(one) == pytest.approx(logprobs_of(other), abs=ALONE)
            assert one.of(Started)[0].weights == other.of(Started)[0].weights


def test_every_row_of_a_mixed_batch_equals_a_forward_of_its_merged_weights(model: Model) -> None:
    directory, adapters = model
    forwards = {name: merged(directory, adapter) for name, adapter in adapters.items()}
    base = reference(directory)
    recorders = run_mixture(model, lambda name: True)
    for (name, request), recorder in zip(mixture(), recorders, strict=True):
        forward = forwards[name] if name else base
        assert worst(forward, request, recorder) < FORWARD
        text = list(request.prompt)
        for _ in tokens_of(recorder):
            text.append(int(forward(text)[-1].argmax()))
        assert tokens_of(recorder) == text[len(request.prompt) :]
        if name:
            assert worst(base, request, recorder) > 0.1


def test_rows_without_adapter_run_without_hooks(model: Model) -> None:
    """The unadapted path costs what it did: once the last adapted row has gone no layer has a hook."""
    bench, served = bench_with_adapters(model)
    network: Any = bench.scheduler._network
    modules = list(network._model.module.modules())

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) for module in modules)

    bench.submit(SequenceRequest(prompt(5, 1), 20, sampling=GREEDY))
    bench.submit(SequenceRequest(prompt(5, 1), 3, sampling=GREEDY), weights=served["a"])
    bench.step()
    assert num_hooks() > 0
    for _ in range(4):
        bench.step()
    assert bench.scheduler.num_running == 1
    assert num_hooks() == 0
    bench.run()


def test_prompt_scores_of_an_adapter_equal_its_forward(model: Model) -> None:
    directory, adapters = model
    bench, served = bench_with_adapters(model)
    text = prompt(20, 5)
    targets = tuple((-1, i) if i % 2 else (3, 96 - i) for i in range(19))
    scoring = PromptScoring(0, 3, targets, PromptDraws(4, 0.7, seed=2))
    for name in ("a", "head"):
        _, scored = bench.submit(SequenceRequest(text, 1, scoring=scoring), weights=served[name])
        _, company = bench.submit(SequenceRequest(text, 1, scoring=scoring))
        bench.run()
        table = merged(directory, adapters[name])(list(text))
        check_scores(scored.of(Prefilled)[0], table, text, targets)
        check_scores(company.of(Prefilled)[0], reference(directory)(list(text)), text, targets)


def check_scores(
    update: Prefilled, table: Tensor, text: tuple[int, ...], targets: tuple[tuple[int, ...], ...]
) -> None:
    own = [table[i, token].item() for i, token in enumerate(text[1:])]
    assert update.logprobs == pytest.approx([0.0, *own], abs=FORWARD)
    assert [[t for t, _ in tops] for tops in update.alternatives[1:]] == (
        table[:-1].topk(3).indices.tolist()
    )
    expected = [
        [table[i, t].item() if t >= 0 else 0.0 for t in row] for i, row in enumerate(targets)
    ]
    assert np.array(update.target_logprobs) == pytest.approx(np.array(expected), abs=FORWARD)
    assert [len(drawn) for drawn in update.draws] == [4] * 19
    for i, drawn in enumerate(update.draws):
        for token, logprob in drawn:
            assert logprob == pytest.approx(table[i, token].item(), abs=FORWARD)


def test_draws_at_prompt_positions_follow_the_tempered_distribution(model: Model) -> None:
    directory, _ = model
    bench, _ = bench_with_adapters(model)
    count, temperature = 20_000, 1.5
    scoring = PromptScoring(draws=PromptDraws(count, temperature, seed=9))
    _, recorder = bench.submit(SequenceRequest((5, 6, 7), 1, scoring=scoring))
    bench.run()
    table = reference(directory)([5, 6, 7])
    for i, drawn in enumerate(recorder.of(Prefilled)[0].draws):
        expected = (table[i] / temperature).softmax(-1)
        seen = torch.bincount(torch.tensor([t for t, _ in drawn]), minlength=97) / count
        spread = (expected * (1 - expected) / count).sqrt() + 1 / count
        assert ((seen - expected).abs() / spread).max() < 5


def test_adapters_rest_while_a_snapshot_serves_and_are_right_when_the_base_is_back(
    model: Model, tmp_path: Path
) -> None:
    directory, adapters = model
    bench, served = bench_with_adapters(model)
    tied = load_model(directory).tied
    other = small_qwen3(tmp_path, tied=bool(tied), seed=2)
    swap(bench, full_set(other, "step-1"))
    swap(bench, bench.scheduler._network.base_weights())
    request = SequenceRequest(prompt(7, 7), 15, seed=1)
    _, recorder = bench.submit(request, weights=served["a"])
    bench.run()
    assert worst(merged(directory, adapters["a"]), request, recorder) < FORWARD


def test_an_adapter_with_one_changed_bit_is_not_served(model: Model) -> None:
    directory, adapters = model
    bench = open_bench(directory)
    weights = weight_set("a", adapters["a"])
    name = next(iter(weights.tensors))
    data = weights.tensors[name].data.copy()
    data[0] ^= 1
    changed = {
        **weights.tensors,
        name: type(weights.tensors[name])("F32", weights.tensors[name].shape, data),
    }
    loaded = bench.load(WeightSet(weights.served, weights.kind, changed, weights.lora))
    assert isinstance(loaded.exception(), DigestMismatch)
    assert weights.served not in bench.scheduler._network._resident


def test_an_adapter_with_nan_is_refused(model: Model) -> None:
    directory, adapters = model
    bench = open_bench(directory)
    layers = {
        path: lora.LowRank(layer.a.clone().fill_(float("nan")), layer.b)
        for path, layer in adapters["b"].layers.items()
    }
    weights = weight_set("nan", lora.LoraAdapter(3, 8.0, layers))
    loaded: Future[None] = bench.load(weights)
    assert isinstance(loaded.exception(), InvalidArgument)
    assert "not finite" in str(loaded.exception())


def test_all_linear_layers_can_carry_an_adapter(model: Model) -> None:
    """Else a path of an adapter would be dropped in silence."""
    directory, adapters = model
    loaded = load_model(directory)
    linears = {p for p, m in loaded.module.named_modules() if type(m) is nn.Linear}
    assert set(adapters["a"].layers) == linears
