"""Both wires against tinker's own encoders and decoders, and against each other."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.wire import tinker_proto
from homefire.wire.errors import InvalidArgument
from homefire.wire.json_numbers import token_bytes
from homefire.wire.tinker import (
    ForwardBackwardRequest,
    ForwardRequest,
    Pass,
    PassOutput,
    PassRequest,
    RejectedPass,
    RowArrays,
    forward_backward_pass,
    forward_pass,
    output_json,
)

tinker = pytest.importorskip("tinker")
request_conv = pytest.importorskip("tinker.proto.request_conv")
response_conv = pytest.importorskip("tinker.proto.response_conv")

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def datums(draw: st.DrawFn) -> Any:
    tokens = draw(TOKENS)
    width = draw(st.integers(0, 3))
    shape = [len(tokens), width] if width else [len(tokens)]
    size = len(tokens) * max(width, 1)
    targets = draw(st.lists(st.integers(0, 2**40), min_size=size, max_size=size))
    weights = draw(st.lists(FLOATS, min_size=size, max_size=size))
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=targets, dtype="int64", shape=shape),
            "weights": tinker.TensorData(data=weights, dtype="float32", shape=shape),
        },
    )


def request_of(data: list[Any], **config: float | str) -> Any:
    given_input = tinker.types.ForwardBackwardInput(
        data=data, loss_fn="cross_entropy", loss_fn_config=config or None
    )
    return tinker.types.ForwardBackwardRequest(
        model_id="s:train:0", seq_id=7, forward_backward_input=given_input
    )


def by_proto(request: Any) -> Any:
    message = request_conv.forward_backward_request_to_proto(request)
    return tinker_proto.decode_forward_backward(message.SerializeToString())


def by_json(body: Any) -> Any:
    return forward_backward_pass(msgspec.json.decode(json.dumps(body), type=ForwardBackwardRequest))


def old_json(data: list[Any], *, bare: bool) -> dict[str, Any]:
    """As 0.15 (`bare`: no chunk types) and 0.22 write it."""
    rows = []
    for datum in data:
        tokens = [token for chunk in datum.model_input.chunks for token in chunk.tokens]
        chunk = {"tokens": tokens} if bare else {"tokens": tokens, "type": "encoded_text"}
        inputs = {
            name: {"data": list(t.data), "dtype": t.dtype, "shape": t.shape}
            for name, t in datum.loss_fn_inputs.items()
        }
        rows.append({"model_input": {"chunks": [chunk]}, "loss_fn_inputs": inputs})
    body = {"data": rows, "loss_fn": "cross_entropy", "loss_fn_config": None}
    return {"model_id": "s:train:0", "seq_id": 7, "forward_backward_input": body}


def canonical(request: PassRequest) -> bytes:
    return msgspec.msgpack.Encoder(order="deterministic").encode(request)


@settings(max_examples=60, deadline=None)
@given(st.lists(datums(), max_size=3), st.booleans())
def test_both_wires_and_all_dialects_decode_to_the_same_request(
    data: list[Any], bare: bool
) -> None:
    assert canonical(by_json(old_json(data, bare=bare))) == canonical(by_proto(request_of(data)))


@settings(max_examples=60, deadline=None)
@given(st.lists(datums(), min_size=1, max_size=3))
def test_a_decoded_request_holds_what_tinker_encoded(data: list[Any]) -> None:
    decoded = by_proto(request_of(data))
    assert (decoded.model_id, decoded.seq_id) == ("s:train:0", 7)
    for row, datum in zip(decoded.body.rows, data, strict=True):
        assert np.frombuffer(row.tokens, np.int32).tolist() == list(
            datum.model_input.chunks[0].tokens
        )
        for name, tensor in datum.loss_fn_inputs.items():
            array = row.inputs[name].array()
            assert array.dtype.name == tensor.dtype
            assert list(array.shape) == tensor.shape
            assert array.ravel().tolist() == list(tensor.data)


def test_numbers_and_texts_of_the_loss_config_arrive() -> None:
    decoded = by_proto(request_of([], clip_low_threshold=0.5, loss_id="abc"))
    assert decoded.body.loss_fn_config == {"clip_low_threshold": 0.5, "loss_id": "abc"}


def test_forward_only_is_read_from_both_wires_and_from_the_path() -> None:
    message = request_conv.forward_backward_request_to_proto(request_of([]))
    message.forward_only = True
    assert tinker_proto.decode_forward_backward(message.SerializeToString()).body.forward_only
    assert not by_proto(request_of([])).body.forward_only
    body = old_json([], bare=True)
    assert not by_json(body).body.forward_only
    forward = {**body, "forward_input": body["forward_backward_input"]}
    decoded = msgspec.json.decode(json.dumps(forward), type=ForwardRequest)
    assert forward_pass(decoded).body.forward_only


def test_sparse_tensors_are_expanded_alike_on_both_wires() -> None:
    dense = [[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]]
    sparse = {
        "data": [1.0, 2.0, 3.0],
        "dtype": "float32",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 1, 3],
        "sparse_col_indices": [1, 0, 2],
    }
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2]),
        loss_fn_inputs={"weights": tinker.TensorData(**sparse)},
    )
    (row,) = by_proto(request_of([datum])).body.rows
    assert row.inputs["weights"].array().tolist() == dense
    body = old_json([], bare=True)
    chunks = {"chunks": [{"tokens": [1, 2]}]}
    body["forward_backward_input"]["data"] = [
        {"model_input": chunks, "loss_fn_inputs": {"weights": sparse}}
    ]
    assert by_json(body).body.rows == [row]


@pytest.mark.parametrize(
    "broken",
    [
        {"sparse_crow_indices": [0, 1]},
        {"sparse_crow_indices": [0, 3, 1]},
        {"sparse_crow_indices": [1, 1, 3]},
        {"sparse_col_indices": [0, 0, 3]},
        {"sparse_col_indices": [0, 0, -1]},
        {"shape": [2]},
        {"shape": [1 << 40, 1 << 40]},
        {"dtype": "float64"},
        {"dtype": "int64", "data": [0.5, 1, 1]},
        {"shape": [-1, -3], "sparse_crow_indices": None},
    ],
)
def test_tensors_that_contradict_themselves_are_refused_by_name(broken: dict[str, Any]) -> None:
    tensor = {
        "data": [1.0, 2.0, 3.0],
        "dtype": "float32",
        "shape": [2, 3],
        "sparse_crow_indices": [0, 1, 3],
        "sparse_col_indices": [1, 0, 2],
        **broken,
    }
    body = old_json([], bare=True)
    chunks = {"chunks": [{"tokens": [1]}]}
    body["forward_backward_input"]["data"] = [
        {"model_input": chunks, "loss_fn_inputs": {"w": tensor}}
    ]
    rejected = by_json(body).body
    assert isinstance(rejected, RejectedPass)
    assert rejected.error.code == "invalid_argument"
    assert rejected.error.field == "data[0].loss_fn_inputs.w"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_request_or_an_invalid_one_never_a_crash(body: bytes) -> None:
    try:
        decoded = tinker_proto.decode_forward_backward(body)
    except InvalidArgument:
        return
    assert isinstance(decoded.body, Pass | RejectedPass)


def test_a_token_beyond_int32_saturates_instead_of_wrapping_into_the_vocabulary() -> None:
    tokens = [5, (1 << 32) + 5, -(1 << 70)]
    limits = np.iinfo(np.int32)
    assert np.frombuffer(token_bytes(tokens), np.int32).tolist() == [5, limits.max, limits.min]


@st.composite
def outputs(draw: st.DrawFn) -> PassOutput:
    """Logprobs of rows; often with the likeliest tokens beside them."""
    shapes = draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(1, 4)), st.tuples(st.integers(1, 4), st.integers(1, 3))
            ),
            max_size=5,
        )
    )
    arrays = {"logprobs": draw(row_arrays(shapes, FLOATS, "float32"))}
    if draw(st.booleans()):
        wide = [(shape[0], 3) for shape in shapes]
        arrays["top_k_logprobs"] = draw(row_arrays(wide, FLOATS, "float32"))
        arrays["top_k_indices"] = draw(row_arrays(wide, st.integers(0, 1 << 40), "int64"))
    return PassOutput(metrics={"loss:sum": 1.5}, arrays=arrays)


@st.composite
def row_arrays(
    draw: st.DrawFn, shapes: list[tuple[int, ...]], values: st.SearchStrategy[Any], dtype: str
) -> RowArrays:
    size = sum(int(np.prod(shape)) for shape in shapes)
    drawn = draw(st.lists(values, min_size=size, max_size=size))
    return RowArrays(dtype, shapes, np.array(drawn, dtype=dtype).tobytes())


@settings(max_examples=60, deadline=None)
@given(outputs())
def test_tinker_reads_both_results_as_the_same_rows(output: PassOutput) -> None:
    binary = response_conv.deserialize_forward_backward_output(tinker_proto.encode_output(output))
    plain = json.loads(output_json(output))
    assert binary.metrics == plain["metrics"] == {"loss:sum": 1.5}
    rows = output.rows()
    assert len(binary.loss_fn_outputs) == len(plain["loss_fn_outputs"]) == len(rows)
    for mine, theirs, row in zip(
        plain["loss_fn_outputs"], binary.loss_fn_outputs, rows, strict=True
    ):
        assert mine.keys() == theirs.keys() == row.keys()
        for name, tensor in theirs.items():
            assert mine[name]["shape"] == list(tensor.shape) == list(row[name].shape)
            assert mine[name]["data"] == list(tensor.data)
            assert mine[name]["dtype"] == tensor.dtype
