"""Named places where a test can kill the process, hang it or make a call fail.

`failpoint("journal.after_fsync_before_ack")` does nothing unless the environment variable
`HOMEFIRE_FAILPOINTS` names it, e.g. `journal.after_fsync_before_ack=kill@3` (the third time it is
reached) or `store.before_commit=eio`. `kill@3:/tmp/flag` acts once for all processes that share the
environment: only if it can create the file. Several are separated by `;`. Services refuse to start with
failpoints enabled when they listen off loopback (see `check_allowed`).

One can also be armed while processes run: `HOMEFIRE_FAILPOINTS_FILE` names a file, which may come and
go, with one such item. It goes off once, in the first process that reaches its count since the file
came; that process removes the file.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

VARIABLE = "HOMEFIRE_FAILPOINTS"
FILE_VARIABLE = "HOMEFIRE_FAILPOINTS_FILE"
_ERRORS = {"eio": errno.EIO, "enospc": errno.ENOSPC}


class _Action(NamedTuple):
    verb: str
    nth: int
    flag: str
    """A file; empty: every process acts."""


def _parse(text: str) -> dict[str, _Action]:
    actions: dict[str, _Action] = {}
    for item in filter(None, text.split(";")):
        name, _, action = item.partition("=")
        what, _, flag = action.partition(":")
        verb, _, count = what.partition("@")
        if verb not in {"kill", "hang", "oom", *_ERRORS}:
            raise ValueError(f"{VARIABLE}: unknown action {verb!r} in {item!r}")
        actions[name] = _Action(verb, int(count or 1), flag)
    return actions


_actions = _parse(os.environ.get(VARIABLE, ""))
_reached: Counter[str] = Counter()


@dataclass
class _ArmedFile:
    path: Path
    identity: tuple[int, int] = (0, 0)
    """Inode and time of the file whose count is being kept."""
    reached: int = 0

    def failpoint(self, name: str) -> None:
        try:
            found, text = self.path.stat(), self.path.read_text()
        except FileNotFoundError:
            return
        if (found.st_ino, found.st_mtime_ns) != self.identity:
            self.identity, self.reached = (found.st_ino, found.st_mtime_ns), 0
        action = _parse(text).get(name)
        if action is None:
            return
        self.reached += 1
        if self.reached == action.nth and self._claim():
            _act(action.verb, name)

    def _claim(self) -> bool:
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True


def _armed_by(path: str | None) -> _ArmedFile | None:
    return _ArmedFile(Path(path)) if path else None


_armed = _armed_by(os.environ.get(FILE_VARIABLE))


def failpoint(name: str) -> None:
    if _armed is not None:
        _armed.failpoint(name)
    if not _actions or name not in _actions:
        return
    action = _actions[name]
    _reached[name] += 1
    if _reached[name] == action.nth and _is_first(action.flag):
        _act(action.verb, name)


def _is_first(flag: str) -> bool:
    try:
        if flag:
            Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(verb: str, name: str) -> None:
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if verb == "hang":
        threading.Event().wait()
    if verb == "oom":
        raise MemoryError(f"failpoint {name}")
    raise OSError(_ERRORS[verb], f"failpoint {name}")


def check_allowed(host: str) -> None:
    """Refuses to run with failpoints where strangers can connect."""
    if (_actions or _armed) and host not in {"127.0.0.1", "::1", "localhost"}:
        raise ValueError(
            f"{VARIABLE} or {FILE_VARIABLE} is set, so homefire listens on loopback only, not {host}"
        )
