"""Logging of a service: one line per record, with keys and secrets taken out."""

from __future__ import annotations

import logging
import re
import sys

_SECRET = re.compile(
    r"(tml-|fw_|Bearer\s+|x-homefire-secret[=:]\s*|/api/v1/downloads/)[A-Za-z0-9._\-]{6,}"
)
"""The token of a download link is all that it takes to read the file."""


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _SECRET.sub(r"\1[redacted]", super().format(record))


def configure(service: str, *, level: int = logging.INFO) -> logging.Logger:
    """Logs to standard error, which the launcher sends to the service's log file."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("httpx", "httpcore", "uvicorn.access", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return logging.getLogger(service)
