"""A store by what it is called: a directory's path, or `s3://bucket/prefix`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from homefire.checkpoints.bucket import SCHEME, Bucket, BucketConfig
from homefire.checkpoints.directory_store import DirectoryStore
from homefire.checkpoints.object_cache import ObjectCache
from homefire.checkpoints.object_store import ObjectStore
from homefire.checkpoints.store import CheckpointStore
from homefire.foundation.clock import Clock

CACHE_VARIABLE = "HOMEFIRE_STORE_CACHE"
"""Directory of this machine for files of object stores; its disk should be fast."""
_MAX_CACHE_BYTES = 64 << 30
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def open_store(
    root: str,
    clock: Clock | None = None,
    *,
    cache: Path | None = None,
    config: BucketConfig | None = None,
) -> CheckpointStore:
    """InvalidArgument for a URL that is none, Unsupported without the package that it needs.

    `cache` is where files of an object store are kept on this machine: by default
    `$HOMEFIRE_STORE_CACHE`, else a private folder below the system's temporary ones.
    """
    if "://" not in root:
        return DirectoryStore(Path(root), clock)
    bucket = Bucket(root, config or BucketConfig())
    files = ObjectCache(cache or default_cache(), root, boot=_boot_id(), max_bytes=_MAX_CACHE_BYTES)
    return ObjectStore(bucket, files, clock)


def is_object_store(root: str) -> bool:
    return root.startswith(SCHEME)


def default_cache() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"homefire-store-{os.getuid()}"


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "boot"
