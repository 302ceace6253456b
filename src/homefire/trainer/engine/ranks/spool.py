"""Where whole tensors wait to be written: files that are mapped, so that they take no memory."""

from __future__ import annotations

import logging
import mmap
import tempfile
from pathlib import Path

import numpy as np

from homefire.wire.tensors import RawTensor

log = logging.getLogger(__name__)


def spooled(tensor: RawTensor, directory: Path) -> RawTensor:
    """The same tensor, its bytes in a nameless file of `directory` that goes with the last view of it.

    Stays in memory where the disk has no room: whoever writes it will say that.
    """
    if not tensor.data.nbytes:
        return tensor
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(np.ascontiguousarray(tensor.data).data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), tensor.data.nbytes, access=mmap.ACCESS_READ)
    except OSError as exc:
        log.warning("a gathered tensor stays in memory: %s", exc)
        return tensor
    return RawTensor(tensor.dtype, tensor.shape, np.frombuffer(mapped, np.uint8))
