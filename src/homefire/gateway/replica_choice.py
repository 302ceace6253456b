"""Which replica of a deployment serves a request: its session's, else the least busy. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from homefire.wire.specs import Upstream


def choose_replica(
    replicas: Sequence[Upstream], *, in_flight: Mapping[str, int], session: str = ""
) -> Upstream | None:
    """None when there are no replicas.

    A session goes to the replica with the highest hash of (session, socket), so that its prefix
    stays cached there and a replica that comes or goes moves only that replica's sessions.
    """
    if not replicas:
        return None
    if session:
        return max(replicas, key=lambda replica: _rendezvous(session, replica.socket))
    return min(replicas, key=lambda replica: in_flight.get(replica.socket, 0))


def _rendezvous(session: str, socket: str) -> bytes:
    return hashlib.blake2b(f"{session}\0{socket}".encode(), digest_size=8).digest()
