"""What the SDK takes from the environment, read once when a client object is made."""

from __future__ import annotations

import os

DEFAULT_BASE_URL = "http://127.0.0.1:8700"
"""Where `homefire up` listens unless told otherwise."""


def resolve_base_url(given: str | None) -> str:
    """`given`, else `FIREWORKS_BASE_URL`, else the default; without a trailing slash."""
    url = given or os.environ.get("FIREWORKS_BASE_URL") or DEFAULT_BASE_URL
    if not url.startswith(("http://", "https://")):
        raise ValueError(
            f"base_url {url!r} is not an http(s) URL; write e.g. base_url='{DEFAULT_BASE_URL}'"
        )
    return url.rstrip("/")


def resolve_api_key(given: str | None) -> str:
    """`given`, else `FIREWORKS_API_KEY`; a ValueError that says how to get a key when both miss."""
    key = given or os.environ.get("FIREWORKS_API_KEY")
    if not key:
        raise ValueError(
            "api_key is missing: pass api_key=… or set FIREWORKS_API_KEY "
            '(`eval "$(homefire env)"` sets it)'
        )
    return key


def tinker_key(api_key: str) -> str:
    """The key in the form that the tinker client accepts: it refuses all that lack `tml-`.

    The server strips one surplus `tml-`, so both forms name the same key.
    """
    return api_key if api_key.startswith("tml-") else f"tml-{api_key}"


def quiet_telemetry() -> None:
    """Turns tinker's usage telemetry off unless the user decided otherwise."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")
