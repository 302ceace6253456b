"""Which account a user's key belongs to. The gateway knows keys by their hashes only."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from homefire.wire.internal import KeyRoute

SURPLUS_PREFIXES = ("tml-", "fw_")
"""The Tinker client refuses keys without `tml-`, and the Fireworks SDK takes one with it for another
service's, so users put before a key what their client wants to see."""


def given_key(headers: Mapping[str, str]) -> str:
    """The key in `X-API-Key`, else in `Authorization: Bearer`; empty when there is none."""
    key = headers.get("x-api-key", "").strip()
    if key:
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def account_of_key(key: str, keys: Sequence[KeyRoute]) -> str | None:
    """The account of `key`, or of `key` without a surplus prefix.

    Every known hash is compared, each in constant time, so that timing tells nothing.
    """
    hashes = [_hash(key)]
    hashes += [_hash(key.removeprefix(p)) for p in SURPLUS_PREFIXES if key.startswith(p)]
    account: str | None = None
    for known in keys:
        for given in hashes:
            if hmac.compare_digest(given, known.sha256):
                account = known.account
    return account


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
