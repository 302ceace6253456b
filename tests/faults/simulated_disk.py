"""A disk in memory that forgets what was not synced, for any code that writes through `foundation.disk`.

Data of a file are safe after its fsync, a name after the fsync of its directory. Until then a power cut
may leave any subset of the writes and names, each write torn anywhere, or grown but never filled.

    disk = SimulatedDisk()
    …                                     # the code under test writes
    for image in disk.crashes(): …        # every disk that the next start could find
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Write:
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    size: int


FileChange = Write | Truncate
Entries = dict[str, "File | Directory"]
NameChange = dict[str, "File | Directory | None"]
"""What one call does to a directory; None: the name goes. A rename is one change of two names."""


@dataclass(eq=False)
class File:
    durable: bytes = b""
    pending: list[FileChange] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    """As a running process reads it."""


@dataclass(eq=False)
class Directory:
    durable: Entries = field(default_factory=dict)
    pending: list[NameChange] = field(default_factory=list)
    entries: Entries = field(default_factory=dict)


@dataclass
class _Open:
    node: File | Directory
    position: int = 0


@dataclass(frozen=True)
class Fault:
    """The n-th call from now on of this name fails."""

    call: str
    at: int
    errno: int = errno.EIO


class SimulatedDisk:
    """`after_call` runs behind every call that changes something: the moments at which power may go."""

    def __init__(self, root: Directory | None = None) -> None:
        self.root = root or Directory()
        self.after_call: Callable[[str], None] = lambda call: None
        self.faults: list[Fault] = []
        self._open: dict[int, _Open] = {}
        self._next_fd = 1000
        self._calls: dict[str, int] = {}

    # As `os` has them ------------------------------------------------------------------------

    def open(
        self, path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        parent, name = self._parent(path, dir_fd)
        node = parent.entries.get(name)
        if node is None:
            if not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            node = File()
            self._change("open", parent, {name: node})
        elif flags & os.O_EXCL:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        elif flags & os.O_DIRECTORY and not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        elif flags & os.O_TRUNC and isinstance(node, File) and node.data:
            self._alter("ftruncate", node, Truncate(0))
        self._next_fd += 1
        self._open[self._next_fd] = _Open(node)
        return self._next_fd

    def make_durably(self, path: Path) -> None:
        """A directory and its parents, safe from the start."""
        node = self.root
        for name in path.parts[1:]:
            child = node.entries.setdefault(name, Directory())
            assert isinstance(child, Directory)
            node.durable[name], node = child, child

    def close(self, fd: int, /) -> None:
        del self._open[fd]

    def lseek(self, fd: int, position: int, whence: int, /) -> int:
        assert (position, whence) == (0, os.SEEK_END)
        return len(self._file(fd).data)

    def pread(self, fd: int, length: int, offset: int, /) -> bytes:
        return bytes(self._file(fd).data[offset : offset + length])

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int, /) -> int:
        file, given = self._file(fd), bytes(data)
        failure = self._failure("pwrite")
        if failure is not None:
            self._alter("pwrite", file, Write(offset, given[: len(given) // 2]))
            raise failure
        self._alter("pwrite", file, Write(offset, given))
        return len(given)

    def ftruncate(self, fd: int, length: int, /) -> None:
        self._alter("ftruncate", self._file(fd), Truncate(length))

    def fsync(self, fd: int, /) -> None:
        """A failed one leaves the pages clean in memory and not on disk, as Linux does."""
        node = self._open[fd].node
        failure = self._failure("fsync")
        if failure is not None:
            if isinstance(node, File):
                node.pending = []
            raise failure
        if isinstance(node, File):
            node.durable = apply_to_file(node.durable, node.pending)
        else:
            node.durable = apply_to_directory(node.durable, node.pending)
        node.pending = []
        self.after_call("fsync")

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        parent, name = self._parent(path, None)
        if name in parent.entries:
            raise FileExistsError(errno.EEXIST, "exists", str(path))
        self._change("mkdir", parent, {name: Directory()})

    def listdir(self, path: Path) -> list[str]:
        node = self._lookup(path)
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        return list(node.entries)

    def replace(
        self,
        src: str | Path,
        dst: str | Path,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        (source, old), (target, new) = self._parent(src, src_dir_fd), self._parent(dst, dst_dir_fd)
        assert source is target, "renames across directories are not simulated"
        self._change("rename", source, {old: None, new: source.entries[old]})

    def rename(self, src: Path, dst: Path) -> None:
        self.replace(src, dst)

    def unlink(self, path: str | Path, *, dir_fd: int | None = None) -> None:
        parent, name = self._parent(path, dir_fd)
        if name not in parent.entries:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        self._change("unlink", parent, {name: None})

    def rmdir(self, path: Path) -> None:
        parent, name = self._parent(path, None)
        self._change("rmdir", parent, {name: None})

    # Power cuts ------------------------------------------------------------------------------

    def statvfs(self, path: Path, /) -> os.statvfs_result:
        """Of a disk of 4 TiB that nothing fills."""
        return os.statvfs_result((4096, 4096, 1 << 30, 1 << 30, 1 << 30, 0, 0, 0, 0, 255))

    def photo(self) -> SimulatedDisk:
        """A copy that later calls do not change."""
        return SimulatedDisk(_copy(self.root, {}))

    def crashes(self, *, limit: int = 1 << 62, seed: int = 0) -> Iterator[SimulatedDisk]:
        """Each disk that power may leave behind now; above `limit` of them, so many at random."""
        nodes = [node for node in _all_nodes(self.root) if node.pending]
        options = [_num_outcomes(change) for node in nodes for change in node.pending]
        if math.prod(options) <= limit:
            choices: Iterator[Sequence[int]] = itertools.product(*map(range, options))
        else:
            dice = random.Random(seed)
            choices = ([dice.randrange(n) for n in options] for _ in range(limit))
        for chosen in choices:
            turn = iter(chosen)
            left = {id(node): _remains(node, turn) for node in nodes}
            yield SimulatedDisk(_after_crash(self.root, left))

    # Inside ----------------------------------------------------------------------------------

    def _alter(self, call: str, file: File, change: FileChange) -> None:
        file.pending.append(change)
        file.data = bytearray(apply_to_file(bytes(file.data), [change]))
        self.after_call(call)

    def _change(self, call: str, directory: Directory, change: NameChange) -> None:
        failure = self._failure(call)
        if failure is not None:
            raise failure
        directory.pending.append(change)
        directory.entries = apply_to_directory(directory.entries, [change])
        self.after_call(call)

    def _failure(self, call: str) -> OSError | None:
        due = [fault for fault in self.faults if fault.call == call]
        self.faults = [
            fault if fault.call != call else Fault(call, fault.at - 1, fault.errno)
            for fault in self.faults
            if not (fault.call == call and fault.at <= 1)
        ]
        hit = next((fault for fault in due if fault.at <= 1), None)
        return OSError(hit.errno, f"simulated failure of {call}") if hit else None

    def _file(self, fd: int) -> File:
        node = self._open[fd].node
        if not isinstance(node, File):
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        return node

    def _parent(self, path: str | Path, dir_fd: int | None) -> tuple[Directory, str]:
        above, _, name = str(path).rpartition("/")
        node = self._lookup(above) if dir_fd is None else self._open[dir_fd].node
        if not isinstance(node, Directory):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
        return node, name

    def _lookup(self, path: str | Path) -> File | Directory:
        node: File | Directory = self.root
        for name in str(path).split("/")[1:]:
            if not isinstance(node, Directory):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
            if name not in node.entries:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            node = node.entries[name]
        return node


class ForgetfulDisk(SimulatedDisk):
    """A planted bug: it says that it synced, and did not."""

    def fsync(self, fd: int, /) -> None:
        self.after_call("fsync")


class NamelessDisk(SimulatedDisk):
    """A planted bug: directories are never synced, so what is in a file may have lost its name."""

    def fsync(self, fd: int, /) -> None:
        if isinstance(self._open[fd].node, File):
            super().fsync(fd)


def apply_to_file(data: bytes, changes: Sequence[FileChange]) -> bytes:
    for change in changes:
        match change:
            case Truncate(size):
                data = data[:size].ljust(size, b"\0")
            case Write(offset, written):
                data = data[:offset].ljust(offset, b"\0") + written + data[offset + len(written) :]
    return data


def apply_to_directory(entries: Entries, changes: Sequence[NameChange]) -> Entries:
    found = dict(entries)
    for change in changes:
        for name, node in change.items():
            if node is None:
                found.pop(name, None)
            else:
                found[name] = node
    return found


def _num_outcomes(change: FileChange | NameChange) -> int:
    """It is there or not; a write may also be torn."""
    return len(change.data) + 4 if isinstance(change, Write) and change.data else 2


def _remains(node: File | Directory, chosen: Iterator[int]) -> bytes | Entries:
    if isinstance(node, Directory):
        return apply_to_directory(node.durable, [each for each in node.pending if next(chosen)])
    kept = [_outcome(change, next(chosen)) for change in node.pending]
    return apply_to_file(node.durable, [change for change in kept if change is not None])


def _outcome(change: FileChange, chosen: int) -> FileChange | None:
    """0: nothing of it; up to its size: so many bytes; then its whole length, with either half alone
    or with neither."""
    if chosen == 0:
        return None
    if isinstance(change, Truncate) or not change.data:
        return change
    size, half = len(change.data), len(change.data) // 2
    if chosen <= size:
        return Write(change.offset, change.data[:chosen])
    if chosen == size + 1:
        return Write(change.offset + half, change.data[half:])
    first = half if chosen == size + 2 else 0
    return Write(change.offset, change.data[:first].ljust(size, b"\0"))


def _all_nodes(node: File | Directory) -> list[File | Directory]:
    """Whatever power may leave a name of."""
    found: list[File | Directory] = []
    waiting: list[File | Directory] = [node]
    while waiting:
        each = waiting.pop()
        if any(each is known for known in found):
            continue
        found.append(each)
        if isinstance(each, Directory):
            changed = [child for change in each.pending for child in change.values() if child]
            waiting += [*each.durable.values(), *changed]
    return found


def _copy(node: File | Directory, copies: dict[int, File | Directory]) -> Directory:
    """Of a directory and all below, a node with several names copied once."""

    def copied(each: File | Directory) -> File | Directory:
        known = copies.get(id(each))
        if known is not None:
            return known
        if isinstance(each, File):
            copies[id(each)] = file = File(each.durable, list(each.pending), bytearray(each.data))
            return file
        copies[id(each)] = directory = Directory()
        directory.durable = {name: copied(child) for name, child in each.durable.items()}
        directory.entries = {name: copied(child) for name, child in each.entries.items()}
        directory.pending = [
            {name: child and copied(child) for name, child in change.items()}
            for change in each.pending
        ]
        return directory

    root = copied(node)
    assert isinstance(root, Directory)
    return root


def _after_crash(node: Directory, left: dict[int, object]) -> Directory:
    """Everything that is left is durable."""
    entries = left.get(id(node), node.durable)
    assert isinstance(entries, dict)
    kept: Entries = {}
    for name, child in entries.items():
        if isinstance(child, Directory):
            kept[name] = _after_crash(child, left)
        else:
            data = left.get(id(child), child.durable)
            assert isinstance(data, bytes)
            kept[name] = File(data, [], bytearray(data))
    return Directory(kept, [], dict(kept))
