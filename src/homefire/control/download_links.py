"""Links to checkpoints' files that need no API key: signed, expiring, for exactly one file each.

Clients fetch them with a bare HTTP client and no headers, so a link is all there is to show. It says
what it is for and until when, and an HMAC under a key of the home makes that its only meaning.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from urllib.parse import quote

import msgspec

from homefire.checkpoints import CheckpointKey
from homefire.foundation.clock import Clock
from homefire.wire.errors import PermissionDenied
from homefire.wire.internal import DOWNLOADS_PATH

LIFETIME_S = 3600.0
_LONGEST_TOKEN = 4096


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """What a link gives away. Example: Grant(key, "9f86…", "adapter_model.safetensors", 1.8e9)."""

    key: CheckpointKey
    digest: str
    """Of the checkpoint's weights: a checkpoint that replaces it under its name is not meant."""
    file: str | None
    """None: the archive of all files."""
    expires_at: float
    """Unix time in seconds."""


class DownloadLinks:
    def __init__(self, *, url: str, key: bytes, clock: Clock) -> None:
        """`url` is where clients reach the gateway."""
        self._url = url.rstrip("/")
        self._key = key
        self._clock = clock

    def expiry(self) -> float:
        """Of links that are signed now."""
        return self._clock.now() + LIFETIME_S

    def sign(self, grant: Grant) -> str:
        """The link's URL. It ends in the file's name, which is what `wget` calls the file."""
        content = msgspec.msgpack.encode(grant)
        token = f"{_text(content)}.{_text(self._signature(content))}"
        name = grant.file or f"{grant.key.name}.tar"
        return f"{self._url}{DOWNLOADS_PATH}/{token}/{quote(name)}"

    def read(self, token: str) -> Grant:
        """PermissionDenied for a token that was not given out, or is over."""
        if len(token) > _LONGEST_TOKEN:
            raise _not_ours()
        content, _, signature = token.partition(".")
        try:
            signed = _bytes(content)
            given = _bytes(signature)
        except (ValueError, binascii.Error) as exc:
            raise _not_ours() from exc
        if not hmac.compare_digest(given, self._signature(signed)):
            raise _not_ours()
        grant = msgspec.msgpack.decode(signed, type=Grant)
        if grant.expires_at <= self._clock.now():
            raise PermissionDenied("this download link has expired", hint="ask for a new one")
        return grant

    def _signature(self, content: bytes) -> bytes:
        return hmac.digest(self._key, content, hashlib.sha256)


def _not_ours() -> PermissionDenied:
    return PermissionDenied(
        "this is no download link of this server", hint="use the link as it was given out"
    )


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    """Strict: an altered text must not decode to the same bytes."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _text(data) != text:
        raise ValueError("not the canonical encoding")
    return data
