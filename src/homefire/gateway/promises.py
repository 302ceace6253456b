"""Request ids that the gateway gives for work that cannot begin yet. They say all there is to know.

<job>.new-<the request>       a model whose trainer waits for room: asked for again at every poll
<job>-sampler.wait-<nonce>    a sample whose sampler is starting: once it is up the poll answers 410,
                              at which every client submits the sample again

So a client that waits sees why (`queue_state_reason`), and a restarted gateway has lost nothing.
"""

from __future__ import annotations

import base64
import binascii
import secrets

import msgspec

from homefire.wire.errors import InvalidArgument

_NEW = "new-"
_WAIT = "wait-"
_CREATE = frozenset({"create_model", "load_weights"})
LARGEST_CREATION_BYTES = 16 << 10
"""Of a request that still fits into an id; larger ones are refused with a 503 until there is room."""


class Creation(msgspec.Struct, frozen=True, array_like=True):
    """A `create_model`, or a `load_weights` that creates, as the client sent it."""

    operation: str
    body: bytes


def creation_promise(job: str, creation: Creation) -> str:
    packed = base64.urlsafe_b64encode(msgspec.msgpack.encode(creation)).decode().rstrip("=")
    return f"{job}.{_NEW}{packed}"


def promised_creation(request_id: str) -> Creation | None:
    """None for the id of anything else. InvalidArgument for one that was never given."""
    _, _, promise = request_id.partition(".")
    if not promise.startswith(_NEW):
        return None
    packed = promise.removeprefix(_NEW)
    try:
        content = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
        creation = msgspec.msgpack.decode(content, type=Creation)
        if creation.operation not in _CREATE:
            raise ValueError(f"{creation.operation} creates nothing")
    except (ValueError, binascii.Error, msgspec.MsgspecError) as exc:
        raise InvalidArgument(f"{request_id[:100]!r} is no request id", field="request_id") from exc
    return creation


def waiting_promise(sampler: str) -> str:
    return f"{sampler}.{_WAIT}{secrets.token_hex(8)}"


def is_waiting(request_id: str) -> bool:
    return request_id.partition(".")[2].startswith(_WAIT)
