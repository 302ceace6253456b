"""A model whose weights are read by parts: no process ever holds all of them.

Its module is built without weights first (parameters on torch's `meta` device, buffers real), then
divided, and each process reads the rows that are its own. That needs files whose tensors are the
module's parameters by name and shape; where transformers would convert them (fused experts, other
prefixes) the model is loaded whole instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from homefire.model import verdict
from homefire.model.head import recognised_form
from homefire.model.loading import LoadedModel, described, read_config, serving_dtype_of
from homefire.model.tensors import live_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class FileTensor:
    """A tensor in a file, of which rows of the first axis can be read."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.shape: tuple[int, ...] = tuple(rows.get_shape())

    def __getitem__(self, rows: slice) -> Tensor:
        if rows.start >= min(rows.stop, self.shape[0]):
            return torch.empty((0, *self.shape[1:]))
        return self._rows[rows]


class TensorFiles:
    """The safetensors files of a model directory, open. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._tensors: dict[str, FileTensor] = {}
        for path in _files(directory):
            opened: Any = self._stack.enter_context(safe_open(path, framework="pt"))
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                self._tensors[name] = FileTensor(opened.get_slice(name))

    def __enter__(self) -> Mapping[str, FileTensor]:
        return self._tensors

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def model_without_weights(directory: Path, *, serving_dtype: str) -> LoadedModel | None:
    """The model on `meta`; None where its files have to be converted, or are broken. Errors as of `load_model`, but for
    what only running it shows: `verified` finds that."""
    dtype = serving_dtype_of(serving_dtype)
    config = read_config(directory)
    verdict.refuse_by_config(config.get_text_config())
    module = _on_meta(config)
    verdict.refuse_by_structure(module)
    model = described(module, config, dtype)
    try:
        with TensorFiles(directory) as files:
            return model if _fits(model, files) else None
    except (OSError, SafetensorError):
        return None  # loading them whole names what is wrong


def verified(model: LoadedModel) -> LoadedModel:
    """Of a model whose weights have come: the form of its head and the layout of its rows, measured by
    running it. Where it is divided, all processes run it together."""
    form = model.run_pass(lambda: recognised_form(model.module))
    known = replace(model, logits_form=form)
    return model.run_pass(lambda: verdict.in_exact_layout(known))


@torch.no_grad()
def read_parts(
    model: LoadedModel, directory: Path, rows_of: Callable[[Tensor], slice]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each live parameter with this process's rows of it, as serving values, and each buffer, whole."""
    with TensorFiles(directory) as files:
        for name, leaf in live_tensors(model):
            if isinstance(leaf, nn.Parameter):
                yield leaf, files[name][rows_of(leaf)].to(model.serving_dtype)
            else:
                yield leaf, files[name][0 : len(leaf)].to(leaf.dtype)


def _fits(model: LoadedModel, files: Mapping[str, FileTensor]) -> bool:
    return all(
        leaf.dim() > 0 and name in files and files[name].shape == tuple(leaf.shape)
        for name, leaf in live_tensors(model)
    )


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        single = directory / _SINGLE
        return [single] if single.is_file() else []
    weight_map: dict[str, str] = msgspec.json.decode(index.read_bytes())["weight_map"]
    return [directory / name for name in sorted(set(weight_map.values()))]


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with _parameters_on_meta():
        module: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        )
    return module.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A parameter leaves memory as soon as a module has it. Buffers stay: a rotary table is computed
    when its module is built, and is in no file."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and not param.is_meta:
            on_meta = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            cast(dict[str, Any], self._parameters)[name] = on_meta

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
