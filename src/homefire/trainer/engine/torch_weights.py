"""The weights of a slot on a torch model: all parameters, an adapter, or the frozen base.

There is one module. Whose weights lie in it is `residence.py`'s business: a full slot trains it in place,
and the base comes back, from disk once, when a reference asks for it.

Masters are float32. What the module computes with is their rounding to the serving dtype (held in
float32), so gradients are those of the weights that a sampler serves; an adapter is its own master.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from homefire.model.head import LowRank
from homefire.model.loading import LoadedModel
from homefire.model.lora import (
    LoraAdapter,
    applied,
    head_update,
    merged_tensors,
    peft_config,
    unties_head,
)
from homefire.model.packed import (
    fused_backward,
    likeliest_tokens,
    packed_hidden,
    target_logprobs,
)
from homefire.model.packed_lora import reaches_segments
from homefire.model.tensors import DTYPE_NAMES, from_raw, raw
from homefire.trainer.engine.adamw import AdamW, Served, gradient_norms, norm_of
from homefire.trainer.engine.gradient_aside import GradientAside
from homefire.trainer.engine.gradient_norms import GradientNorms
from homefire.trainer.engine.network import (
    Float32,
    GradientOf,
    Ints,
    MergedWeights,
    PackedTargets,
    PackedTokens,
    SpanGradientOf,
    WeightFiles,
    nothing_to_merge,
)
from homefire.trainer.engine.out_of_memory import (
    ending_when_out_of_memory,
    named_out_of_memory,
)
from homefire.trainer.engine.pieces import pieces, round_into
from homefire.trainer.engine.ranks.placement import Incoming, Placement
from homefire.trainer.engine.residence import Residence
from homefire.trainer.engine.torch_graph import TorchGraph, push
from homefire.wire.engine import AdamParams, GradNormMetrics
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.pass_extras import Pooling
from homefire.wire.tensors import RawTensor, Tensors


class ReferenceWeights:
    """Implements `FrozenWeights`: the base model."""

    def __init__(self, residence: Residence) -> None:
        self._residence = residence

    @named_out_of_memory()
    @torch.no_grad()
    def logprobs(self, batch: PackedTargets) -> Float32:
        self._residence.use_base()
        return _numpy(_target_logprobs(self._residence.model, None, batch))

    @named_out_of_memory()
    @torch.no_grad()
    def likeliest(self, batch: PackedTokens, count: int) -> tuple[Float32, Ints]:
        self._residence.use_base()
        return _likeliest(self._residence.model, None, batch, count)

    @named_out_of_memory()
    @torch.no_grad()
    def embeddings(self, batch: PackedTokens, pooling: Pooling) -> Float32:
        self._residence.use_base()
        return _numpy(_embeddings(self._residence.model, None, batch, pooling))

    def serving(self) -> dict[str, RawTensor]:
        self._residence.use_base()
        return _raw(self._residence.serving())


class TrainedWeights(ABC):
    """Implements `TrainableWeights` over masters; subclasses say how masters reach the forward pass."""

    def __init__(
        self,
        residence: Residence,
        adapter: LoraAdapter | None,
        masters: dict[str, Tensor],
        leaves: dict[str, Tensor],
        placement: Placement,
    ) -> None:
        self._residence = residence
        self._model = residence.model
        self._adapter = adapter
        self._placement = placement
        self._masters = masters
        self._leaves = leaves
        """What autograd differentiates, under the masters' names; `.grad` is the gradient aside."""
        self._aside = GradientAside(leaves)
        """That of leaves which are not float32."""
        self._adam = AdamW(masters)
        self._gradient: dict[str, Tensor] = {}

    @property
    def num_trainable(self) -> int:
        shapes = (self._placement.shape(name, master) for name, master in self._masters.items())
        return sum(math.prod(shape) for shape in shapes)

    @named_out_of_memory()
    @torch.no_grad()
    def logprobs(self, batch: PackedTargets) -> Float32:
        self._settle()
        return _numpy(_target_logprobs(self._model, self._adapter, batch))

    @named_out_of_memory()
    @torch.no_grad()
    def likeliest(self, batch: PackedTokens, count: int) -> tuple[Float32, Ints]:
        self._settle()
        return _likeliest(self._model, self._adapter, batch, count)

    @named_out_of_memory()
    @torch.no_grad()
    def embeddings(self, batch: PackedTokens, pooling: Pooling) -> Float32:
        self._settle()
        return _numpy(_embeddings(self._model, self._adapter, batch, pooling))

    @named_out_of_memory()
    def backward(self, batch: PackedTargets, gradient_of: GradientOf) -> Float32:
        self._settle()
        logprobs = _target_logprobs(self._model, self._adapter, batch)
        values = _numpy(logprobs)
        self._push(logprobs, gradient_of(values))
        return values

    @named_out_of_memory()
    def graph(self, batch: PackedTargets) -> TorchGraph:
        self._settle()
        graph = TorchGraph(
            lambda: _target_logprobs(self._model, self._adapter, batch),
            weights=[*self._model.module.parameters(), *self._leaves.values()],
            settle=self._settle,
        )
        self._residence.watch(graph)
        return graph

    @named_out_of_memory()
    def fused_backward(self, batch: PackedTargets, gradient_of: SpanGradientOf) -> Float32:
        self._settle()
        hidden, targets, low_rank = _head_inputs(self._model, self._adapter, batch)

        def on_device(logprobs: Tensor, span: slice) -> Tensor:
            return torch.from_numpy(gradient_of(_numpy(logprobs), span)).to(logprobs.device)

        head = self._model.logits_head
        always = self._placement.is_shared
        logprobs = fused_backward(
            hidden, head, targets, on_device, low_rank=low_rank, always=always
        )
        return _numpy(logprobs)

    @named_out_of_memory()
    def embedding_backward(
        self, batch: PackedTokens, pooling: Pooling, gradient: Float32
    ) -> Float32:
        self._settle()
        embeddings = _embeddings(self._model, self._adapter, batch, pooling)
        self._push(embeddings, gradient)
        return _numpy(embeddings)

    def _push(self, output: Tensor, gradient: Float32) -> None:
        """Backward through `output`, unless nothing would come of it for any rank."""
        push(output, gradient, always=self._placement.is_shared)

    @torch.no_grad()
    def keep_gradient(self) -> None:
        found = self._placement.gradients(self._leaves) | self._aside.take()
        for name, gradient in found.items():
            if name in self._gradient:
                self._gradient[name].add_(gradient)
            else:
                self._gradient[name] = gradient
        self.drop_gradient()

    def drop_gradient(self) -> None:
        for leaf in self._leaves.values():
            leaf.grad = None
        self._aside.take()

    def clear_gradient(self) -> None:
        self._gradient = {}

    def close(self) -> None:
        """The leaves are nobody's to train now."""
        self._aside.close()

    @ending_when_out_of_memory()
    def step(
        self, adam: AdamParams, divisor: float, norm_metrics: GradNormMetrics
    ) -> dict[str, float]:
        norms = gradient_norms(self._gradient, divisor, self._placement.norms)
        norms.check()
        self._settle()
        more = self._norm_metrics(norms, norm_metrics, adam, divisor)
        scale = norms.clipping(adam) / divisor
        update = self._adam.step(
            self._masters, self._gradient, adam, scale=scale, served=self._served()
        )
        (update_norm,) = self._placement.norms([update.norm])
        moved = self._moved(update.num_moved)
        return {"grad_norm": norms.total, "update_norm": update_norm, **more, **moved}

    def _norm_metrics(
        self, norms: GradientNorms, asked: GradNormMetrics, adam: AdamParams, divisor: float
    ) -> dict[str, float]:
        if asked is GradNormMetrics.OFF:
            return {}
        parts = (gradient for gradient in self._gradient.values() if gradient.numel())
        largest = self._placement.largest(max((float(g.abs().max()) for g in parts), default=0.0))
        of_parts = [norm_of(master) for master in self._masters.values()]
        weight_norm = math.hypot(*self._placement.norms(of_parts))
        return norms.metrics(asked, adam, weight_norm=weight_norm, largest=largest / divisor)

    def files(self) -> WeightFiles:
        adam = self._adam
        moments = {f"first:{name}": tensor for name, tensor in adam.first.items()}
        moments |= {f"second:{name}": tensor for name, tensor in adam.second.items()}
        optimizer = self._wholes(moments)
        optimizer["updates"] = raw(torch.tensor([adam.updates], dtype=torch.int64))
        return WeightFiles(self._wholes(self._masters), optimizer, self._wholes(self._gradient))

    def _wholes(self, parts: dict[str, Tensor]) -> dict[str, RawTensor]:
        """One tensor after the other; empty but at rank 0."""
        wholes = (
            (key, self._placement.whole(key.removeprefix("first:").removeprefix("second:"), part))
            for key, part in parts.items()
        )
        kept = self._placement.kept
        return {key: kept(raw(whole)) for key, whole in wholes if whole is not None}

    def check_fits(self, masters: Tensors) -> None:
        wanted = {
            name: (DTYPE_NAMES[master.dtype], self._placement.shape(name, master))
            for name, master in self._masters.items()
        }
        check_layout(wanted, masters)

    def restore(self, masters: Tensors, optimizer: Tensors | None, gradient: Tensors) -> None:
        updates = None if optimizer is None else int(from_raw(optimizer["updates"])[0])
        moments = optimizer or {}
        self.take_over(Incoming(updates, list(gradient), masters, moments, gradient))

    @torch.no_grad()
    def take_over(self, incoming: Incoming) -> None:
        self._settle()
        adam = AdamW(self._masters)
        for name, master in self._masters.items():
            self._take(name, master, incoming.masters)
            if incoming.updates is not None:
                self._take(name, adam.first[name], incoming.moments, prefix="first:")
                self._take(name, adam.second[name], incoming.moments, prefix="second:")
        adam.updates = incoming.updates or 0
        self._adam = adam
        self._gradient = {
            name: torch.zeros_like(self._masters[name]) for name in incoming.gradient_names
        }
        for name, part in self._gradient.items():
            self._take(name, part, incoming.gradient)
        self._publish()

    def _take(self, name: str, part: Tensor, source: Tensors | None, prefix: str = "") -> None:
        whole = None if source is None else from_raw(source[prefix + name])
        self._placement.spread(name, part, whole)

    @abstractmethod
    def _settle(self) -> None:
        """Makes the module hold what this slot computes with."""

    @abstractmethod
    def _served(self) -> Served | None:
        """Where the forward pass reads the masters rounded; None where it reads the masters."""

    @abstractmethod
    def _moved(self, count: int) -> dict[str, float]:
        """Metrics of a step that changed so many served values here."""

    @abstractmethod
    def _publish(self) -> None:
        """Brings replaced masters to where the forward pass reads them."""

    @abstractmethod
    def serving(self) -> dict[str, RawTensor]: ...

    @abstractmethod
    def merged(self) -> MergedWeights: ...

    @abstractmethod
    def adapter_config(self) -> dict[str, Any] | None: ...


class FullWeights(TrainedWeights):
    """All parameters of the module, trained in place."""

    def __init__(self, residence: Residence) -> None:
        residence.use_base()
        leaves: dict[str, Tensor] = dict(residence.model.module.named_parameters())
        masters = {
            name: residence.layout.part(leaf).to(torch.float32, copy=True)
            for name, leaf in leaves.items()
        }
        super().__init__(residence, None, masters, leaves, residence.layout)

    @torch.no_grad()
    def round_into_module(self) -> int:
        """The module's parameters become the masters' serving values; returns how many moved here."""
        served, changed = self._served(), 0
        for name, master in self._masters.items():
            for part, live in zip(pieces(master), pieces(served.live[name]), strict=True):
                changed += round_into(live, part, served.dtype)
        return changed

    def serving(self) -> dict[str, RawTensor]:
        self._settle()
        return _raw(self._residence.serving())

    def merged(self) -> MergedWeights:
        raise nothing_to_merge()

    def adapter_config(self) -> None:
        return None

    def _settle(self) -> None:
        self._residence.use(self)
        self._model.module.requires_grad_(True)

    def _served(self) -> Served:
        live = {name: self._placement.part(leaf) for name, leaf in self._leaves.items()}
        return Served(live, self._model.serving_dtype)

    def _moved(self, count: int) -> dict[str, float]:
        return {"changed_fraction": self._placement.total(count) / self.num_trainable}

    def _publish(self) -> None:
        self.round_into_module()


class LoraWeights(TrainedWeights):
    """An adapter on the frozen base."""

    def __init__(self, residence: Residence, adapter: LoraAdapter, base_model: str) -> None:
        self._lora = adapter
        self._base_model = base_model
        parameters = adapter.parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        placement = residence.placements.of_adapter()
        super().__init__(residence, adapter, parameters, parameters, placement)

    @property
    def adapter(self) -> LoraAdapter:
        """The live one."""
        return self._lora

    @property
    def shares_passes(self) -> bool:
        """Whether each of its layers can add its update to a segment of a pass's tokens."""
        return reaches_segments(self._model, self._lora)

    def serving(self) -> dict[str, RawTensor]:
        return _raw({name: master.detach().clone() for name, master in self._masters.items()})

    def merged(self) -> MergedWeights:
        self._settle()
        base = self._residence.serving()
        if not base:
            return MergedWeights({})
        tensors = _raw(merged_tensors(self._model, self._lora, base))
        if not unties_head(self._model, self._lora):
            return MergedWeights(tensors)
        if self._model.module.config.get_text_config() is not self._model.module.config:
            raise Unsupported(
                "merging an adapter of the output layer into a model whose text configuration is"
                " nested is not supported: its embeddings would stay tied",
                hint="train with train_unembed false",
                field="checkpoint_type",
            )
        return MergedWeights(tensors, {"tie_word_embeddings": False})

    def adapter_config(self) -> dict[str, Any]:
        return peft_config(self._model, self._lora, base_model=self._base_model)

    def _settle(self) -> None:
        self._residence.use_base()
        self._model.module.requires_grad_(False)

    def _served(self) -> None:
        return None

    def _moved(self, count: int) -> dict[str, float]:
        return {}

    def _publish(self) -> None:
        """The forward pass reads the masters themselves."""


def check_layout(wanted: dict[str, tuple[str, tuple[int, ...]]], given: Tensors) -> None:
    """InvalidArgument unless both have the same names, dtypes and shapes."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in given.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InvalidArgument(
                f"the state does not fit: tensor {name!r} is {found.get(name, 'absent')},"
                f" this model has {wanted.get(name, 'none of that name')}",
                hint="it belongs to another base model, or to an adapter of other modules",
                field="path",
            )


# Forward passes; with an adapter the update is added to the frozen base -----------------------


def _hidden(model: LoadedModel, adapter: LoraAdapter | None, batch: PackedTokens) -> Tensor:
    """[T, E], differentiable in the module's and the adapter's leaves."""
    tokens = torch.from_numpy(batch.tokens).to(model.device)
    if adapter is None:
        return packed_hidden(model, tokens, batch.lengths, recompute=batch.recompute)
    again = [lambda: applied(model, adapter)]
    with applied(model, adapter):
        return packed_hidden(
            model, tokens, batch.lengths, recompute=batch.recompute, reentries=again
        )


def _target_logprobs(
    model: LoadedModel, adapter: LoraAdapter | None, batch: PackedTargets
) -> Tensor:
    """[T, K], differentiable."""

    def run() -> Tensor:
        hidden, targets, low_rank = _head_inputs(model, adapter, batch)
        return target_logprobs(hidden, model.logits_head, targets, low_rank=low_rank)

    return model.run_pass(run)


def _head_inputs(
    model: LoadedModel, adapter: LoraAdapter | None, batch: PackedTargets
) -> tuple[Tensor, Tensor, LowRank | None]:
    """Hidden states [T, E], targets [T, K], and the adapter's update of the head."""
    hidden = _hidden(model, adapter, batch)
    targets = torch.from_numpy(batch.targets).to(model.device)
    return hidden, targets, head_update(model, adapter, hidden) if adapter else None


def _likeliest(
    model: LoadedModel, adapter: LoraAdapter | None, batch: PackedTokens, count: int
) -> tuple[Float32, Ints]:
    def run() -> tuple[Tensor, Tensor]:
        hidden = _hidden(model, adapter, batch)
        low_rank = head_update(model, adapter, hidden) if adapter else None
        return likeliest_tokens(hidden, model.logits_head, count, low_rank=low_rank)

    logprobs, tokens = model.run_pass(run)
    return _numpy(logprobs), tokens.cpu().numpy()


def _embeddings(
    model: LoadedModel, adapter: LoraAdapter | None, batch: PackedTokens, pooling: Pooling
) -> Tensor:
    """[N, E], differentiable."""

    def run() -> Tensor:
        rows = _hidden(model, adapter, batch).float().split(batch.lengths)
        if pooling is Pooling.LAST:
            return torch.stack([row[-1] for row in rows])
        return torch.stack([row.mean(0) for row in rows])

    return model.run_pass(run)


def _raw(tensors: dict[str, Tensor]) -> dict[str, RawTensor]:
    return {name: raw(tensor) for name, tensor in tensors.items()}


def _numpy(tensor: Tensor) -> Float32:
    return tensor.detach().cpu().numpy()
