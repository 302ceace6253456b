"""One micro-batch over the ranks, as its plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from homefire.trainer.engine.network import Float32, PackedTargets, PackedTokens
from homefire.wire.engine import Array, Arrays
from homefire.wire.errors import InvalidArgument


@dataclass(frozen=True)
class RowShare:
    """What one rank computes. Without rows of its own: one row of one token, which counts for nothing."""

    batch: PackedTokens
    num_rows: int
    num_tokens: int

    def arrays(self, gradient: Array | None = None) -> Arrays:
        arrays: Arrays = {
            "tokens": self.batch.tokens,
            "lengths": np.asarray(self.batch.lengths, np.int64),
        }
        if isinstance(self.batch, PackedTargets):
            arrays["targets"] = self.batch.targets
        if self.batch.recompute:
            arrays["recompute"] = np.array([self.batch.recompute])
        if gradient is not None:
            arrays["gradient"] = gradient
        return arrays

    def targets(self) -> PackedTargets:
        assert isinstance(self.batch, PackedTargets)
        return self.batch


def divide(batch: PackedTokens, num_ranks: int) -> list[RowShare]:
    """A share per rank, neighbouring rows in the order of the ranks.

    Example: a batch with shares (2, 1) for two ranks: rows 0 and 1, and row 2.
    """
    if len(batch.shares) != num_ranks or sum(batch.shares) != len(batch.lengths):
        raise InvalidArgument(
            f"the plan gives {list(batch.shares)} of {len(batch.lengths)} rows to the ranks,"
            f" which are {num_ranks}",
            hint="a job's number of ranks is fixed when it is created",
            field="plan",
        )
    rows = _spans(batch.shares)
    edges = [0, *accumulate(batch.lengths)]
    return [_share(batch, span, slice(edges[span.start], edges[span.stop])) for span in rows]


def divide_tokens(values: Array, shares: Sequence[RowShare]) -> list[Float32]:
    """Values by token to the ranks [their tokens, …]; zero for a row that counts for nothing."""
    spans = _spans([share.num_tokens for share in shares])
    return [_given(values[span]) for span in spans]


def divide_rows(values: Array, shares: Sequence[RowShare]) -> list[Float32]:
    """The same by row."""
    spans = _spans([share.num_rows for share in shares])
    return [_given(values[span]) for span in spans]


def join_tokens(parts: Sequence[Array], shares: Sequence[RowShare]) -> Array:
    """What the ranks found by token, in the order of the micro-batch."""
    pairs = zip(parts, shares, strict=True)
    return np.concatenate([part[: share.num_tokens] for part, share in pairs])


def join_rows(parts: Sequence[Array], shares: Sequence[RowShare]) -> Array:
    pairs = zip(parts, shares, strict=True)
    return np.concatenate([part[: share.num_rows] for part, share in pairs])


def packed_tokens(arrays: Arrays) -> PackedTokens:
    return PackedTokens(
        arrays["tokens"].copy(), arrays["lengths"].tolist(), recompute=_recompute(arrays)
    )


def packed_targets(arrays: Arrays) -> PackedTargets:
    return PackedTargets(
        arrays["tokens"].copy(),
        arrays["lengths"].tolist(),
        arrays["targets"].copy(),
        recompute=_recompute(arrays),
    )


def _recompute(arrays: Arrays) -> int:
    return int(arrays["recompute"][0]) if "recompute" in arrays else 0


def _share(batch: PackedTokens, rows: slice, tokens: slice) -> RowShare:
    num_rows, num_tokens = rows.stop - rows.start, tokens.stop - tokens.start
    own, lengths = batch.tokens[tokens], batch.lengths[rows]
    if not num_rows:
        own, lengths = np.zeros(1, np.int64), [1]
    if not isinstance(batch, PackedTargets):
        return RowShare(PackedTokens(own, lengths, recompute=batch.recompute), num_rows, num_tokens)
    targets = batch.targets[tokens]
    if not num_rows:
        targets = np.zeros((1, batch.targets.shape[1]), np.int64)
    given = PackedTargets(own, lengths, targets, recompute=batch.recompute)
    return RowShare(given, num_rows, num_tokens)


def _spans(counts: Sequence[int]) -> list[slice]:
    edges = [0, *accumulate(counts)]
    return [slice(start, start + count) for start, count in zip(edges, counts, strict=False)]


def _given(values: Array) -> Float32:
    found = np.ascontiguousarray(values, np.float32)
    return found if len(found) else np.zeros((1, *values.shape[1:]), np.float32)
