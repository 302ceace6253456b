"""Small models with weights of unit gain, plain forwards of them, and a scheduler around the engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from homefire.foundation.clock import ManualClock
from homefire.inference.engine.embedded import EmbeddedNetwork
from homefire.inference.engine.protocol import (
    Sampled,
    SequenceRequest,
    ServedWeights,
    WeightSet,
)
from homefire.inference.engine.scheduler import Scheduler, SchedulerLimits
from homefire.model import lora
from homefire.model.experts import ExpertsLowRank
from homefire.model.loading import load_model
from homefire.model.tensors import raw, serving_tensors
from homefire.wire.ids import Identity
from homefire.wire.manifest import CheckpointKind, whole_digest
from homefire.wire.tensors import digest_tensors
from unit.inference.scheduler_bench import Bench, Recorder, tokens_of

torch.set_num_threads(1)


def small_qwen3(parent: Path, *, tied: bool, seed: int) -> Path:
    """A small Qwen3 with unit-gain weights in bfloat16 values; made once."""
    path = parent / f"qwen3-{tied}-{seed}"
    if path.exists():
        return path
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = (
                noise / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 1 + 0.1 * noise
            )
            parameter.copy_(gain.to(torch.bfloat16))
    module.save_pretrained(path)
    return path


def open_bench(directory: Path, **limits: Any) -> Bench:
    network = EmbeddedNetwork(directory, max_running=8, max_context_length=256, threads=1)
    clock = ManualClock()
    chosen = SchedulerLimits(**{"delivery_interval_s": 0.0, **limits})
    return Bench(Scheduler(network, network.resident_weights(), limits=chosen, clock=clock), clock)


def reference(directory: Path) -> Callable[[list[int]], Tensor]:
    """Logprobs [T, V] of a text under the unmodified model."""
    module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    @torch.inference_mode()
    def logprobs(tokens: list[int]) -> Tensor:
        return module(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    return logprobs


def prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 97, (length,), generator=generator).tolist())


def logprobs_of(recorder: Recorder) -> list[float]:
    return [x for update in recorder.of(Sampled) for x in update.logprobs]


def worst(
    logprobs: Callable[[list[int]], Tensor], sequence: SequenceRequest, recorder: Recorder
) -> float:
    tokens = tokens_of(recorder)
    text = [*sequence.prompt, *tokens]
    start = len(sequence.prompt)
    expected = logprobs(text)[start - 1 : -1].gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return (expected - torch.tensor(logprobs_of(recorder))).abs().max().item()


def full_set(directory: Path, identity: str) -> WeightSet:
    tensors = {name: raw(t) for name, t in serving_tensors(load_model(directory)).items()}
    served = ServedWeights(Identity(identity), whole_digest(digest_tensors(tensors)))
    return WeightSet(served, CheckpointKind.BASE, tensors)


def swap(bench: Bench, weights: WeightSet, *, reset_prompt_cache: bool = True) -> None:
    done: Future[Any] = Future()
    bench.scheduler.begin_swap(
        weights, drain_timeout_s=1.0, done=done, reset_prompt_cache=reset_prompt_cache
    )
    bench.run()
    done.result()


def merged(directory: Path, adapter: lora.LoraAdapter) -> Callable[[list[int]], Tensor]:
    """W + scaling * B A in a plain model; a tied head is untied first, since only it is adapted."""
    module: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for path, layer in adapter.layers.items():
        linear = module.get_submodule(path)
        weight = linear.weight.detach() + adapter.scaling * layer.b @ layer.a
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    for path, block in adapter.experts.items():
        _merge_experts(module.get_submodule(path), block, adapter.scaling)

    @torch.inference_mode()
    def logprobs(tokens: list[int]) -> Tensor:
        return module(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    return logprobs


@torch.no_grad()
def _merge_experts(owner: Any, block: ExpertsLowRank, scaling: float) -> None:
    """By the formula that PEFT states: A is expert-major, B rank-major with the expert last."""
    first = "gate_up_proj" if owner.has_gate else "up_proj"
    for name, layer in ((first, block.up), ("down_proj", block.down)):
        weight = getattr(owner, name)
        a_ERI = layer.a.reshape(len(weight), -1, layer.a.shape[1])
        b_ORE = layer.b.reshape(layer.b.shape[0], -1, len(weight))
        update = torch.einsum("ore,eri->eoi", b_ORE, a_ERI)
        weight += scaling * (update.mT if owner.is_transposed else update)
