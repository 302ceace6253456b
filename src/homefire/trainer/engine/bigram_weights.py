"""The weights of the fake engine's slots: a bigram table, or an adapter on it. Numpy only.

Axes: T tokens, V vocabulary, K targets per token, r adapter rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from homefire.model import bigram
from homefire.trainer.engine.bigram_graph import BigramGraph
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
from homefire.wire.engine import AdamParams, Array, GradNormMetrics, LoraInit, LoraSpec
from homefire.wire.errors import InvalidArgument
from homefire.wire.pass_extras import Pooling
from homefire.wire.tensors import RawTensor, Tensors

_SHARE_OF_A_NEIGHBOUR = 2.0**-12
"""Of logits of 0.02, it is ten units in the last place of a logprob of -4: enough to be seen."""


class BigramReference:
    """Implements `FrozenWeights`."""

    def __init__(self, base: Float32) -> None:
        self._base = base

    def logprobs(self, batch: PackedTargets) -> Float32:
        return _gather(_log_softmax(self._base[batch.tokens]), batch)

    def likeliest(self, batch: PackedTokens, count: int) -> tuple[Float32, Ints]:
        return _likeliest(self._base[batch.tokens], count)

    def embeddings(self, batch: PackedTokens, pooling: Pooling) -> Float32:
        return _pooled(self._base[batch.tokens], batch, pooling)

    def serving(self) -> dict[str, RawTensor]:
        return {bigram.TENSOR: bigram.to_raw(self._base)}


class BigramTrained(ABC):
    """Implements `TrainableWeights` over named float32 masters."""

    def __init__(self, masters: dict[str, Float32]) -> None:
        self._masters = masters
        self._moments = Moments(masters)
        self._aside: dict[str, Float32] = {}
        self._gradient: dict[str, Float32] = {}

    @property
    def num_trainable(self) -> int:
        return sum(master.size for master in self._masters.values())

    def logprobs(self, batch: PackedTargets) -> Float32:
        return _gather(_log_softmax(self._logits(batch)), batch)

    def likeliest(self, batch: PackedTokens, count: int) -> tuple[Float32, Ints]:
        return _likeliest(self._logits(batch), count)

    def embeddings(self, batch: PackedTokens, pooling: Pooling) -> Float32:
        return _pooled(self._logits(batch), batch, pooling)

    def embedding_backward(
        self, batch: PackedTokens, pooling: Pooling, gradient: Float32
    ) -> Float32:
        logits = self._logits(batch)
        _add(self._aside, self._gradients(batch, _spread(gradient, batch, pooling)))
        return _pooled(logits, batch, pooling)

    def backward(self, batch: PackedTargets, gradient_of: GradientOf) -> Float32:
        graph = self.graph(batch)
        logprobs = graph.logprobs
        graph.backward(gradient_of(logprobs))
        return logprobs

    def graph(self, batch: PackedTargets) -> BigramGraph:
        return BigramGraph(batch, _log_softmax(self._logits(batch)), self._add_aside)

    def _add_aside(self, batch: PackedTargets, d_logits: Float32) -> None:
        _add(self._aside, self._gradients(batch, d_logits))

    def fused_backward(self, batch: PackedTargets, gradient_of: SpanGradientOf) -> Float32:
        return self.backward(batch, lambda logprobs: gradient_of(logprobs, slice(0, len(logprobs))))

    def keep_gradient(self) -> None:
        _add(self._gradient, self._aside)
        self._aside = {}

    def drop_gradient(self) -> None:
        self._aside = {}

    def clear_gradient(self) -> None:
        self._gradient = {}

    def step(
        self, adam: AdamParams, divisor: float, norm_metrics: GradNormMetrics
    ) -> dict[str, float]:
        gradient = self._gradient
        norms = GradientNorms({name: _norm([g]) / divisor for name, g in gradient.items()})
        norms.check()
        more = norms.metrics(
            norm_metrics,
            adam,
            weight_norm=_norm(self._masters.values()),
            largest=max((float(np.abs(g).max()) for g in gradient.values()), default=0.0) / divisor,
        )
        scale = norms.clipping(adam) / divisor
        update_norm = self._moments.step(self._masters, gradient, adam, scale)
        return {"grad_norm": norms.total, "update_norm": update_norm, **more}

    def files(self) -> WeightFiles:
        return WeightFiles(_raw(self._masters), self._moments.raw(), _raw(self._gradient))

    def check_fits(self, masters: Tensors) -> None:
        wanted = {name: ("F32", master.shape) for name, master in self._masters.items()}
        found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in masters.items()}
        if wanted != found:
            raise InvalidArgument(
                f"the state does not fit: it has {found}, this model {wanted}", field="path"
            )

    def restore(self, masters: Tensors, optimizer: Tensors | None, gradient: Tensors) -> None:
        self._masters.update({name: _array(masters[name]) for name in self._masters})
        self._moments = Moments(self._masters)
        if optimizer is not None:
            self._moments.restore(optimizer)
        self._gradient = {name: _array(tensor) for name, tensor in gradient.items()}

    @abstractmethod
    def serving(self) -> dict[str, RawTensor]: ...

    @abstractmethod
    def merged(self) -> MergedWeights: ...

    @abstractmethod
    def adapter_config(self) -> dict[str, Any] | None: ...

    @abstractmethod
    def _logits(self, batch: PackedTokens) -> Float32:
        """[T, V]"""

    @abstractmethod
    def _gradients(self, batch: PackedTokens, d_logits: Float32) -> dict[str, Float32]:
        """d loss / d logits [T, V] -> d loss / d masters."""


class BigramFull(BigramTrained):
    def __init__(self, base: Float32) -> None:
        super().__init__({bigram.TENSOR: base.copy()})

    def step(
        self, adam: AdamParams, divisor: float, norm_metrics: GradNormMetrics
    ) -> dict[str, float]:
        before = bigram.bfloat16(self._masters[bigram.TENSOR])
        norms = super().step(adam, divisor, norm_metrics)
        changed = np.count_nonzero(before != bigram.bfloat16(self._masters[bigram.TENSOR]))
        return {**norms, "changed_fraction": float(changed / before.size)}

    def serving(self) -> dict[str, RawTensor]:
        return {bigram.TENSOR: bigram.to_raw(self._masters[bigram.TENSOR])}

    def merged(self) -> MergedWeights:
        raise nothing_to_merge()

    def adapter_config(self) -> None:
        return None

    def _logits(self, batch: PackedTokens) -> Float32:
        return bigram.bfloat16(self._masters[bigram.TENSOR][batch.tokens])

    def _gradients(self, batch: PackedTokens, d_logits: Float32) -> dict[str, Float32]:
        gradient = np.zeros_like(self._masters[bigram.TENSOR])
        np.add.at(gradient, batch.tokens, d_logits)
        return {bigram.TENSOR: gradient}


class BigramLora(BigramTrained):
    def __init__(self, base: Float32, spec: LoraSpec, base_model: str) -> None:
        generator = np.random.Generator(np.random.PCG64(spec.seed or 0))
        a = generator.uniform(-1, 1, (spec.rank, len(base))) / math.sqrt(len(base))
        if spec.init is LoraInit.NORA:
            a /= np.linalg.norm(a, axis=0, keepdims=True)
        b = np.zeros((len(base), spec.rank), np.float32)
        super().__init__({bigram.LORA_A: a.astype(np.float32), bigram.LORA_B: b})
        self._base = base
        self._spec = spec
        self._base_model = base_model
        self._scaling = _float32(spec.alpha / spec.rank)
        self._num_neighbours = 0

    @contextmanager
    def beside(self, num_neighbours: int) -> Iterator[None]:
        """The last digits of a logprob depend on the number of neighbours, as in a real packed pass."""
        self._num_neighbours = num_neighbours
        try:
            yield
        finally:
            self._num_neighbours = 0

    def serving(self) -> dict[str, RawTensor]:
        return _raw({name: master.copy() for name, master in self._masters.items()})

    def merged(self) -> MergedWeights:
        update = self._masters[bigram.LORA_A].T @ self._masters[bigram.LORA_B].T
        return MergedWeights({bigram.TENSOR: bigram.to_raw(self._base + self._scaling * update)})

    def adapter_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self._base_model,
            "r": self._spec.rank,
            "lora_alpha": self._spec.alpha,
            "target_modules": [bigram.LAYER],
        }

    def _logits(self, batch: PackedTokens) -> Float32:
        x = self._masters[bigram.LORA_A].T[batch.tokens] * self._scaling
        logits = self._base[batch.tokens] + x @ self._masters[bigram.LORA_B].T
        return logits * _float32(1 + self._num_neighbours * _SHARE_OF_A_NEIGHBOUR)

    def _gradients(self, batch: PackedTokens, d_logits: Float32) -> dict[str, Float32]:
        a, b = self._masters[bigram.LORA_A], self._masters[bigram.LORA_B]
        d_a = np.zeros_like(a.T)
        np.add.at(d_a, batch.tokens, d_logits @ b * self._scaling)
        d_b = d_logits.T @ (a.T[batch.tokens] * self._scaling)
        return {bigram.LORA_A: np.ascontiguousarray(d_a.T), bigram.LORA_B: d_b}


class Moments:
    """AdamW's state; the formulas are those of `adamw.py`, in numpy."""

    def __init__(self, masters: dict[str, Float32]) -> None:
        self.updates = 0
        self.first = {name: np.zeros_like(master) for name, master in masters.items()}
        self.second = {name: np.zeros_like(master) for name, master in masters.items()}

    def step(
        self,
        masters: dict[str, Float32],
        gradient: dict[str, Float32],
        params: AdamParams,
        scale: float,
    ) -> float:
        self.updates += 1
        updates: dict[str, Float32] = {}
        for name, master in masters.items():
            g = gradient.get(name, np.zeros_like(master)) * _float32(scale)
            first = self.first[name] = _mix(self.first[name], g, params.beta1)
            second = self.second[name] = _mix(self.second[name], g * g, params.beta2)
            deviation = np.sqrt(second / _float32(1 - params.beta2**self.updates))
            update = first / _float32(1 - params.beta1**self.updates)
            update /= deviation + _float32(params.eps)
            update += _float32(params.weight_decay) * master
            updates[name] = update * _float32(params.learning_rate)
            masters[name] = master - updates[name]
        return _norm(updates.values())

    def raw(self) -> dict[str, RawTensor]:
        moments = {f"first:{name}": array for name, array in self.first.items()}
        moments |= {f"second:{name}": array for name, array in self.second.items()}
        updates = np.array([self.updates], "<i8")
        return {**_raw(moments), "updates": RawTensor("I64", (1,), updates.view(np.uint8))}

    def restore(self, tensors: Tensors) -> None:
        self.updates = int(np.frombuffer(tensors["updates"].data.tobytes(), "<i8")[0])
        for name in self.first:
            self.first[name] = _array(tensors[f"first:{name}"])
            self.second[name] = _array(tensors[f"second:{name}"])


def _mix(old: Float32, new: Float32, beta: float) -> Float32:
    return _float32(beta) * old + _float32(1 - beta) * new


def _log_softmax(logits: Float32) -> Float32:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _gather(logits: Float32, batch: PackedTargets) -> Float32:
    return np.take_along_axis(logits, batch.targets, -1)


def _likeliest(logits: Float32, count: int) -> tuple[Float32, Ints]:
    tokens = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(_log_softmax(logits), tokens, -1), tokens.astype(np.int64)


def _pooled(states: Float32, batch: PackedTokens, pooling: Pooling) -> Float32:
    """A bigram's states are its logits."""
    rows = np.split(states, np.cumsum(batch.lengths)[:-1])
    return np.stack([row[-1] if pooling is Pooling.LAST else row.mean(0) for row in rows])


def _spread(gradient: Float32, batch: PackedTokens, pooling: Pooling) -> Float32:
    """d loss / d pooled [N, V] -> d loss / d states [T, V]."""
    lengths = np.array(batch.lengths)
    if pooling is Pooling.MEAN:
        return np.repeat(gradient / lengths[:, None].astype(np.float32), lengths, axis=0)
    spread = np.zeros((len(batch.tokens), gradient.shape[1]), np.float32)
    spread[np.cumsum(lengths) - 1] = gradient
    return spread


def _add(total: dict[str, Float32], more: dict[str, Float32]) -> None:
    for name, array in more.items():
        total[name] = total[name] + array if name in total else array


def _float32(value: float) -> Any:
    """A float32 scalar; untyped, since numpy's stubs promote it to float64 where numpy does not."""
    return np.float32(value)


def _norm(arrays: Iterable[Float32]) -> float:
    return math.sqrt(sum(float(np.square(a.astype(np.float64)).sum()) for a in arrays))


def _raw(arrays: dict[str, Array]) -> dict[str, RawTensor]:
    return {
        name: RawTensor("F32", array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        for name, array in arrays.items()
    }


def _array(tensor: RawTensor) -> Float32:
    return np.frombuffer(tensor.data.tobytes(), "<f4").reshape(tensor.shape).copy()
