"""A bucket on S3-compatible storage: whole small objects, large files in parallel pieces, conditions.

Credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION`, `AWS_ENDPOINT_URL`), never from a file of
homefire's. Needs `obstore`, the extra `homefire[s3]`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NewType, TypeVar

from homefire.wire.errors import DigestMismatch, InvalidArgument, StorageFailed, Unsupported
from homefire.wire.manifest import FileEntry

SCHEME = "s3://"
ETag = NewType("ETag", str)
Value = TypeVar("Value")
_DEFAULT_PIECE_BYTES = 8 << 20
_READERS = 8
"""Pieces of files under way at a time."""


class NoSuchObject(Exception):
    """There is none of that name. Never leaves the checkpoints package."""


class ConditionFailed(Exception):
    """Somebody else wrote the object first. Never leaves the checkpoints package."""


@dataclass(frozen=True)
class BucketConfig:
    piece_bytes: int = _DEFAULT_PIECE_BYTES
    """Size of a part of an upload and of a range of a download; S3 wants parts of 5 MiB at least."""
    request_timeout_s: float = 60.0
    max_retries: int = 6
    """Of one request, on 5xx answers and broken connections."""
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    num_reads: int = 3
    """How often bytes that are not what they should be are asked for again."""


@dataclass(frozen=True)
class Listed:
    path: str
    size_bytes: int
    etag: ETag
    modified: datetime


@dataclass(frozen=True)
class Bucket:
    """All methods block; any number of threads may call. StorageFailed when the storage refuses."""

    url: str
    """`s3://bucket/prefix`."""
    config: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_store", _open(self.url, self.config))

    def read(self, path: str) -> tuple[bytes, ETag]:
        """NoSuchObject."""
        from obstore import get

        def work() -> tuple[bytes, ETag]:
            found = get(self._s3, path)
            return bytes(found.bytes()), ETag(found.meta.get("e_tag") or "")

        return self._guarded(work, f"{path} could not be read")

    def exists(self, path: str) -> bool:
        return self._size(path) is not None

    def create(self, path: str, data: bytes) -> None:
        """ConditionFailed when it exists with other bytes. A lost reply is no failure: whoever finds
        its own bytes there wrote them."""
        try:
            self._put(path, data, "create")
        except ConditionFailed:
            if self.read(path)[0] != data:
                raise

    def replace(self, path: str, data: bytes, *, etag: ETag | None = None) -> None:
        """With `etag` only what has it; ConditionFailed. A lost reply is no failure."""
        try:
            self._put(path, data, "overwrite" if etag is None else {"e_tag": etag})
        except ConditionFailed:
            if self.read(path)[0] != data:
                raise

    def upload(self, path: str, file: Path) -> None:
        """In parts, several at a time; nothing is visible before the last.

        Where the reply to the request that ends an upload is lost, asking again finds no such upload:
        then the object is there.
        """
        from obstore import put

        piece, failure = self.config.piece_bytes, f"{file.name} could not be uploaded to {path}"
        try:
            self._guarded(
                lambda: put(self._s3, path, file, chunk_size=piece, max_concurrency=_READERS),
                failure,
            )
        except NoSuchObject as exc:
            if self._size(path) != file.stat().st_size:
                raise StorageFailed(f"{failure} in {self.url}: {exc}") from exc

    def copy(self, source: str, target: str) -> None:
        """On the server. NoSuchObject."""
        from obstore import copy

        self._guarded(lambda: copy(self._s3, source, target), f"{source} could not be copied")

    def delete(self, paths: Sequence[str]) -> None:
        """Those that are gone already are no error."""
        from obstore import delete

        if paths:
            self._guarded(lambda: delete(self._s3, list(paths)), f"{paths[0]} could not be deleted")

    def list(self, prefix: str) -> list[Listed]:
        """Everything below `prefix`, which is a folder, in the order of paths."""
        from obstore import list as list_objects

        def work() -> list[Listed]:
            pages = list_objects(self._s3, prefix or None)
            return [_listed(meta) for page in pages for meta in page]

        found = self._guarded(work, f"{prefix} could not be listed")
        return sorted(found, key=lambda each: each.path)

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders in a folder."""
        from obstore import list_with_delimiter

        found = self._guarded(
            lambda: list_with_delimiter(self._s3, prefix or None), f"{prefix} could not be listed"
        )
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found["common_prefixes"])

    def download(self, files: Iterable[tuple[str, Path, FileEntry]]) -> None:
        """Each object to its file, by ranges, in parallel over all of them, and checked.

        What an earlier, broken download left in `<file>.part` is kept. NoSuchObject; DigestMismatch
        when the storage gives other bytes than the entry says, time and again.
        """
        downloads = [_Download(path, file, entry, self.config) for path, file, entry in files]
        for _ in range(self.config.num_reads):
            with ThreadPoolExecutor(_READERS) as pool:
                pieces = [(d, number) for d in downloads for number in d.missing()]
                list(pool.map(lambda piece: piece[0].fetch(self._range, piece[1]), pieces))
            downloads = [d for d in downloads if not d.finish()]
            if not downloads:
                return
        raise DigestMismatch(
            f"{downloads[0].path} in {self.url} does not have the SHA-256 of its manifest",
            hint="load another checkpoint, or save a base again",
        )

    def _size(self, path: str) -> int | None:
        """None when there is no such object."""
        from obstore import head

        try:
            found = self._guarded(lambda: head(self._s3, path), f"{path} could not be looked up")
        except NoSuchObject:
            return None
        return int(found["size"])

    def _range(self, path: str, start: int, length: int) -> bytes:
        from obstore import get_range

        for _ in range(self.config.num_reads):
            data = self._guarded(
                lambda: bytes(get_range(self._s3, path, start=start, length=length)),
                f"bytes {start} to {start + length} of {path} could not be read",
            )
            if len(data) == length:
                return data
        raise StorageFailed(f"{path} in {self.url} ends before byte {start + length}")

    def _put(self, path: str, data: bytes, mode: Any) -> None:
        from obstore import put

        self._guarded(
            lambda: put(self._s3, path, data, mode=mode, use_multipart=False),
            f"{path} could not be written",
        )

    def _guarded(self, work: Callable[[], Value], failure: str) -> Value:
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            return work()
        except FileNotFoundError as exc:
            raise NoSuchObject(str(exc)) from exc
        except (AlreadyExistsError, PreconditionError) as exc:
            raise ConditionFailed(str(exc)) from exc
        except (BaseError, OSError, TimeoutError) as exc:
            raise StorageFailed(
                f"{failure} in {self.url}: {str(exc)[:300]}",
                hint="check the bucket, AWS_ENDPOINT_URL and the credentials in the environment",
            ) from exc

    @property
    def _s3(self) -> Any:
        return self.__dict__["_store"]


class _Download:
    """One file on its way: `<file>.part` has its bytes, `<file>.part.done` a byte per piece."""

    def __init__(self, path: str, file: Path, entry: FileEntry, config: BucketConfig) -> None:
        self.path = path
        self._file = file
        self._entry = entry
        self._piece = config.piece_bytes
        self._part = file.with_name(f"{file.name}.part")
        self._done = file.with_name(f"{file.name}.part.done")
        self._num_pieces = -(-entry.size_bytes // self._piece)
        self._prepare()

    def missing(self) -> list[int]:
        done = self._done.read_bytes()
        return [number for number in range(self._num_pieces) if done[number] == 0]

    def fetch(self, read: Callable[[str, int, int], bytes], number: int) -> None:
        start = number * self._piece
        data = read(self.path, start, min(self._piece, self._entry.size_bytes - start))
        _write_at(self._part, data, start)
        _write_at(self._done, b"\1", number)

    def finish(self) -> bool:
        """Whether the bytes are right; where they are not, all of them are asked for again."""
        with self._part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self._entry.sha256:
            self._done.write_bytes(bytes(self._num_pieces))
            return False
        os.replace(self._part, self._file)
        self._done.unlink()
        return True

    def _prepare(self) -> None:
        size = self._part.stat().st_size if self._part.exists() else -1
        done = self._done.stat().st_size if self._done.exists() else -1
        if (size, done) == (self._entry.size_bytes, self._num_pieces):
            return
        with self._part.open("wb") as file:
            file.truncate(self._entry.size_bytes)
        self._done.write_bytes(bytes(self._num_pieces))


def parse_url(url: str) -> tuple[str, str]:
    """`s3://bucket/a/prefix` -> bucket and prefix. InvalidArgument says what it should look like."""
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket or ".." in prefix or "//" in f"/{prefix}":
        raise InvalidArgument(
            f"store {url!r} is no bucket", hint="write s3://bucket/prefix", field="store"
        )
    return bucket, prefix.strip("/")


def _open(url: str, config: BucketConfig) -> Any:
    bucket, prefix = parse_url(url)
    try:
        from obstore.store import S3Store
    except ImportError as exc:
        raise Unsupported(
            f"{url} needs the package obstore", hint="pip install 'homefire[s3]'"
        ) from exc
    timeout_s = config.request_timeout_s
    return S3Store(
        bucket,
        prefix=prefix or None,
        checksum_algorithm="SHA256",
        client_options={"allow_http": True, "timeout": timedelta(seconds=timeout_s)},
        retry_config={
            "max_retries": config.max_retries,
            "retry_timeout": timedelta(seconds=5 * timeout_s),
            "backoff": {
                "init_backoff": timedelta(seconds=config.first_backoff_s),
                "max_backoff": timedelta(seconds=config.max_backoff_s),
                "base": 2.0,
            },
        },
    )


def _listed(meta: Any) -> Listed:
    etag = ETag(meta["e_tag"] or "")
    return Listed(meta["path"], meta["size"], etag, meta["last_modified"])


def _write_at(path: Path, data: bytes, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(descriptor)
