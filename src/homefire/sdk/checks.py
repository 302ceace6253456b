"""What is checked before tinker numbers a request.

tinker reserves a sequence number first and encodes afterwards: an error in between leaves a number
that is never sent, and every later call of that client would hang. So nothing that can fail to
encode gets that far. Everything here raises ValueError naming the field and the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from homefire.wire.ids import NAME

if TYPE_CHECKING:
    import tinker

_INT_KEYS = frozenset({"target_tokens"})
_FLOAT_KEYS = frozenset({"weights", "logprobs", "advantages"})
_PER_TOKEN = _INT_KEYS | _FLOAT_KEYS | {"clip_low_threshold", "clip_high_threshold"}
"""Inputs with one entry (or one row of K entries) per position of the model input."""
_DTYPES = frozenset({"float32", "int64"})
_MAX_TOKEN = 2**31 - 1
"""Tokens travel as int32."""


def check_data(data: Sequence[tinker.Datum]) -> None:
    """The datums of a forward or forward_backward call."""
    if isinstance(data, (str, bytes)) or not isinstance(data, Sequence) or not data:
        raise ValueError("data is not a non-empty list: pass a list of tinker.Datum")
    for index, datum in enumerate(data):
        _check_datum(datum, f"data[{index}]")


def check_custom_data(data: Sequence[tinker.Datum]) -> None:
    """As `check_data`; a custom loss also needs targets, whose logprobs it gets."""
    check_data(data)
    for index, datum in enumerate(data):
        if "target_tokens" not in datum.loss_fn_inputs:
            raise ValueError(
                f"data[{index}].loss_fn_inputs has no 'target_tokens': "
                "a custom loss gets the logprobs of the target tokens, so give them"
            )


def check_loss(loss_fn: str, config: Mapping[str, float | str] | None) -> None:
    if not isinstance(loss_fn, str) or not loss_fn:
        raise ValueError(f"loss_fn is {loss_fn!r}: name a loss, e.g. 'cross_entropy'")
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise ValueError("loss_fn_config is not a mapping: pass a dict of numbers and strings")
    for key, value in config.items():
        if not isinstance(key, str):
            raise ValueError(f"loss_fn_config has the key {key!r}: use strings as keys")
        if not isinstance(value, (int, float, str)):
            raise ValueError(
                f"loss_fn_config[{key!r}] must be a number or a string, got {type(value).__name__}"
            )


def check_adam(params: tinker.AdamParams) -> None:
    """Finite numbers only: NaN and infinity cannot be written as JSON."""
    for field, value in params.model_dump().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"adam_params.{field} is {value}: use a finite number")


def check_name(name: str, *, field: str = "name") -> None:
    if not isinstance(name, str) or not NAME.match(name) or ".." in name:
        raise ValueError(
            f"{field} {name!r} is not a valid name: use 1 to 128 of [A-Za-z0-9._:-], "
            "starting with a letter or digit, without '..'"
        )


def check_path(path: str, *, field: str = "path") -> None:
    if not isinstance(path, str) or not path:
        raise ValueError(
            f"{field} {path!r} is not a checkpoint: use a name, or 'cross_job://<job>/<name>'"
        )


def check_ttl(ttl_seconds: int | None) -> None:
    if ttl_seconds is None:
        return
    if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int) or ttl_seconds < 1:
        raise ValueError(
            f"ttl_seconds is {ttl_seconds!r}: use a whole number of seconds >= 1, or None to keep it"
        )


def check_metadata(metadata: Mapping[str, str] | None, *, field: str = "user_metadata") -> None:
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"{field}[{key!r}] is {type(value).__name__}: keys and values must be strings; "
                "write str(value)"
            )


def _check_datum(datum: tinker.Datum, where: str) -> None:
    try:
        model_input, inputs = datum.model_input, datum.loss_fn_inputs
    except AttributeError as exc:
        raise ValueError(
            f"{where} is {type(datum).__name__}: wrap it as tinker.Datum(model_input=…, loss_fn_inputs=…)"
        ) from exc
    length = _length_of(model_input.chunks, where)
    for key, tensor in inputs.items():
        _check_dtype(key, tensor, f"{where}.loss_fn_inputs[{key!r}]")
    if length is not None:
        _check_alignment(inputs, length, where)


def _length_of(chunks: Sequence[Any], where: str) -> int | None:
    """Positions of the input; None when an image hides its number of tokens."""
    if not chunks:
        raise ValueError(f"{where}.model_input has no chunks: use ModelInput.from_ints(tokens)")
    length: int | None = 0
    for chunk in chunks:
        tokens = getattr(chunk, "tokens", None)
        if tokens is None:
            expected = getattr(chunk, "expected_tokens", None)
            length = None if length is None or expected is None else length + expected
            continue
        if len(tokens) and not (min(tokens) >= 0 and max(tokens) <= _MAX_TOKEN):
            raise ValueError(
                f"{where}.model_input has a token id outside 0..{_MAX_TOKEN}: check the tokenizer"
            )
        length = None if length is None else length + len(tokens)
    if length == 0:
        raise ValueError(f"{where}.model_input has no tokens: leave the datum out")
    return length


def _check_dtype(key: str, tensor: tinker.TensorData, where: str) -> None:
    dtype = getattr(tensor, "dtype", None)
    if dtype not in _DTYPES:
        raise ValueError(f"{where} has dtype {dtype!r}: use TensorData of float32 or int64")
    if key in _INT_KEYS and dtype != "int64":
        raise ValueError(f"{where} has dtype {dtype}: token ids must be int64")
    if key in _FLOAT_KEYS and dtype != "float32":
        raise ValueError(f"{where} has dtype {dtype}: use float32")
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is None:
        raise ValueError(f"{where} is sparse without sparse_col_indices: give both index lists")


def _check_alignment(inputs: Mapping[str, tinker.TensorData], length: int, where: str) -> None:
    """target_tokens is [N] or [N, K]; what goes with it has one entry per position or per target."""
    sizes = {length}
    targets = inputs.get("target_tokens")
    if targets is not None:
        shape = _shape_of(targets)
        if not shape or shape[0] != length:
            raise _misaligned("target_tokens", shape, length, where)
        sizes.add(math.prod(shape))
    for key in sorted(_PER_TOKEN & inputs.keys() - {"target_tokens"}):
        shape = _shape_of(inputs[key])
        if math.prod(shape) not in sizes:
            raise _misaligned(key, shape, length, where)


def _misaligned(key: str, shape: Sequence[int], length: int, where: str) -> ValueError:
    return ValueError(
        f"{where}.loss_fn_inputs[{key!r}] has shape {list(shape)} but model_input has {length} "
        "tokens: give one entry per input position (weights of 0 mask positions out)"
    )


def _shape_of(tensor: tinker.TensorData) -> Sequence[int]:
    return tensor.shape if tensor.shape is not None else [tensor.to_numpy().size]
