"""Named places where a test can kill the process or make a call fail.

`failpoint("journal.after_fsync_before_ack")` does nothing unless the environment variable
`HOMEFIRE_FAILPOINTS` names it, e.g. `journal.after_fsync_before_ack=kill@3` (the third time it is
reached) or `store.before_commit=eio`. Several are separated by `;`. Services refuse to start with
failpoints enabled when they listen off loopback (see `check_allowed`).
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

VARIABLE = "HOMEFIRE_FAILPOINTS"
_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


def _parse(text: str) -> dict[str, tuple[str, int]]:
    actions: dict[str, tuple[str, int]] = {}
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        verb, _, count = action.partition("@")
        if verb not in {"kill", *_ERRORS}:
            raise ValueError(f"{VARIABLE}: unknown action {verb!r} in {item!r}")
        actions[name] = (verb, int(count or 1))
    return actions


_actions = _parse(os.environ.get(VARIABLE, ""))
_reached: Counter[str] = Counter()


def failpoint(name: str) -> None:
    if not _actions or name not in _actions:
        return
    verb, count = _actions[name]
    _reached[name] += 1
    if _reached[name] != count:
        return
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(_ERRORS[verb], f"failpoint {name}")


def check_allowed(host: str) -> None:
    """Refuses to run with failpoints where strangers can connect."""
    if _actions and host not in {"127.0.0.1", "::1", "localhost"}:
        raise ValueError(f"{VARIABLE} is set, so homefire listens on loopback only, not {host}")
