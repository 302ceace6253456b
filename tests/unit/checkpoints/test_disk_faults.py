"""A disk that fails, or a process that dies, at every call of a save, one after the other."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    DirectoryStore,
    materialize,
    read_state,
)
from homefire.wire.errors import DuplicateCheckpoint, StorageFailed

from .conftest import BUCKET

_OS_CALLS = ["open", "mkdir", "rename", "replace", "link", "fsync", "pwrite"]


class Killed(BaseException):
    """The process is gone: nothing that it would still do happens."""


class FailingCalls:
    """The n-th call that may change the disk fails, and with `Killed` every one after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._error: BaseException | None = None
        self._left = 0

    @contextmanager
    def at(self, number: int, error: BaseException | None) -> Iterator[None]:
        self._left, self._error = number, error
        with self._patch.context() as patch:
            for name in (*_OS_CALLS, "unlink", "rmdir"):
                patch.setattr(os, name, self._failing(getattr(os, name), name))
            patch.setattr(Path, "open", self._open(Path.open))
            yield

    @property
    def was_reached(self) -> bool:
        return self._left <= 0

    def tick(self, name: str) -> None:
        is_cleanup = name in ("unlink", "rmdir")
        self._left -= 0 if is_cleanup else 1
        is_dead = isinstance(self._error, Killed) and self._left <= 0
        if is_dead or (self._left == 0 and not is_cleanup and self._error is not None):
            raise self._error

    def _failing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            self.tick(name)
            return call(*args, **kwargs)

        return failing

    def _open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def open_file(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode.startswith("r"):
                return call(path, mode, *args, **kwargs)
            self.tick("open")
            return FailingFile(call(path, mode, *args, **kwargs), self)

        return open_file


class FailingFile:
    def __init__(self, file: Any, calls: FailingCalls) -> None:
        self._file = file
        self._calls = calls

    def write(self, data: Any) -> int:
        self._calls.tick("write")
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_whole(root: Path, clock: Any, expected: dict[str, Any], same: Any) -> set[str]:
    """Everything that is listed loads, bit for bit; the names."""
    store = DirectoryStore(root, clock)
    listed = store.list("local", "job-1")
    for manifest in listed:
        if manifest.family is CheckpointFamily.STATE:
            _, files = read_state(store.directory(CheckpointKey.of(manifest)))
            assert any(same(files["weights.safetensors"], each) for each in expected["states"])
        else:
            found = materialize(store, *BUCKET, manifest.identity).tensors
            assert same(found, expected[manifest.identity])
    return {manifest.identity for manifest in listed}


ERRORS = {
    "ENOSPC": OSError(errno.ENOSPC, "planted"),
    "EIO": OSError(errno.EIO, "planted"),
    "kill": Killed(),
}


@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("kind", ["base", "delta", "lora", "state", "overwritten state"])
def test_nothing_is_listed_that_does_not_load_and_no_predecessor_is_lost(
    kind, error, tmp_path, clock, model_files, make_key, make_tensors, nudge, same, monkeypatch
) -> None:
    from .conftest import Trainer

    first, second = make_tensors(), nudge(make_tensors())
    expected = {"s0": first, "new": second, "states": [first, second]}
    calls, number = FailingCalls(monkeypatch), 0
    while True:
        number += 1
        root = tmp_path / f"{number}"
        trainer = Trainer(DirectoryStore(root, clock), model_files, make_key, clock)
        trainer.base("s0", first)
        trainer.state("mark", first)
        save = {
            "base": lambda t=trainer: t.base("new", second),
            "delta": lambda t=trainer: t.delta("new", second, "s0"),
            "lora": lambda t=trainer: t.lora("new", second),
            "state": lambda t=trainer: t.state("new", second),
            "overwritten state": lambda t=trainer: t.state("mark", second, overwrite=True),
        }[kind]
        saved = False
        try:
            with calls.at(number, ERRORS[error]):
                save()
                saved = True
        except (StorageFailed, Killed):
            pass
        found = check_whole(root, clock, expected, same)
        assert {"s0", "mark"} <= found
        if saved and kind != "overwritten state":
            assert "new" in found
        try:
            save()
        except DuplicateCheckpoint:
            assert "new" in found
        check_whole(root, clock, expected, same)
        if not calls.was_reached:
            break
    assert number > 12, "hardly a call was counted"


@pytest.mark.parametrize("kind", ["lost", "half"])
def test_a_planted_store_that_commits_too_early_is_caught(
    kind, trainer, store, make_tensors, make_key, tmp_path, clock, same
) -> None:
    """What the checks above would say of a save whose data came after its name."""
    trainer.base("s0", make_tensors())
    path = store.directory(make_key("s0")) / "model.safetensors"
    if kind == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Exception, match=r"missing|damaged"):
        check_whole(tmp_path / "store", clock, trainer.published, same)
