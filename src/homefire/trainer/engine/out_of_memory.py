"""A batch that does not fit into the device's memory fails alone, and by name.

What a pass has computed is dropped with it, so the next one starts where this one did. A step cannot be
taken back half way: there the engine ends, and its front starts it again from the journal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from homefire.wire.errors import OutOfMemory

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@contextmanager
def named_out_of_memory() -> Iterator[None]:
    """Of a pass, which changes nothing until it is kept."""
    try:
        yield
    except _OUT_OF_MEMORY as exc:
        raise OutOfMemory(
            f"the batch does not fit into memory: {exc}",
            hint="send shorter rows, or fewer at a time; nothing was accumulated",
        ) from exc


@contextmanager
def ending_when_out_of_memory() -> Iterator[None]:
    """Of a step, which changes weights tensor by tensor."""
    try:
        yield
    except _OUT_OF_MEMORY as exc:
        raise SystemExit(f"out of memory in the middle of a step: {exc}") from exc
