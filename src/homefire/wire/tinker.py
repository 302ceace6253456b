"""Tinker messages as JSON: what clients from 0.15 to 0.38, and Fireworks', send to a trainer.

Old clients leave unset fields out, newer ones dump them all, some send explicit nulls: every field
here is optional unless no client ever omits it, and the defaults are the protocol's.
Both wires decode `forward` and `forward_backward` to one `Pass` (see also `tinker_proto`).
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from homefire.wire.engine import Array
from homefire.wire.errors import ErrorRecord, InvalidArgument, Unsupported, UserError
from homefire.wire.json_numbers import NumberReader, encode_with_arrays

MAX_DENSE_ELEMENTS = 1 << 27
"""Elements that a sparse tensor may expand to; checked before anything is allocated."""
OUTPUT_TYPE = "ArrayRecord"
ITEM_BYTES = {"float32": 4, "int64": 8}

# Requests ------------------------------------------------------------------------------------


class CreateSession(msgspec.Struct, frozen=True):
    tags: list[str] | None = None
    user_metadata: dict[str, Any] | None = None
    sdk_version: str | None = None
    project_id: str | None = None
    display_name: str | None = None


class SessionRef(msgspec.Struct, frozen=True):
    session_id: str


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A field that we do not know could mean other numbers, so it is refused by name."""

    rank: int = 32
    alpha: float | None = None
    seed: int | None = None
    init_method: str | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class OptimizerConfig(msgspec.Struct, frozen=True):
    type: str = "adamw"


class CreateModel(msgspec.Struct, frozen=True):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig | None = None
    base_only: bool | None = None
    projection_head_dim: int | None = None


class ModelRef(msgspec.Struct, frozen=True):
    model_id: str


class SaveWeights(msgspec.Struct, frozen=True):
    model_id: str
    seq_id: int
    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool | None = None
    user_metadata: dict[str, Any] | None = None


class SaveWeightsForSampler(msgspec.Struct, frozen=True):
    """With a `path` to keep, or with a `sampling_session_seq_id` to sample at once."""

    model_id: str
    seq_id: int
    path: str | None = None
    sampling_session_seq_id: int | None = None
    kind: str | None = None
    checkpoint_type: str | None = None
    export_precision: str | None = None
    ttl_seconds: int | None = None
    user_metadata: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None


class SaveWeightsExternal(msgspec.Struct, frozen=True):
    model_id: str
    seq_id: int
    path: str
    ttl_seconds: int | None = None
    age_encryption_recipients: list[str] | None = None


class LoadWeights(msgspec.Struct, frozen=True):
    """On a model (`model_id`, in order when it has a `seq_id`), or creating one (`session_id`)."""

    path: str
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    optimizer: bool | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig | None = None
    projection_head_dim: int | None = None


class LoadAdapter(msgspec.Struct, frozen=True):
    model_id: str
    adapter_path: str
    seq_id: int | None = None


class UnloadModel(msgspec.Struct, frozen=True):
    model_id: str
    seq_id: int | None = None


class WeightsInfo(msgspec.Struct, frozen=True):
    tinker_path: str


class RetrieveFuture(msgspec.Struct, frozen=True):
    request_id: str
    allow_metadata_only: bool | None = None


class CancelFuture(msgspec.Struct, frozen=True):
    request_id: str


# Forward and forward_backward ----------------------------------------------------------------


class TensorValue(msgspec.Struct, frozen=True, array_like=True):
    """A dense tensor. Example: TensorValue("int64", (2,), b"\\x02\\0\\0\\0\\0\\0\\0\\0\\x03…")."""

    dtype: str
    """float32 or int64."""
    shape: tuple[int, ...]
    data: bytes
    """Little-endian, C order."""

    def array(self) -> Array:
        return np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape)


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One datum."""

    tokens: bytes
    """int32, little-endian; ids beyond int32 are saturated, which no vocabulary contains."""
    inputs: dict[str, TensorValue]
    foreign_chunks: list[str] = []
    """Types of chunks that are not text, e.g. `image`."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // 4


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """`forward` or `forward_backward`, decoded from either wire but not yet checked."""

    rows: list[Row]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}
    forward_only: bool = False


class RejectedPass(msgspec.Struct, frozen=True):
    """Its tensors contradict themselves. The request keeps its place in the order, and fails there."""

    forward_only: bool
    error: ErrorRecord


class PassRequest(msgspec.Struct, frozen=True):
    model_id: str
    seq_id: int
    body: Pass | RejectedPass


_NULL = msgspec.Raw(b"null")


def _is_null(raw: msgspec.Raw) -> bool:
    """Absent, most of the time, and then the default itself."""
    return raw is _NULL or bytes(raw) == b"null"


class _Chunk(msgspec.Struct, frozen=True):
    tokens: msgspec.Raw = _NULL
    type: str | None = None
    data: str | None = None
    dmel: str | None = None

    @property
    def is_text(self) -> bool:
        return not _is_null(self.tokens)


class _ModelInput(msgspec.Struct, frozen=True):
    """What replays an expert's routing or a sampler's choices is refused: see `_check_replays`."""

    chunks: list[_Chunk]
    routing_matrices: msgspec.Raw = _NULL
    routing_references: msgspec.Raw = _NULL
    top_sampling_references: msgspec.Raw = _NULL
    sampling_mask_references: msgspec.Raw = _NULL


class _Tensor(msgspec.Struct, frozen=True):
    """Arrays of numbers stay text until `NumberReader` takes them."""

    data: msgspec.Raw
    dtype: str
    shape: tuple[int, ...] | None = None
    sparse_crow_indices: msgspec.Raw = _NULL
    sparse_col_indices: msgspec.Raw = _NULL


class _Datum(msgspec.Struct, frozen=True):
    model_input: _ModelInput
    loss_fn_inputs: dict[str, _Tensor] = {}


class _Input(msgspec.Struct, frozen=True):
    data: list[_Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardRequest(msgspec.Struct, frozen=True):
    """Body of POST forward."""

    model_id: str
    seq_id: int
    forward_input: _Input


class ForwardBackwardRequest(msgspec.Struct, frozen=True):
    """Body of POST forward_backward; newer JSON clients may ask for the forward half only."""

    model_id: str
    seq_id: int
    forward_backward_input: _Input
    forward_only: bool | None = None


def forward_pass(request: ForwardRequest) -> PassRequest:
    """Takes milliseconds per MB."""
    body = _pass(request.forward_input, forward_only=True)
    return PassRequest(request.model_id, request.seq_id, body)


def forward_backward_pass(request: ForwardBackwardRequest) -> PassRequest:
    body = _pass(request.forward_backward_input, forward_only=bool(request.forward_only))
    return PassRequest(request.model_id, request.seq_id, body)


def _pass(given: _Input, *, forward_only: bool) -> Pass | RejectedPass:
    reader = NumberReader()
    try:
        rows = [_row(datum, index, reader) for index, datum in enumerate(given.data)]
    except UserError as error:
        return RejectedPass(forward_only, ErrorRecord.of(error))
    return Pass(
        rows=rows,
        loss_fn=given.loss_fn,
        loss_fn_config=given.loss_fn_config or {},
        forward_only=forward_only,
    )


def _row(datum: _Datum, index: int, reader: NumberReader) -> Row:
    where = f"data[{index}].model_input"
    _check_replays(datum.model_input, where)
    chunks = datum.model_input.chunks
    text = [reader.tokens(chunk.tokens, where) for chunk in chunks if chunk.is_text]
    foreign = [_foreign_type(chunk) for chunk in chunks if not chunk.is_text]
    inputs = {
        name: _tensor(tensor, f"data[{index}].loss_fn_inputs.{name}", reader)
        for name, tensor in datum.loss_fn_inputs.items()
    }
    return Row(b"".join(text), inputs, foreign)


def _check_replays(given: _ModelInput, where: str) -> None:
    for name in given.__struct_fields__[1:]:
        if not _is_null(getattr(given, name)):
            raise Unsupported(
                f"{where}.{name} is not supported: nothing is replayed of how tokens were routed "
                "or sampled",
                hint="leave it out; the trainer computes the forward pass on its own",
                field=f"{where}.{name}",
            )


def _foreign_type(chunk: _Chunk) -> str:
    """Clients before 0.18 send no `type`: the keys tell."""
    return chunk.type or ("dmel" if chunk.dmel is not None else "image")


def _tensor(tensor: _Tensor, field: str, reader: NumberReader) -> TensorValue:
    values = reader.values(tensor.data, tensor.dtype, field)
    shape = tensor.shape if tensor.shape is not None else (len(values),)
    if not _is_null(tensor.sparse_crow_indices):
        crow = reader.values(tensor.sparse_crow_indices, "int64", field)
        col = reader.values(tensor.sparse_col_indices, "int64", field)
        values = dense_from_csr(values, crow, col, shape, field)
    return tensor_value(values.tobytes(), tensor.dtype, shape, field)


def tensor_value(data: bytes, dtype: str, shape: tuple[int, ...], field: str) -> TensorValue:
    size = len(data) // ITEM_BYTES[dtype]
    if min(shape, default=0) < 0 or math.prod(shape) != size:
        raise InvalidArgument(
            f"{field} has {size} values but shape {list(shape)}",
            hint="the product of shape must be the number of values",
            field=field,
        )
    return TensorValue(dtype, shape, data)


def dense_from_csr(
    values: Array, crow: Array, col: Array, shape: tuple[int, ...], field: str
) -> Array:
    """Expands a 2-D CSR tensor after checking its indices; the absent elements are 0."""
    if len(shape) != 2 or min(shape) < 0 or math.prod(shape) > MAX_DENSE_ELEMENTS:
        raise InvalidArgument(f"{field} is sparse with shape {list(shape)}", field=field)
    counts = np.diff(crow)
    sane = (
        len(crow) == shape[0] + 1
        and crow[0] == 0
        and (counts >= 0).all()
        and crow[-1] == len(values) == len(col)
        and ((col >= 0) & (col < shape[1])).all()
    )
    if not sane:
        raise InvalidArgument(f"{field} has inconsistent sparse indices", field=field)
    dense = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), col] = values
    return dense.reshape(-1)


# Results -------------------------------------------------------------------------------------


class RowArrays(msgspec.Struct, frozen=True, array_like=True):
    """One array per row, end to end.

    Example: rows of 3 and 2 tokens: RowArrays("float32", [(3,), (2,)], b"…20 bytes").
    """

    dtype: str
    """float32 or int64."""
    shapes: list[tuple[int, ...]]
    data: bytes
    """Little-endian, C order."""

    def rows(self) -> list[Array]:
        flat = np.frombuffer(self.data, dtype=self.dtype)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes], dtype=np.int64)
        parts = np.split(flat, ends[:-1]) if len(ends) else []
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class PassOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a forward or forward_backward.

    Example: PassOutput(metrics={"loss:sum": 1.2}, arrays={"logprobs": RowArrays(…)}).
    """

    metrics: dict[str, float]
    """Every key has exactly one colon, with its reduction behind it. Only `loss` of a contrastive
    loss has none: its one client reads it under that name, and never merges chunks."""
    arrays: dict[str, RowArrays]
    """What each row has, by name; all hold the same number of rows."""

    @property
    def size_bytes(self) -> int:
        return sum(len(packed.data) for packed in self.arrays.values())

    def rows(self) -> list[dict[str, Array]]:
        columns = [packed.rows() for packed in self.arrays.values()]
        return [dict(zip(self.arrays, row, strict=True)) for row in zip(*columns, strict=True)]


def output_json(output: PassOutput) -> bytes:
    dtypes = {name: packed.dtype for name, packed in output.arrays.items()}
    body = {
        "loss_fn_output_type": OUTPUT_TYPE,
        "loss_fn_outputs": [
            {name: _tensor_json(values, dtypes[name]) for name, values in row.items()}
            for row in output.rows()
        ],
        "metrics": output.metrics,
    }
    return encode_with_arrays(body)


def _tensor_json(values: Array, dtype: str) -> dict[str, Any]:
    """Every digit of a float32, not the fewest that tell it from its neighbours: who reads them as
    float64 gets the same number as over the binary wire.

    `dtype` is the array's; asking numpy for its name takes longer than the rest.
    """
    exact = values.astype(np.float64) if dtype == "float32" else values
    return {"data": exact.ravel(), "dtype": dtype, "shape": list(values.shape)}
