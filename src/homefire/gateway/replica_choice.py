"""Which replica of a deployment serves a request: its session's, the one that has its prefix, else the least
busy. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from homefire.wire.specs import Upstream

PREFIX_SLACK = 16
"""Requests by which a prefix's replica may be busier than the least busy one. A group of 16 samples of one
prompt stays together; a system prompt that all requests begin with does not pile up on one replica."""
_SHORTEST_PREFIX_BYTES = 256
_LONGEST_PREFIX_BYTES = 1024


def choose_replica(
    replicas: Sequence[Upstream],
    *,
    in_flight: Mapping[str, int],
    session: str = "",
    prefix: bytes = b"",
) -> Upstream | None:
    """None when there are no replicas.

    A session goes to the replica with the highest hash of (session, socket), so that its prompts
    stay cached there and a replica that comes or goes moves only that replica's sessions. Without a session
    the prefix's hash decides, within PREFIX_SLACK of the least busy one.
    """
    if not replicas:
        return None
    if session:
        return _of_highest_hash(replicas, session.encode())
    least_busy = min(replicas, key=lambda replica: in_flight.get(replica.socket, 0))
    if not prefix:
        return least_busy
    holder = _of_highest_hash(replicas, prefix)
    lead = in_flight.get(holder.socket, 0) - in_flight.get(least_busy.socket, 0)
    return holder if lead < PREFIX_SLACK else least_busy


def routing_prefix(prompt: memoryview) -> bytes:
    """What decides of a prompt as it came in JSON: its beginning, which later turns begin with too. Empty for
    prompts so short that computing them again costs less than an uneven load."""
    return bytes(prompt[:_LONGEST_PREFIX_BYTES]) if len(prompt) >= _SHORTEST_PREFIX_BYTES else b""


def _of_highest_hash(replicas: Sequence[Upstream], key: bytes) -> Upstream:
    return max(replicas, key=lambda replica: _rendezvous(key, replica.socket))


def _rendezvous(key: bytes, socket: str) -> bytes:
    return hashlib.blake2b(key + b"\0" + socket.encode(), digest_size=8).digest()
