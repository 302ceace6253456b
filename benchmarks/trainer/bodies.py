"""Bodies of forward_backward requests as clients write them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from homefire.wire import tinker_proto
from homefire.wire import tinker_public_pb2 as pb

Encode = Callable[[str, int, list[int], int], bytes]
"""Model id, seq, row lengths, vocabulary -> body."""

JSON = "application/json"
PROTOBUF = tinker_proto.CONTENT_TYPE


def json_body(model: str, seq: int, lengths: list[int], vocabulary: int) -> bytes:
    """Floats with the digits that Python gives a float32: 20 characters each, mostly."""
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": row["tokens"].tolist()}]},
            "loss_fn_inputs": {
                name: {
                    "data": row[name].tolist(),
                    "dtype": "int64" if name == "target_tokens" else "float32",
                    "shape": [len(row[name])],
                }
                for name in ("target_tokens", "logprobs", "advantages")
            },
        }
        for row in _columns(lengths, vocabulary)
    ]
    given = {"data": data, "loss_fn": "importance_sampling"}
    body = {"model_id": model, "seq_id": seq, "forward_backward_input": given}
    return json.dumps(body, separators=(",", ":")).encode()


def protobuf_body(model: str, seq: int, lengths: list[int], vocabulary: int) -> bytes:
    message = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="importance_sampling")
    for row in _columns(lengths, vocabulary):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = row["tokens"].astype("<i4").tobytes()
        for name in ("target_tokens", "logprobs", "advantages"):
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype = pb.DTYPE_INT64 if name == "target_tokens" else pb.DTYPE_FLOAT32
            tensor.dense = row[name].tobytes()
            tensor.shape.append(len(row[name]))
    return message.SerializeToString()


def _columns(lengths: list[int], vocabulary: int) -> list[dict[str, np.ndarray]]:
    """Logprobs as a sampler gives them, one advantage for a row."""
    generator = np.random.default_rng(0)
    return [
        {
            "tokens": generator.integers(0, vocabulary, length),
            "target_tokens": generator.integers(0, vocabulary, length),
            "logprobs": -generator.exponential(size=length).astype(np.float32),
            "advantages": np.full(length, generator.standard_normal(), np.float32),
        }
        for length in lengths
    ]
