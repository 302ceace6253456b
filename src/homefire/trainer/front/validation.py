"""A forward or forward_backward is checked whole before the engine sees any of it.

Errors name the datum, the field and the remedy. What passes becomes one `Batch` of packed arrays.
Shapes are compared row by row, numbers where they lie packed: a thousand rows are one comparison, and
only a batch that fails it is gone through again, for the row to name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from homefire.wire.engine import Array, Arrays
from homefire.wire.errors import (
    InvalidArgument,
    LengthMismatch,
    SequenceTooLong,
    TokenOutOfRange,
    Unsupported,
)
from homefire.wire.losses import (
    DEFAULT_THRESHOLDS,
    SEQUENCE_RATIO_MASK,
    LossDefinition,
    loss_definition,
    require_threshold,
)
from homefire.wire.pass_extras import (
    EMBEDDING_GRADS,
    MAX_TOP_ELEMENTS,
    EmbeddingPass,
    read_extras,
)
from homefire.wire.tinker import Pass, Row, RowArrays, TensorValue


@dataclass(frozen=True)
class Limits:
    vocab_size: int
    max_context_length: int


@dataclass(frozen=True)
class Batch:
    """Arrays as `homefire.wire.engine` describes them, and the shape of each row's targets."""

    arrays: Arrays
    num_rows: int
    shapes: list[tuple[int, ...]]
    """Empty where a pass has no targets."""

    def unpack(self, reply: Arrays) -> dict[str, RowArrays]:
        """The engine's arrays, cut into rows."""
        return {name: self._cut(name, array) for name, array in reply.items()}

    def _cut(self, name: str, array: Array) -> RowArrays:
        if name == "logprobs":
            return RowArrays("float32", self.shapes, self._logprobs(array))
        shapes = [(shape[0], *array.shape[1:]) for shape in self.shapes]
        if not self.shapes:
            shapes = [array.shape[1:]] * self.num_rows
        return RowArrays(array.dtype.name, shapes, np.ascontiguousarray(array).tobytes())

    def _logprobs(self, array: Array) -> bytes:
        """[T, K] as the rows' own shapes, end to end: a row with fewer targets per token than the
        widest had the rest padded away."""
        width = array.shape[1]
        if all(math.prod(shape[1:]) == width for shape in self.shapes):
            return np.ascontiguousarray(array, dtype=np.float32).tobytes()
        ends = np.cumsum([shape[0] for shape in self.shapes])
        rows = np.split(array, ends[:-1])
        return b"".join(
            np.ascontiguousarray(row[:, : math.prod(shape[1:])], dtype=np.float32).tobytes()
            for row, shape in zip(rows, self.shapes, strict=True)
        )


def check_batch(body: Pass, limits: Limits) -> Batch:
    """The whole request, or the first thing that is wrong with it as a UserError."""
    extras = read_extras(
        body.loss_fn,
        body.loss_fn_config,
        num_rows=len(body.rows),
        forward_only=body.forward_only,
    )
    if not body.rows:
        raise InvalidArgument("data is empty", hint="send at least one datum", field="data")
    for index, row in enumerate(body.rows):
        _check_tokens(row, index, limits)
    arrays = _pack_tokens(body.rows)
    if _has_outside(arrays["tokens"], limits):
        _name_token_outside(body.rows, limits)
    if extras.embedding is not None:
        return _embedding_batch(body, arrays, extras.embedding)
    if extras.top_k is not None:
        _check_top_elements(body, extras.top_k)
    loss = loss_definition(body.loss_fn, extras.loss_config)
    for index, row in enumerate(body.rows):
        _check_inputs(row, index, loss, body.loss_fn)
    arrays |= _pack_inputs(body, loss)
    _check_numbers(arrays, body.rows, limits)
    return Batch(arrays, len(body.rows), [row.inputs["target_tokens"].shape for row in body.rows])


def _check_top_elements(body: Pass, top_k: int) -> None:
    num_tokens = sum(row.num_tokens for row in body.rows)
    if num_tokens * top_k > MAX_TOP_ELEMENTS:
        raise InvalidArgument(
            f"top_k {top_k} of {num_tokens} tokens is more than {MAX_TOP_ELEMENTS} values",
            hint="send fewer datums at a time",
            field="loss_fn_config.top_k",
        )


def _embedding_batch(body: Pass, arrays: Arrays, asked: EmbeddingPass) -> Batch:
    """Rows alone; a backward pass through a client's own loss brings each row's gradient.

    Targets that come along are not looked at: clients send whatever their datums hold.
    """
    if not body.forward_only and asked.contrast is None:
        arrays[EMBEDDING_GRADS] = _pack_embedding_gradients(body.rows)
    return Batch(arrays, len(body.rows), [])


def _pack_embedding_gradients(rows: Sequence[Row]) -> Array:
    """float32 [N, E]"""
    gradients = [_embedding_gradient(row, index) for index, row in enumerate(rows)]
    for index, gradient in enumerate(gradients):
        if len(gradient) != len(gradients[0]):
            field = f"data[{index}].loss_fn_inputs.{EMBEDDING_GRADS}"
            raise LengthMismatch(
                f"{field} has {len(gradient)} values, the first datum's {len(gradients[0])}",
                hint="send the gradient of what forward returned for each datum",
                field=field,
            )
    return np.stack(gradients).astype(np.float32, copy=False)


def _embedding_gradient(row: Row, index: int) -> Array:
    field = f"data[{index}].loss_fn_inputs.{EMBEDDING_GRADS}"
    given = row.inputs.get(EMBEDDING_GRADS)
    if given is None:
        raise InvalidArgument(
            f"{field} is missing", hint="send d loss / d embedding of each datum", field=field
        )
    _check_finite(given, field)
    return given.array().reshape(-1)


def _check_tokens(row: Row, index: int, limits: Limits) -> None:
    field = f"data[{index}].model_input"
    if row.foreign_chunks:
        kinds = ", ".join(sorted(set(row.foreign_chunks)))
        raise Unsupported(f"{field} has chunks of type {kinds}", hint="send text only", field=field)
    if row.num_tokens == 0:
        raise InvalidArgument(f"{field} has no tokens", field=field)
    if row.num_tokens > limits.max_context_length:
        raise SequenceTooLong(
            f"{field} has {row.num_tokens} tokens, the context length is {limits.max_context_length}",
            hint="cut the sequence, or train with a shape of longer context",
            field=field,
        )


def _has_outside(tokens: Array, limits: Limits) -> bool:
    return bool(len(tokens)) and bool(tokens.min() < 0 or tokens.max() >= limits.vocab_size)


def _name_token_outside(rows: Sequence[Row], limits: Limits) -> None:
    for index, row in enumerate(rows):
        tokens = np.frombuffer(row.tokens, dtype=np.int32)
        _check_vocabulary(tokens, f"data[{index}].model_input", limits)


def _check_vocabulary(tokens: Array, field: str, limits: Limits) -> None:
    wrong = (tokens < 0) | (tokens >= limits.vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong.reshape(-1)))
        raise TokenOutOfRange(
            f"{field} has token {int(tokens.reshape(-1)[at])} at {at}",
            hint=f"token ids of this model are 0 to {limits.vocab_size - 1}; is it the right tokenizer?",
            field=field,
        )


def _check_inputs(row: Row, index: int, loss: LossDefinition, loss_fn: str) -> None:
    inputs = row.inputs
    for name in ("target_tokens", *loss.required):
        if name not in inputs:
            where = f"data[{index}].loss_fn_inputs"
            raise InvalidArgument(
                f"{where} lacks {name!r}, which {loss_fn} needs", field=f"{where}.{name}"
            )
    used = ("target_tokens", *loss.required, *loss.optional)
    if not loss.takes_any_input and not inputs.keys() <= set(used):
        _refuse_unknown(inputs, used, index, loss_fn)
    _check_targets(row, index, loss)
    shape = inputs["target_tokens"].shape
    for name in used[1:]:
        given = inputs.get(name)
        if given is not None and given.shape != shape:
            field = f"data[{index}].loss_fn_inputs.{name}"
            raise LengthMismatch(
                f"{field} has shape {list(given.shape)}, target_tokens has {list(shape)}",
                hint="one value per target",
                field=field,
            )


def _refuse_unknown(given: Iterable[str], used: Sequence[str], index: int, loss_fn: str) -> None:
    where, unknown = f"data[{index}].loss_fn_inputs", min(set(given) - set(used))
    raise InvalidArgument(
        f"{where} has {unknown!r}, which {loss_fn} does not take",
        hint=f"it takes {', '.join(used)}; mask tokens with zero advantages",
        field=f"{where}.{unknown}",
    )


def _check_targets(row: Row, index: int, loss: LossDefinition) -> None:
    field = f"data[{index}].loss_fn_inputs.target_tokens"
    targets = row.inputs["target_tokens"]
    if targets.dtype != "int64":
        raise InvalidArgument(f"{field} has dtype {targets.dtype}", hint="use int64", field=field)
    num_axes = len(targets.shape)
    if num_axes not in ((1, 2) if loss.takes_many_targets else (1,)) or 0 in targets.shape[1:]:
        hint = "use one target per token, or [tokens, targets] with cross_entropy"
        raise InvalidArgument(f"{field} has shape {list(targets.shape)}", hint=hint, field=field)
    if targets.shape[0] != row.num_tokens:
        raise LengthMismatch(
            f"{field} has {targets.shape[0]} targets, model_input has {row.num_tokens} tokens",
            hint="the input is full[:-1], the targets are full[1:]",
            field=field,
        )


def _check_numbers(arrays: Arrays, rows: Sequence[Row], limits: Limits) -> None:
    """Targets are tokens, all else is finite."""
    for name, array in arrays.items():
        if name == "target_tokens" and _has_outside(array, limits):
            for field, value in _given(rows, name):
                _check_vocabulary(value.array(), field, limits)
        elif array.dtype == np.float32 and not np.isfinite(array).all():
            for field, value in _given(rows, name):
                _check_finite(value, field)


def _given(rows: Sequence[Row], name: str) -> Iterator[tuple[str, TensorValue]]:
    """An input of the rows that have it, and the field that it came in."""
    for index, row in enumerate(rows):
        if name in row.inputs:
            yield f"data[{index}].loss_fn_inputs.{name}", row.inputs[name]


def _check_finite(value: TensorValue, field: str) -> None:
    if not np.isfinite(value.array()).all():
        raise InvalidArgument(f"{field} holds NaN or Inf", hint="use finite numbers", field=field)


# Packing -------------------------------------------------------------------------------------


def _pack_inputs(body: Pass, loss: LossDefinition) -> Arrays:
    """Axes: T tokens of all rows end to end, K targets per token."""
    arrays = {"target_tokens": _pack_targets(body.rows)}
    if body.loss_fn == "cross_entropy":
        arrays["weights"] = _pack_weights(body.rows, arrays["target_tokens"].shape[1])
    for name in loss.required:
        arrays[name] = _concatenate(body.rows, lambda row, name=name: row.inputs[name].array())
    for name in loss.optional:
        if name != "weights" and _is_needed(body, loss, name):
            arrays[name] = _pack_optional(body, loss, name)
    return arrays


def _pack_tokens(rows: Sequence[Row]) -> Arrays:
    return {
        "tokens": np.frombuffer(b"".join(row.tokens for row in rows), dtype=np.int32),
        "lengths": np.array([row.num_tokens for row in rows], dtype=np.int32),
    }


def _pack_targets(rows: Sequence[Row]) -> Array:
    parts = [_as_matrix(row.inputs["target_tokens"].array()) for row in rows]
    return _stack(parts).astype(np.int64, copy=False)


def _pack_weights(rows: Sequence[Row], width: int) -> Array:
    """float32 [T, K]; absent weights are 1, padded targets have 0."""
    parts = [_as_matrix(_weights(row)) for row in rows]
    return _widened(_stack(parts), width).astype(np.float32, copy=False)


def _weights(row: Row) -> Array:
    given = row.inputs.get("weights")
    return np.ones(row.inputs["target_tokens"].shape) if given is None else given.array()


def _as_matrix(array: Array) -> Array:
    return array.reshape(array.shape[0], -1)


def _stack(parts: Sequence[Array]) -> Array:
    width = max(part.shape[1] for part in parts)
    return np.concatenate([_widened(part, width) for part in parts])


def _widened(part: Array, width: int) -> Array:
    """Zeros behind the last column. `np.pad` costs more than all else here, so only where it must."""
    missing = width - part.shape[1]
    return np.pad(part, ((0, 0), (0, missing))) if missing else part


def _concatenate(rows: Sequence[Row], values_of: Callable[[Row], Array]) -> Array:
    return np.concatenate([values_of(row).reshape(-1) for row in rows]).astype(
        np.float32, copy=False
    )


def _is_needed(body: Pass, loss: LossDefinition, name: str) -> bool:
    """Some datum has it, or none does and nothing else gives what the loss must have."""
    given = any(name in row.inputs for row in body.rows)
    return given or (name in loss.required_config and name not in body.loss_fn_config)


def _pack_optional(body: Pass, loss: LossDefinition, name: str) -> Array:
    """Per token: the datum's own, else what holds for a datum without it."""

    def values_of(row: Row) -> Array:
        given = row.inputs.get(name)
        return _absent(body, loss, name, row) if given is None else given.array()

    return _concatenate(body.rows, values_of)


def _absent(body: Pass, loss: LossDefinition, name: str, row: Row) -> Array:
    if name == SEQUENCE_RATIO_MASK:
        return row.inputs["advantages"].array() != 0
    require_threshold(body.loss_fn, loss, name, body.loss_fn_config)
    common = body.loss_fn_config.get(name, DEFAULT_THRESHOLDS[name])
    return np.full(row.num_tokens, float(common))
