"""Ids are read from an envelope, whatever stands before or after them, and nothing else is built."""

from __future__ import annotations

import pytest
import zstandard

from homefire.gateway.caller import Caller
from homefire.gateway.envelope import Envelope, read_envelope, text_field
from homefire.wire import tinker_public_pb2 as pb
from homefire.wire.errors import InvalidArgument, PayloadTooLarge, Unsupported

PROTO = "application/x-protobuf"


async def read(body: bytes, *, max_bytes: int = 1 << 20, **headers: str) -> Envelope:
    sent = {
        "content-length": str(len(body)),
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "state": {"account": "local", "request_id": "r"},
    }

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        raise AssertionError(message)

    return await read_envelope(Caller(scope, receive, send), max_bytes=max_bytes)


def message(model_id: str = "ts-1:train:0", *, num_rows: int = 3) -> bytes:
    request = pb.ForwardBackwardRequest(model_id=model_id, seq_id=7, loss_fn="cross_entropy")
    for _ in range(num_rows):
        datum = request.data.add()
        datum.model_input.add().encoded_text.tokens = b"\1\0\0\0" * 100
    return request.SerializeToString()


def reordered(body: bytes) -> bytes:
    """The model id behind the data, which protobuf allows."""
    head = 2 + len(b"ts-1:train:0")
    return body[head:] + body[:head]


async def test_the_id_is_found_wherever_it_stands_in_json():
    late = b'{"forward_backward_input": {"data": [{"x": [1, 2]}]}, "model_id": "m", "seq_id": 1}'
    assert (await read(late)).model_id == "m"
    assert (await read(b'{"model_id": null, "session_id": "s"}')).model_id is None
    assert (await read(b"")).request_id is None


@pytest.mark.parametrize("arrange", [bytes, reordered])
@pytest.mark.parametrize("compress", [False, True])
async def test_the_id_is_found_wherever_it_stands_in_protobuf(arrange, compress):
    body = arrange(message())
    headers = {"content_type": PROTO}
    if compress:
        body = zstandard.ZstdCompressor().compress(body)
        headers["content_encoding"] = "zstd"
    assert (await read(body, **headers)).model_id == "ts-1:train:0"


async def test_a_compressed_body_is_not_unpacked_for_an_id_that_comes_first(monkeypatch):
    def never(body: bytes) -> bytes:
        raise AssertionError("the whole body was unpacked")

    monkeypatch.setattr("homefire.gateway.envelope.decompress_zstd", never)
    body = zstandard.ZstdCompressor().compress(message(num_rows=500))
    envelope = await read(body, content_type=PROTO, content_encoding="zstd")
    assert envelope.model_id == "ts-1:train:0"


def test_the_last_of_two_ids_counts_as_in_protobuf():
    assert text_field(message("a", num_rows=0) + message("b", num_rows=0), 1) == "b"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_message_is_refused(cut):
    with pytest.raises(InvalidArgument, match="not a ForwardBackwardRequest"):
        text_field(message()[:-cut], 1)


@pytest.mark.parametrize(
    "body", [b"\xff" * 12, b"\x0b", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
)
def test_bytes_that_are_no_message_are_refused(body):
    with pytest.raises(InvalidArgument):
        text_field(body, 1)


async def test_bad_bodies_are_refused_by_name():
    with pytest.raises(InvalidArgument, match="not JSON"):
        await read(b"{")
    with pytest.raises(InvalidArgument, match="zstd"):
        await read(b"no frame", content_type=PROTO, content_encoding="zstd")
    with pytest.raises(Unsupported, match="gzip"):
        await read(b"{}", content_encoding="gzip")
    with pytest.raises(PayloadTooLarge, match="cap is 10"):
        await read(b" " * 11, max_bytes=10)
