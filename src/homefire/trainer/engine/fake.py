"""The fake engine: a bigram model in numpy that trains for real. For tests; no torch.

Starts in half a second and is deterministic. Model, names and roundings are `homefire.model.bigram`'s,
where the fake sampler finds them too. Its base weights are fixed by the vocabulary's size, unless the
model directory is itself a snapshot of a fake (it holds `bigram.weight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from homefire.checkpoints import read_model_directory
from homefire.foundation import memory
from homefire.foundation.clock import Clock
from homefire.model import bigram
from homefire.trainer.engine.bigram_weights import BigramFull, BigramLora, BigramReference
from homefire.trainer.engine.engine import SlotEngine
from homefire.trainer.engine.network import Float32, FrozenWeights, Part, TrainableWeights
from homefire.wire.engine import LoraSpec, OpenModel
from homefire.wire.specs import PassBudget

_CONTEXT_LENGTH = 1 << 20


def fake_engine(clock: Clock | None = None) -> SlotEngine:
    return SlotEngine(open_network, clock=clock)


def open_network(request: OpenModel) -> BigramNetwork:
    return BigramNetwork(base_of(Path(request.model_dir)), request.base_model)


def base_of(model_dir: Path) -> Float32:
    """float32 [V, V], in bfloat16 values."""
    vocab_size = bigram.vocab_size_of(model_dir)
    if any(model_dir.glob("model*.safetensors")):
        tensors = read_model_directory(model_dir)
        if bigram.TENSOR in tensors:
            return bigram.bfloat16(bigram.from_raw(tensors[bigram.TENSOR]))
    return bigram.base_weight(vocab_size)


class BigramNetwork:
    """Implements `Network`."""

    def __init__(self, base: Float32, base_model: str) -> None:
        self._base = base
        self._base_model = base_model

    @property
    def architecture(self) -> str:
        return bigram.ARCHITECTURE

    @property
    def vocab_size(self) -> int:
        return len(self._base)

    @property
    def max_context_length(self) -> int:
        return _CONTEXT_LENGTH

    @property
    def num_parameters(self) -> int:
        return self._base.size

    @property
    def num_layers(self) -> int:
        return 0

    @property
    def memory_bytes(self) -> int:
        return memory.total_bytes()

    @property
    def num_ranks(self) -> int:
        return 1

    @property
    def compute_dtype(self) -> str:
        return "float32"

    def pass_budget(self) -> PassBudget | None:
        return None

    def available_bytes(self) -> int | None:
        return memory.available_bytes()

    def free_memory(self) -> None:
        """Nothing is cached."""

    def use_threads(self, count: int) -> None:
        """numpy keeps its own; nothing here is large enough to be split."""

    def reference(self) -> FrozenWeights:
        return BigramReference(self._base)

    def open_full(self) -> TrainableWeights:
        return BigramFull(self._base)

    def open_lora(self, spec: LoraSpec) -> TrainableWeights:
        return BigramLora(self._base, spec, self._base_model)

    def shares_passes(self, weights: TrainableWeights) -> bool:
        return isinstance(weights, BigramLora)

    def backward_together(self, parts: Sequence[Part]) -> list[Float32]:
        """One after the other, with the last bits of a pass that they share."""
        logprobs: list[Float32] = []
        for part in parts:
            if not isinstance(part.weights, BigramLora):
                raise TypeError(f"{type(part.weights).__name__} shares no pass")
            with part.weights.beside(len(parts) - 1):
                logprobs.append(part.weights.fused_backward(part.batch, part.gradient_of))
        return logprobs

    def close(self, weights: TrainableWeights) -> None:
        """Nothing is shared."""
