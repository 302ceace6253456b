"""What rank 0 tells the other ranks: one command per call at the seam of `network.py`.

A command is one frame (`homefire.wire.engine_frames`) and gets one `Answer`, whose arrays are what the
rank computed for its rows. Only `Backward` has a middle: the rank answers with its logprobs, and
gets `Push` with the derivative of the loss for them, or `Abandon`.

Arrays of passes, for the rank's own rows: tokens int64 [T], lengths int64 [N], targets int64 [T, K],
gradient float32, recompute int64 [1] where layers are. A rank without rows of its own gets a row of one token, whose gradient is zero.
"""

from __future__ import annotations

import socket

import msgspec

from homefire.wire.engine import AdamParams, Arrays, GradNormMetrics, LoraSpec, OpenModel
from homefire.wire.engine_frames import Envelope, decode_frame, encode_frame, read_frame
from homefire.wire.errors import ErrorRecord
from homefire.wire.pass_extras import Pooling


class LoadModel(msgspec.Struct, frozen=True, tag=True):
    request: OpenModel


class JoinRanks(msgspec.Struct, frozen=True, tag=True):
    """Meet the other ranks, then keep only this rank's part of the model."""


class UseThreads(msgspec.Struct, frozen=True, tag=True):
    count: int


class OpenReference(msgspec.Struct, frozen=True, tag=True):
    weights: int
    """The number that later commands name these weights by."""


class OpenFull(msgspec.Struct, frozen=True, tag=True):
    weights: int


class OpenLora(msgspec.Struct, frozen=True, tag=True):
    weights: int
    spec: LoraSpec


class CloseWeights(msgspec.Struct, frozen=True, tag=True):
    weights: int


class Score(msgspec.Struct, frozen=True, tag=True):
    """Answers logprobs."""

    weights: int


class Likeliest(msgspec.Struct, frozen=True, tag=True):
    """Answers logprobs and tokens."""

    weights: int
    count: int


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Answers embeddings."""

    weights: int
    pooling: Pooling


class Backward(msgspec.Struct, frozen=True, tag=True):
    weights: int


class Push(msgspec.Struct, frozen=True, tag=True):
    """Array: gradient, d loss / d logprobs of the rank's rows."""


class Abandon(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 has no gradient to give, for this reason."""

    error: ErrorRecord


class EmbedBackward(msgspec.Struct, frozen=True, tag=True):
    """Answers embeddings. Array: gradient, d loss / d embeddings of the rank's rows."""

    weights: int
    pooling: Pooling


class KeepGradient(msgspec.Struct, frozen=True, tag=True):
    weights: int


class DropGradient(msgspec.Struct, frozen=True, tag=True):
    weights: int


class ClearGradient(msgspec.Struct, frozen=True, tag=True):
    weights: int


class Step(msgspec.Struct, frozen=True, tag=True):
    weights: int
    adam: AdamParams
    divisor: float
    norm_metrics: GradNormMetrics


class GatherServing(msgspec.Struct, frozen=True, tag=True):
    weights: int


class GatherMerged(msgspec.Struct, frozen=True, tag=True):
    weights: int


class GatherFiles(msgspec.Struct, frozen=True, tag=True):
    weights: int


class TakeOver(msgspec.Struct, frozen=True, tag=True):
    """See `Incoming`: rank 0 spreads the tensors."""

    weights: int
    updates: int | None
    gradient_names: list[str]


Command = (
    LoadModel
    | JoinRanks
    | UseThreads
    | OpenReference
    | OpenFull
    | OpenLora
    | CloseWeights
    | Score
    | Likeliest
    | Embed
    | Backward
    | Push
    | Abandon
    | EmbedBackward
    | KeepGradient
    | DropGradient
    | ClearGradient
    | Step
    | GatherServing
    | GatherMerged
    | GatherFiles
    | TakeOver
)


PASSES = (Score, Likeliest, Embed, Backward, EmbedBackward)
"""They keep nothing: a rank that fails in one leaves the others as they were."""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """None: done. An error is one that rank 0 must have met too."""

    error: ErrorRecord | None = None


class LinkClosed(Exception):
    """The other end has gone."""


class LinkToFirst:
    """A rank's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def next_command(self) -> tuple[Command, Arrays]:
        """Blocks, for as long as rank 0 has nothing to do."""
        frame = read_frame(self._connection)
        if frame is None:
            raise LinkClosed
        return decode_frame(frame, Envelope[Command])

    def answer(self, error: ErrorRecord | None = None, arrays: Arrays | None = None) -> None:
        try:
            self._connection.sendall(encode_frame(Answer(error), arrays))
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise LinkClosed from exc


class LinkToRank:
    """Rank 0's end, to one other rank."""

    def __init__(self, rank: int, connection: socket.socket, *, timeout_s: float) -> None:
        self.rank = rank
        self._connection = connection
        connection.settimeout(timeout_s)

    def tell(self, command: Command, arrays: Arrays | None = None) -> None:
        """LinkClosed when the rank has gone; TimeoutError when it does not listen."""
        try:
            self._connection.sendall(encode_frame(command, arrays))
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise LinkClosed from exc

    def hear(self) -> tuple[Answer, Arrays]:
        try:
            frame = read_frame(self._connection)
        except ConnectionResetError as exc:
            raise LinkClosed from exc
        if frame is None:
            raise LinkClosed
        return decode_frame(frame, Envelope[Answer])
