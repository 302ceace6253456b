"""Large tensors in pieces that stay in the processor's cache from one operation to the next.

A step reads and writes its tensors a dozen times over. Whole, each time comes from memory; in pieces
only the first one does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 16
"""Elements: five float32 tensors of it are 1.3 MB. Measured: dev/LOG.md."""
_SQUARES_FIT = (1e-30, 1e38)
"""Where a sum of float32 squares loses nothing to the ends of float32's range."""


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views, along the first axis; the whole where there is no such cache, or no need."""
    if tensor.device.type != "cpu" or tensor.numel() <= _PIECE:
        return (tensor,)
    return tensor.split(max(1, _PIECE * tensor.shape[0] // tensor.numel()))


def sum_of_squares(tensor: Tensor) -> float:
    """In float32 within a piece, in float64 between them, and throughout where float32 has no room."""
    return sum(_squares(piece) for piece in pieces(tensor.detach()))


def _squares(piece: Tensor) -> float:
    found = float(piece.square().sum())  # pairwise: ten times as exact as a dot product
    if _SQUARES_FIT[0] < found < _SQUARES_FIT[1]:
        return found
    return float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2


def round_into(live: Tensor, master: Tensor, serving_dtype: torch.dtype) -> int:
    """`live` becomes `master` rounded to the serving dtype; returns how many elements moved."""
    rounded = master.to(serving_dtype).to(live.dtype)
    changed = _num_different(rounded, live.detach())
    live.copy_(rounded)
    return changed


def _num_different(left: Tensor, right: Tensor) -> int:
    """numpy compares and counts four times as fast as torch does on a CPU."""
    if left.device.type == "cpu" and left.dtype == torch.float32:
        return int(np.count_nonzero(left.numpy() != right.numpy()))
    return int(torch.count_nonzero(left != right))
