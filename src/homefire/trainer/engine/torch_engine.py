"""The real engine: any decoder of transformers that our attention hook runs exactly, in torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from homefire.foundation import memory
from homefire.foundation.clock import Clock
from homefire.model.device import compute_deterministically, device_of
from homefire.model.loading import LoadedModel, load_model
from homefire.model.lora import new_adapter
from homefire.model.recompute import decoder_layers
from homefire.trainer.engine.engine import SlotEngine
from homefire.trainer.engine.network import Float32, FrozenWeights, Part, TrainableWeights
from homefire.trainer.engine.pass_budget import pass_budget
from homefire.trainer.engine.ranks.placement import Placements
from homefire.trainer.engine.residence import Residence
from homefire.trainer.engine.shared_passes import backward_together
from homefire.trainer.engine.torch_weights import (
    FullWeights,
    LoraWeights,
    ReferenceWeights,
    TrainedWeights,
)
from homefire.wire.engine import LoraSpec, OpenModel
from homefire.wire.errors import Unsupported
from homefire.wire.specs import PassBudget


def torch_engine(clock: Clock | None = None) -> SlotEngine:
    return SlotEngine(open_network, clock=clock)


def open_network(request: OpenModel) -> TorchNetwork:
    return network_of(load(request), request)


def load(request: OpenModel) -> LoadedModel:
    prepare_process(request)
    device, directory = device_of(request.accelerator), Path(request.model_dir)
    return load_model(directory, serving_dtype=request.serving_dtype, device=device)


def prepare_process(request: OpenModel) -> None:
    """For the same bits every time."""
    torch.set_num_threads(request.threads)
    compute_deterministically(device_of(request.accelerator))


def network_of(
    model: LoadedModel, request: OpenModel, placements: Placements | None = None
) -> TorchNetwork:
    directory = Path(request.model_dir)
    residence = Residence(model, directory, request.serving_dtype, placements)
    return TorchNetwork(model, residence, request.base_model)


class TorchNetwork:
    """Implements `Network`: one module, trained in place by one full slot or adapted by many LoRA
    slots."""

    def __init__(self, model: LoadedModel, residence: Residence, base_model: str) -> None:
        self._model = model
        self._residence = residence
        self._base_model = base_model
        self._open: list[TrainableWeights] = []

    @property
    def architecture(self) -> str:
        return self._model.architecture

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_context_length(self) -> int:
        return self._model.max_context_length

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._model.module.parameters())

    @property
    def num_layers(self) -> int:
        return len(decoder_layers(self._model))

    @property
    def memory_bytes(self) -> int:
        device = self._model.device
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory
        return memory.total_bytes()

    @property
    def num_ranks(self) -> int:
        return 1

    @property
    def compute_dtype(self) -> str:
        return str(self._model.head_weight.dtype).removeprefix("torch.")

    def pass_budget(self) -> PassBudget | None:
        """Asked for before a slot is opened."""
        free_bytes = self.available_bytes()
        if self._model.device.type == "cpu" or free_bytes is None:
            return None
        return pass_budget(
            self._model.config,
            free_bytes=free_bytes,
            num_parameters=self.num_parameters,
            number_bytes=self._model.head_weight.element_size(),
        )

    def available_bytes(self) -> int | None:
        """On an accelerator, what torch has cached counts as free: it gives that up when asked."""
        device = self._model.device
        if device.type != "cuda":
            return memory.available_bytes()
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def free_memory(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()

    def use_threads(self, count: int) -> None:
        """The number of threads is part of a plan: on CPU a sum's bits depend on it."""
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)

    def reference(self) -> FrozenWeights:
        return ReferenceWeights(self._residence)

    def open_full(self) -> TrainedWeights:
        if self._open:
            raise _crowded("a second slot beside a full-parameter one")
        return self._opened(FullWeights(self._residence))

    def open_lora(self, spec: LoraSpec) -> TrainedWeights:
        if any(isinstance(weights, FullWeights) for weights in self._open):
            raise _crowded("an adapter beside a full-parameter slot")
        adapter = new_adapter(
            self._model,
            rank=spec.rank,
            alpha=spec.alpha,
            seed=spec.seed or 0,
            train_attn=spec.train_attn,
            train_mlp=spec.train_mlp,
            train_unembed=spec.train_unembed,
            init=spec.init,
        )
        return self._opened(LoraWeights(self._residence, adapter, self._base_model))

    def shares_passes(self, weights: TrainableWeights) -> bool:
        return isinstance(weights, LoraWeights) and weights.shares_passes

    def backward_together(self, parts: Sequence[Part]) -> list[Float32]:
        return backward_together(self._residence, parts)

    def close(self, weights: TrainableWeights) -> None:
        self._open.remove(weights)
        if isinstance(weights, TrainedWeights):
            weights.close()
        self._residence.forget(weights)

    def _opened(self, weights: TrainedWeights) -> TrainedWeights:
        self._open.append(weights)
        return weights


def _crowded(what: str) -> Unsupported:
    return Unsupported(f"one trainer cannot hold {what}", hint="create another trainer job")
