"""A batch of rows as it arrives, checked whole before anything runs, and its cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from homefire.trainer.engine.network import Ints, PackedTargets
from homefire.wire.engine import Array, Arrays, ExecutionPlan
from homefire.wire.errors import (
    InvalidArgument,
    LengthMismatch,
    SequenceTooLong,
    TokenOutOfRange,
)


@dataclass(frozen=True)
class Batch:
    """N rows of T tokens in all; every array but `lengths` has T as its first axis."""

    tokens: Ints
    """[T]"""
    lengths: Ints
    """[N]"""
    targets: Ints
    """[T, K]; K is 0 where nothing is predicted."""
    row_ids: Ints
    """[N]: the rows' numbers in the request, for errors."""
    inputs: dict[str, Array]
    """What the loss reads: weights [T, K]; logprobs, advantages, clip thresholds [T, 1]."""
    num_skipped: int = 0
    """Tokens of the first row that come before the batch: see `span`."""
    shares: Sequence[int] = ()
    """Of a micro-batch: rows of each rank, in order; empty: one rank computes them all."""
    recompute: int = 0
    """Of a micro-batch: decoder layers that compute their activations again in backward."""

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    def row_of(self, token: int) -> int:
        """The index of the row that holds a token of this batch."""
        return int(np.searchsorted(np.cumsum(self.lengths), token, side="right"))

    def place_in_row(self, token: int) -> int:
        row = self.row_of(token)
        return token - self.rows()[row].start + (self.num_skipped if row == 0 else 0)

    def rows(self) -> list[slice]:
        """Where each row's tokens lie."""
        edges = np.concatenate([[0], np.cumsum(self.lengths)]).tolist()
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def span(self, tokens: slice) -> Batch:
        """Some of the tokens, with the pieces of rows that they belong to."""
        rows = self.rows()
        pieces = np.array([_overlap(row, tokens) for row in rows])
        kept = pieces > 0
        return Batch(
            tokens=self.tokens[tokens],
            lengths=pieces[kept],
            targets=self.targets[tokens],
            row_ids=self.row_ids[kept],
            inputs={name: array[tokens] for name, array in self.inputs.items()},
            num_skipped=tokens.start - rows[self.row_of(tokens.start)].start,
        )

    def packed(self) -> PackedTargets:
        return PackedTargets(
            self.tokens,
            self.lengths.tolist(),
            self.targets,
            shares=self.shares,
            recompute=self.recompute,
        )


def _overlap(row: slice, tokens: slice) -> int:
    """How many tokens both have; 0 or less where none."""
    return min(row.stop, tokens.stop) - max(row.start, tokens.start)


def read_batch(arrays: Arrays, *, vocab_size: int, max_context_length: int) -> Batch:
    """The request's arrays as a checked batch; errors name the row."""
    if "target_tokens" not in arrays:
        raise InvalidArgument("the batch has no target_tokens", field="target_tokens")
    tokens = read_tokens(arrays, vocab_size=vocab_size, max_context_length=max_context_length)
    columns = {
        name: _by_token(name, array, len(tokens.tokens))
        for name, array in arrays.items()
        if name not in ("tokens", "lengths")
    }
    targets = columns.pop("target_tokens").astype(np.int64)
    batch = replace(tokens, targets=targets, inputs=columns)
    _check_tokens(batch, "target token", targets, vocab_size)
    return batch


def read_tokens(arrays: Arrays, *, vocab_size: int, max_context_length: int) -> Batch:
    """The rows alone, as a batch with no target (K = 0)."""
    for name in ("tokens", "lengths"):
        if name not in arrays:
            raise InvalidArgument(f"the batch has no {name}", field=name)
    tokens = np.asarray(arrays["tokens"], np.int64)
    lengths = np.asarray(arrays["lengths"], np.int64)
    if tokens.ndim != 1 or lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1:
        raise InvalidArgument("a batch needs at least one row, and a row at least one token")
    if int(lengths.sum()) != len(tokens):
        raise LengthMismatch(f"lengths sum to {int(lengths.sum())}, tokens are {len(tokens)}")
    no_targets = np.zeros((len(tokens), 0), np.int64)
    batch = Batch(tokens, lengths, no_targets, np.arange(len(lengths)), {})
    _check_context(batch, max_context_length)
    _check_tokens(batch, "token", tokens[:, None], vocab_size)
    return batch


def _by_token(name: str, array: Array, num_tokens: int) -> Array:
    """[T] or [T, K] -> [T, K]."""
    if array.ndim not in (1, 2) or len(array) != num_tokens:
        raise LengthMismatch(
            f"{name} has shape {list(array.shape)} for {num_tokens} tokens", field=name
        )
    return array if array.ndim == 2 else array[:, None]


def _check_context(batch: Batch, limit: int) -> None:
    row = int(batch.lengths.argmax())
    if batch.lengths[row] > limit:
        raise SequenceTooLong(
            f"row {row} has {batch.lengths[row]} tokens, the context length is {limit}",
            hint="shorten the row, or create the trainer with a longer context",
        )


def _check_tokens(batch: Batch, what: str, tokens: Ints, vocab_size: int) -> None:
    outside = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if len(outside):
        where = int(outside[0][0])
        raise TokenOutOfRange(
            f"row {batch.row_of(where)} has {what} {tokens[tuple(outside[0])]},"
            f" the vocabulary ends at {vocab_size - 1}"
        )


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch, and where their tokens lie in it."""

    batch: Batch
    places: Ints
    """[tokens of these rows]: indices into the whole batch's tokens."""


def micro_batches(batch: Batch, plan: ExecutionPlan) -> Iterator[MicroBatch]:
    """Cuts as the plan says; the plan must name every row exactly once."""
    rows = batch.rows()
    named = sorted(row for rows in plan.micro_batches for row in rows)
    if named != list(range(batch.num_rows)):
        raise InvalidArgument(
            f"the plan names rows {named} of a batch of {batch.num_rows}", field="plan"
        )
    shares = plan.shares or [[] for _ in plan.micro_batches]
    recompute = plan.recompute or [0] * len(plan.micro_batches)
    for what, found in (("shares", shares), ("recomputed layers", recompute)):
        if len(found) != len(plan.micro_batches):
            raise InvalidArgument(
                f"the plan has {len(plan.micro_batches)} micro-batches and {what} of {len(found)}",
                field="plan",
            )
    for chosen, rows_of_ranks, num_layers in zip(
        plan.micro_batches, shares, recompute, strict=True
    ):
        if not chosen:
            continue
        places = np.concatenate([np.arange(rows[row].start, rows[row].stop) for row in chosen])
        cut = Batch(
            tokens=batch.tokens[places],
            lengths=batch.lengths[chosen],
            targets=batch.targets[places],
            row_ids=batch.row_ids[chosen],
            inputs={name: array[places] for name, array in batch.inputs.items()},
            shares=rows_of_ranks,
            recompute=num_layers,
        )
        yield MicroBatch(cut, places)
