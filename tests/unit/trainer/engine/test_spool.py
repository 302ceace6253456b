"""Gathered tensors wait on disk, and nothing of them is left there."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from homefire.trainer.engine.ranks.spool import spooled
from homefire.wire.tensors import RawTensor

TENSOR = RawTensor("F32", (2, 3), np.arange(24, dtype=np.uint8))


def test_a_spooled_tensor_has_the_same_bytes_and_no_name(tmp_path: Path) -> None:
    kept = spooled(TENSOR, tmp_path / "store")
    assert (kept.dtype, kept.shape) == (TENSOR.dtype, TENSOR.shape)
    assert kept.data.tobytes() == TENSOR.data.tobytes()
    assert not np.shares_memory(kept.data, TENSOR.data)
    assert list((tmp_path / "store").iterdir()) == []


def test_without_a_disk_it_stays_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert spooled(TENSOR, tmp_path / "file") is TENSOR


def test_an_empty_tensor_needs_no_file(tmp_path: Path) -> None:
    empty = RawTensor("F32", (0, 3), np.zeros(0, np.uint8))
    assert spooled(empty, tmp_path) is empty
