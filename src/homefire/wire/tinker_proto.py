"""Tinker's binary wire: `forward_backward` requests and their results (tinker 0.25 and later).

Arrays are little-endian bytes. Decoding gives the same `Pass` as JSON does, so that what a request
means, and its digest, do not depend on the wire it came by.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import numpy as np
from google.protobuf.message import DecodeError

from homefire.wire import tinker_public_pb2 as pb
from homefire.wire.engine import Array
from homefire.wire.errors import ErrorRecord, InvalidArgument
from homefire.wire.tinker import (
    ITEM_BYTES,
    OUTPUT_TYPE,
    Pass,
    PassOutput,
    PassRequest,
    RejectedPass,
    Row,
    TensorValue,
    dense_from_csr,
    tensor_value,
)

CONTENT_TYPE = "application/x-protobuf"
_DTYPES = {pb.DTYPE_FLOAT32: "float32", pb.DTYPE_INT64: "int64"}
_DTYPE_CODES = {name: code for code, name in _DTYPES.items()}


def decode_forward_backward(body: bytes) -> PassRequest:
    """Raises InvalidArgument for bytes that are no ForwardBackwardRequest."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as exc:
        raise InvalidArgument(f"the body is not a ForwardBackwardRequest: {exc}") from exc
    return PassRequest(message.model_id, message.seq_id, _pass(message))


def _pass(message: pb.ForwardBackwardRequest) -> Pass | RejectedPass:
    try:
        rows = [_row(datum, index) for index, datum in enumerate(message.data)]
    except InvalidArgument as error:
        return RejectedPass(message.forward_only, ErrorRecord.of(error))
    return Pass(
        rows=rows,
        loss_fn=message.loss_fn,
        loss_fn_config=_config(message),
        forward_only=message.forward_only,
    )


def _config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    """The second map wins: only it can hold strings, and clients write numbers to both."""
    config: dict[str, float | str] = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        config[name] = value.text if value.WhichOneof("value") == "text" else value.number
    return config


def _row(datum: pb.Datum, index: int) -> Row:
    texts = [c.encoded_text.tokens for c in datum.model_input if _is_text(c)]
    foreign = [c.WhichOneof("chunk") or "empty" for c in datum.model_input if not _is_text(c)]
    tokens = b"".join(texts)
    if len(tokens) % 4:
        raise InvalidArgument(f"data[{index}].model_input has a torn token array")
    return Row(tokens, _inputs(datum.loss_fn_inputs, index), foreign)


def _is_text(chunk: pb.Chunk) -> bool:
    return chunk.WhichOneof("chunk") == "encoded_text"


def _inputs(tensors: Mapping[str, pb.Tensor], index: int) -> dict[str, TensorValue]:
    """Sorted by name: a protobuf map has no order, and digests must not depend on one."""
    return {
        name: _tensor(tensors[name], f"data[{index}].loss_fn_inputs.{name}")
        for name in sorted(tensors)
    }


def _tensor(message: pb.Tensor, field: str) -> TensorValue:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidArgument(
            f"{field} has dtype {message.dtype}", hint="use float32 or int64", field=field
        )
    if message.WhichOneof("encoding") == "sparse_csr":
        return _sparse_tensor(message, dtype, field)
    raw = message.dense
    shape = tuple(message.shape) or (len(raw) // ITEM_BYTES[dtype],)
    _check_whole(raw, dtype, field)
    return tensor_value(raw, dtype, shape, field)


def _sparse_tensor(message: pb.Tensor, dtype: str, field: str) -> TensorValue:
    values = _array(message.sparse_csr.values, dtype, field)
    crow = _array(message.sparse_csr.crow_indices, "int64", field)
    col = _array(message.sparse_csr.col_indices, "int64", field)
    shape = tuple(message.shape) or (len(values),)
    dense = dense_from_csr(values, crow, col, shape, field)
    return tensor_value(dense.tobytes(), dtype, shape, field)


def _array(raw: bytes, dtype: str, field: str) -> Array:
    _check_whole(raw, dtype, field)
    return np.frombuffer(raw, dtype=dtype)


def _check_whole(raw: bytes, dtype: str, field: str) -> None:
    if len(raw) % ITEM_BYTES[dtype]:
        raise InvalidArgument(f"{field} has a torn {dtype} array", field=field)


def encode_output(output: PassOutput) -> bytes:
    """One record per run of rows whose trailing shapes are the same, in the order of the rows."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE, metrics=output.metrics)
    for rows in _runs(output.rows()):
        record = message.loss_fn_outputs.add(type_tag=OUTPUT_TYPE, num_datums=len(rows))
        for name in rows[0]:
            _encode_field(record.fields[name], [row[name] for row in rows])
    return message.SerializeToString()


def _encode_field(field: pb.BatchedTensor, arrays: list[Array]) -> None:
    field.data = b"".join(array.tobytes() for array in arrays)
    offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
    field.offsets = offsets.tobytes()
    field.dtype = _DTYPE_CODES[arrays[0].dtype.name]
    field.trailing_shape.extend(arrays[0].shape[1:])


def _runs(rows: list[dict[str, Array]]) -> list[list[dict[str, Array]]]:
    return [list(run) for _, run in groupby(rows, key=_trailing_shapes)]


def _trailing_shapes(row: dict[str, Array]) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in row.values()]
