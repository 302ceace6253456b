"""Adapters of heads whose product is scaled, soft-capped or biased: trainer, sampler and merge agree."""

from __future__ import annotations

import pytest
import torch

from homefire.inference.engine.protocol import SequenceRequest, ServedWeights, WeightSet
from homefire.model import lora
from homefire.model.loading import load_model
from homefire.model.packed import packed_hidden, target_logprobs
from homefire.model.tensors import raw, serving_tensors
from homefire.wire.ids import Identity
from homefire.wire.manifest import CheckpointKind, LoraManifest, whole_digest
from homefire.wire.tensors import digest_tensors
from parity.families import made
from parity.family_measures import texts
from parity.sampler_models import merged, open_bench, prompt, swap, worst

TOLERANCE = 2e-5
FAMILIES = ["granite", "cohere2", "gemma2", "phi"]


@pytest.fixture(params=FAMILIES)
def directory(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.getbasetemp())


@pytest.fixture
def adapter(directory):
    """Of the head alone, far from zero."""
    made_adapter = lora.new_adapter(
        load_model(directory), rank=4, alpha=8.0, seed=3, train_attn=False, train_mlp=False
    )
    for layer in made_adapter.layers.values():
        layer.b.normal_(std=0.3, generator=torch.Generator().manual_seed(4))
    return made_adapter


@torch.no_grad()
def test_the_trainers_logprobs_equal_the_merged_models(directory, adapter) -> None:
    model, rows, table = load_model(directory), texts(), merged(directory, adapter)
    tokens, lengths = torch.cat(rows), [len(row) for row in rows]
    hidden = packed_hidden(model, tokens, lengths)
    low_rank = lora.head_update(model, adapter, hidden)
    ours = target_logprobs(hidden, model.logits_head, tokens.roll(-1), low_rank=low_rank)
    plain = target_logprobs(hidden, model.logits_head, tokens.roll(-1))
    assert (ours - plain).abs().max() > 0.05
    for row, logprobs in zip(rows, ours.split(lengths), strict=True):
        expected = table(row.tolist())[:-1].gather(-1, row[1:, None])[:, 0]
        torch.testing.assert_close(logprobs[:-1], expected, atol=TOLERANCE, rtol=0)


def test_the_samplers_logprobs_equal_the_merged_models(directory, adapter) -> None:
    tensors = {name: raw(tensor) for name, tensor in lora.peft_tensors(adapter).items()}
    served = ServedWeights(Identity("lora-1"), whole_digest(digest_tensors(tensors)))
    bench = open_bench(directory)
    swap(bench, WeightSet(served, CheckpointKind.LORA, tensors, LoraManifest(4, 8.0)))
    requests = [SequenceRequest(prompt(n, n), 12, seed=n) for n in (3, 20)]
    recorders = [bench.submit(request)[1] for request in requests]
    bench.run()
    table = merged(directory, adapter)
    for request, recorder in zip(requests, recorders, strict=True):
        assert worst(table, request, recorder) < TOLERANCE


def test_a_merged_head_is_served_as_the_adapter_was(directory, adapter) -> None:
    """Granite's and Phi's head is its own, Gemma's and Cohere's was tied to the embedding."""
    model = load_model(directory)
    whole = lora.merged_tensors(model, adapter, serving_tensors(model))
    tensors = {name: raw(tensor) for name, tensor in whole.items()}
    served = ServedWeights(Identity("merged-1"), whole_digest(digest_tensors(tensors)))
    bench = open_bench(directory)
    swap(bench, WeightSet(served, CheckpointKind.BASE, tensors))
    request = SequenceRequest(prompt(9, 9), 12, seed=9)
    _, recorder = bench.submit(request)
    bench.run()
    rounded = merged(directory, adapter)
    assert worst(rounded, request, recorder) < 0.02  # the merged head is rounded to bfloat16 once
