from __future__ import annotations

import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from homefire.wire.engine import ExecutionPlan, Failure, Forward, Rows
from homefire.wire.engine_frames import (
    PREFIX_BYTES,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    frame_rest,
    read_frame,
)
from homefire.wire.errors import ErrorRecord

ARRAYS = hnp.arrays(
    dtype=st.sampled_from([np.int32, np.int64, np.float32]),
    shape=hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
    elements={"allow_nan": False},
)


def forward(rows: list[int]) -> Forward:
    plan = ExecutionPlan(micro_batches=[rows], threads=1)
    return Forward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)


@given(st.dictionaries(st.text(min_size=1, max_size=8), ARRAYS, max_size=4))
def test_arrays_of_any_shape_survive_a_frame(arrays):
    message, decoded = decode_request(encode_request(forward([0]), arrays))
    assert message == forward([0])
    assert decoded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert decoded[name].dtype == array.dtype
        np.testing.assert_array_equal(decoded[name], array)


def test_a_reply_keeps_its_type():
    failure = Failure(ErrorRecord("unknown_loss", "user", "no"))
    assert decode_reply(encode_reply(failure)) == (failure, {})
    rows = Rows(metrics={"loss:sum": 2.0})
    assert decode_reply(encode_reply(rows, {}))[0] == rows


def test_frames_follow_each_other_on_a_socket_until_its_clean_end():
    left, right = socket.socketpair()
    frames = [encode_request(forward([k]), {"tokens": np.arange(1000 * k)}) for k in range(4)]

    def send() -> None:
        for frame in frames:
            left.sendall(frame)
        left.close()

    sender = threading.Thread(target=send)
    sender.start()
    received = []
    while (frame := read_frame(right)) is not None:
        received.append(frame)
    sender.join()
    right.close()
    assert received == frames


def test_a_peer_that_speaks_something_else_is_refused():
    with pytest.raises(ValueError, match="not a homefire engine frame"):
        frame_rest(b"HTTP/1.1 200 OK."[:PREFIX_BYTES])
