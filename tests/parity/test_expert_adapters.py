"""LoRA on routed experts: the trainer against peft and against merged weights, gradients included; the
sampler against merged weights; and the merged base itself."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from homefire.inference.engine import adapted_layers
from homefire.inference.engine.protocol import SequenceRequest, ServedWeights, WeightSet
from homefire.model import lora
from homefire.model.experts import ExpertBlock, ExpertsLowRank
from homefire.model.loading import LoadedModel, load_model
from homefire.model.packed import packed_hidden, target_logprobs
from homefire.model.tensors import raw, serving_tensors
from homefire.wire.ids import Identity
from homefire.wire.manifest import CheckpointKind, LoraManifest, whole_digest
from homefire.wire.tensors import digest_tensors
from parity.families import made
from parity.family_measures import original, texts
from parity.sampler_models import full_set, merged, open_bench, prompt, swap, worst

torch.set_num_threads(1)
LOGPROB, GRADIENT, SAMPLED = 3e-5, 2e-4, 5e-5
"""Nats, relative, nats: the families' own (test_families.py); summation order."""
SHOWS = 0.05
"""Nats that a planted mistake moves."""
CORE = ("qwen3_moe", "gpt_oss", "glm4_moe")
"""Experts alone; transposed, interleaved and with biases; beside shared experts and a dense layer."""
MORE = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "deepseek_v3",
    "granitemoe",
    "qwen3_next",
    "granitemoehybrid",
    "jamba",
)
FAMILIES = [*CORE, *(pytest.param(name, marks=pytest.mark.long) for name in MORE)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory):
    return lambda name: made(name, tmp_path_factory.getbasetemp())


def trained(model: LoadedModel, *, rank: int = 3, seed: int = 5, **flags: bool) -> lora.LoraAdapter:
    """Far from zero."""
    adapter = lora.new_adapter(model, rank=rank, alpha=2.0 * rank, seed=seed, **flags)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.low_ranks().values():
        layer.b.normal_(std=0.2, generator=generator)
    assert adapter.experts
    return adapter


def packed_logprobs(model: LoadedModel, adapter: lora.LoraAdapter) -> Tensor:
    """Of each row's next tokens, all rows in one pass."""
    rows = texts()
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    with lora.applied(model, adapter):
        hidden = packed_hidden(model, tokens, lengths)
    low_rank = lora.head_update(model, adapter, hidden)
    scored = target_logprobs(hidden, model.logits_head, tokens.roll(-1), low_rank=low_rank)
    return torch.cat([row[:-1] for row in scored.split(lengths)])


def alone(module: Any) -> Tensor:
    """The same of a plain module, a row at a time."""
    return torch.cat(
        [
            module(input_ids=row[None], use_cache=False)
            .logits[0, :-1]
            .log_softmax(-1)
            .gather(-1, row[1:, None])[:, 0]
            for row in texts()
        ]
    )


def read_by_peft(model: LoadedModel, adapter: lora.LoraAdapter, base: Path, into: Path) -> Any:
    peft = pytest.importorskip("peft")
    config = lora.peft_config(model, adapter, base_model="base")
    (into / "adapter_config.json").write_text(json.dumps(config))
    save_file(lora.peft_tensors(adapter), into / "adapter_model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*([Mm]issing|[Uu]nexpected).*")
        return peft.PeftModel.from_pretrained(original(base), str(into), is_trainable=True).eval()


def gradients(logprobs: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad((logprobs * weights).sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(
        float((ours[name] - gradient).abs().max()) / max(float(gradient.abs().max()), least)
        for name, gradient in theirs.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_of_packed_rows_equal_peft(directory, tmp_path, family) -> None:
    model = load_model(directory(family))
    adapter = trained(model)
    theirs = read_by_peft(model, adapter, directory(family), tmp_path)
    model.module.requires_grad_(False)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(True)
    ours, expected = packed_logprobs(model, adapter), alone(theirs)
    assert (ours - expected).abs().max() < LOGPROB
    assert (expected - alone(original(directory(family)))).abs().max() > SHOWS
    their_parameters = {
        name.replace(".default", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours_by_name = gradients(ours, adapter.parameters())
    assert relative_error(ours_by_name, gradients(expected, their_parameters)) < GRADIENT


def test_an_expert_that_gets_anothers_update_shows_in_logprobs_and_gradients(
    directory, monkeypatch
) -> None:
    model = load_model(directory("qwen3_moe"))
    adapter = trained(model)
    model.module.requires_grad_(False)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(True)
    right = packed_logprobs(model, adapter)
    by_expert = lora.LowRank.by_expert
    monkeypatch.setattr(lora.LowRank, "by_expert", lambda self, count: by_expert(self, count)[::-1])
    wrong = packed_logprobs(model, adapter)
    assert (wrong - right).abs().max() > SHOWS
    parameters = adapter.parameters()
    assert relative_error(gradients(wrong, parameters), gradients(right, parameters)) > SHOWS


@torch.no_grad()
@pytest.mark.parametrize("family", CORE)
def test_a_fresh_adapter_of_experts_changes_nothing_but_the_order_of_sums(
    directory, family
) -> None:
    model = load_model(directory(family))
    fresh = lora.new_adapter(model, rank=3)
    nothing = replace(fresh, layers={}, experts={})
    moved = packed_logprobs(model, fresh) - packed_logprobs(model, nothing)
    assert moved.abs().max() < LOGPROB


# Served ---------------------------------------------------------------------------------------


def weight_set(name: str, adapter: lora.LoraAdapter) -> WeightSet:
    tensors = {key: raw(tensor) for key, tensor in lora.peft_tensors(adapter).items()}
    served = ServedWeights(Identity(name), whole_digest(digest_tensors(tensors)))
    described = LoraManifest(adapter.rank, adapter.alpha)
    return WeightSet(served, CheckpointKind.LORA, tensors, described)


def errors_of_a_mixed_batch(path: Path) -> dict[str, float]:
    """Of each kind of rows against its merged weights: two adapters of experts, one of attention alone,
    and the base, all in one batch."""
    model = load_model(path)
    adapters = {
        "one": trained(model, rank=2, seed=1),
        "two": trained(model, rank=4, seed=2),
        "head": lora.new_adapter(model, rank=2, train_attn=False, train_mlp=False),
    }
    bench = open_bench(path, max_running=5)
    served = {"base": bench.scheduler.serving.served}
    for name, adapter in adapters.items():
        weights = weight_set(name, adapter)
        bench.load(weights).result()
        served[name] = weights.served
    asked = [
        (name, SequenceRequest(prompt(4 + 5 * i, i), 6 + i, seed=i))
        for i, name in enumerate(("one", "base", "two", "one", "head", "two", "base"))
    ]
    recorders = []
    for name, request in asked:
        recorders.append(bench.submit(request, weights=served[name])[1])
        bench.step()
    bench.run()
    nothing = replace(adapters["one"], layers={}, experts={})
    tables = {name: merged(path, adapters.get(name, nothing)) for name in served}
    errors = dict.fromkeys(served, 0.0)
    for (name, request), recorder in zip(asked, recorders, strict=True):
        errors[name] = max(errors[name], worst(tables[name], request, recorder))
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_batch_is_sampled_with_its_own_experts(directory, family) -> None:
    assert max(errors_of_a_mixed_batch(directory(family)).values()) < SAMPLED


def test_a_row_that_gets_anothers_experts_shows(directory, monkeypatch) -> None:
    route = adapted_layers._AdaptedExperts.route

    def swapped(self: Any, routed: Any) -> None:
        rows = [segment.rows for segment in routed]
        route(self, [replace(s, rows=r) for s, r in zip(routed, rows[::-1], strict=True)])

    monkeypatch.setattr(adapted_layers._AdaptedExperts, "route", swapped)
    errors = errors_of_a_mixed_batch(directory("qwen3_moe"))
    assert errors["one"] > SHOWS
    assert errors["two"] > SHOWS


def test_experts_stand_as_they_were_once_no_row_has_an_adapter_of_them(directory) -> None:
    path = directory("qwen3_moe")
    bench = open_bench(path)
    weights = weight_set("one", trained(load_model(path)))
    bench.load(weights).result()
    experts = [
        module
        for name, module in bench.scheduler._network._model.module.named_modules()
        if name.endswith(".experts")
    ]
    bench.submit(SequenceRequest(prompt(5, 1), 9, seed=1))
    bench.submit(SequenceRequest(prompt(5, 1), 2, seed=1), weights=weights.served)
    bench.step()
    assert all("forward" in vars(module) for module in experts)
    for _ in range(4):
        bench.step()
    assert bench.scheduler.num_running == 1
    assert not any("forward" in vars(module) for module in experts)
    bench.run()


# Merged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_are_the_exact_sum_rounded_once_and_are_served(directory, family) -> None:
    path = directory(family)
    model = load_model(path)
    adapter = trained(model, train_unembed=False)
    whole = lora.merged_tensors(model, adapter, serving_tensors(model))
    base = dict(original(path).named_modules())
    for name, block in adapter.experts.items():
        products: list[tuple[Any, ExpertsLowRank]] = [(ExpertBlock(base[name]), block)]
        for owner, low_rank in products:
            for product, own in ((owner.up, low_rank.up), (owner.down, low_rank.down)):
                factors = own.by_expert(owner.num_experts)
                for expert, (a, b) in enumerate(factors):
                    update = adapter.scaling * (b @ a)
                    update = update.t() if product.is_transposed else update
                    exact = (product.weight[expert] + update).bfloat16()
                    assert torch.equal(whole[f"{name}.{product.name}"][expert], exact)
    served = ServedWeights(Identity("merged"), "")
    tensors = {name: raw(tensor) for name, tensor in whole.items()}
    served = replace(served, digest=whole_digest(digest_tensors(tensors)))
    bench = open_bench(path)
    swap(bench, WeightSet(served, CheckpointKind.BASE, tensors))
    swap(bench, full_set(path, "back"))
