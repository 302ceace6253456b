"""An autograd graph that is kept between a forward and its backward, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from homefire.trainer.engine.network import Float32
from homefire.trainer.engine.out_of_memory import named_out_of_memory

_Saved = tuple[Tensor, int]
"""A tensor that the backward needs, and its version: autograd's own check is off under hooks."""


class TorchGraph:
    """Implements `PassGraph`. Memory is counted as autograd saves it: each storage once, weights not.

    `compute` gives logprobs [T, K]. `settle` makes `weights` those that the slot computes with, and
    trainable, again.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        *,
        weights: Iterable[Tensor],
        settle: Callable[[], None],
    ) -> None:
        self._settle = settle
        meter = _Meter(weights)
        with torch.autograd.graph.saved_tensors_hooks(meter.save, _restore):
            self._logprobs: Tensor | None = compute()
        self._size_bytes = meter.size_bytes

    @property
    def logprobs(self) -> Float32:
        return self._kept().detach().cpu().numpy()

    @property
    def size_bytes(self) -> int:
        return self._size_bytes if self.is_intact else 0

    @property
    def is_intact(self) -> bool:
        return self._logprobs is not None

    @named_out_of_memory()
    def backward(self, gradient: Float32) -> None:
        self._settle()
        logprobs = self._kept()
        self.release()
        push(logprobs, gradient)

    def release(self) -> None:
        self._logprobs = None

    def _kept(self) -> Tensor:
        if self._logprobs is None:
            raise RuntimeError("the graph is released or used up")
        return self._logprobs


class _Meter:
    """Apart from the graph, whose nodes refer to it: a cycle through autograd is never collected."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._counted = {_storage_of(weight) for weight in weights}
        self.size_bytes = 0

    def save(self, tensor: Tensor) -> _Saved:
        storage = _storage_of(tensor)
        if storage not in self._counted:
            self._counted.add(storage)
            self.size_bytes += tensor.untyped_storage().nbytes()
        return tensor, tensor._version


def push(output: Tensor, gradient: Float32, *, always: bool = False) -> None:
    """Backward through `output`, unless nothing would come of it. `always`: other ranks take part."""
    if always or gradient.any():
        output.backward(torch.from_numpy(gradient).to(output.device))


def _restore(saved: _Saved) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError("a tensor that the backward needs was changed after the forward")
    return tensor


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
