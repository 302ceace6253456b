"""What the conformance suite needs of an engine under test. A new engine adds one kit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from homefire.checkpoints import RawTensor, read_model_directory
from homefire.inference.engine.continuous import ContinuousEngine
from homefire.inference.engine.embedded import EmbeddedNetwork
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.protocol import InferenceEngine, Publish, ServedWeights, WeightSet
from homefire.model import lora
from homefire.model.loading import load_model
from homefire.model.tensors import raw
from homefire.wire.ids import Identity
from homefire.wire.manifest import CheckpointKind, LoraManifest, whole_digest
from homefire.wire.tensors import digest_tensors
from unit.inference.canaries import canary_adapter, canary_tensors
from unit.inference.torch_canaries import canary_tensors_of


@dataclass(frozen=True)
class EngineKit:
    """An engine that serves the tiny model, and weights for it."""

    open: Callable[[Publish], InferenceEngine]
    full: Callable[[int], WeightSet]
    """Whole weights under which every greedy token is the given one."""
    adapter: Callable[[int], WeightSet]
    """Adapters that answer otherwise than the base model and than each other."""
    long: int
    """Tokens of a sequence that still runs when the next thing is done."""


def bigram_kit(directory: Path) -> EngineKit:
    def open_it(publish: Publish) -> InferenceEngine:
        network = BigramNetwork(directory, max_context_length=1 << 20)
        return ContinuousEngine(network, network.base_weights(), publish=publish)

    return EngineKit(
        open_it,
        lambda token: full_set(token, canary_tensors(token)),
        canary_adapter,
        long=20_000,
    )


def embedded_kit(directory: Path) -> EngineKit:
    base = read_model_directory(directory)

    def open_it(publish: Publish) -> InferenceEngine:
        network = EmbeddedNetwork(directory, max_running=64, max_context_length=512, threads=1)
        return ContinuousEngine(network, network.resident_weights(), publish=publish)

    return EngineKit(
        open_it,
        lambda token: full_set(token, canary_tensors_of(base, token)),
        lambda seed: torch_adapter(directory, seed),
        long=400,
    )


KITS: dict[str, Callable[[Path], EngineKit]] = {"bigram": bigram_kit, "embedded": embedded_kit}


def full_set(token: int, tensors: dict[str, RawTensor]) -> WeightSet:
    served = ServedWeights(Identity(f"full-{token}"), whole_digest(digest_tensors(tensors)))
    return WeightSet(served, CheckpointKind.BASE, tensors)


def torch_adapter(directory: Path, seed: int) -> WeightSet:
    rank = 2
    adapter = lora.new_adapter(load_model(directory), rank=rank, alpha=4.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: raw(torch.randn(tensor.shape, generator=generator) if "lora_B" in name else tensor)
        for name, tensor in lora.peft_tensors(adapter).items()
    }
    served = ServedWeights(Identity(f"adapter-{seed}"), whole_digest(digest_tensors(tensors)))
    return WeightSet(served, CheckpointKind.LORA, tensors, LoraManifest(rank=rank, alpha=4.0))
