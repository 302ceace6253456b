"""Every rank but the first: does what rank 0 does, on its own part, until rank 0 has gone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from homefire.foundation.failpoints import failpoint
from homefire.trainer.engine.network import (
    Float32,
    FrozenWeights,
    TrainableWeights,
)
from homefire.trainer.engine.ranks import commands
from homefire.trainer.engine.ranks.commands import Command, LinkClosed, LinkToFirst
from homefire.trainer.engine.ranks.placement import Incoming
from homefire.trainer.engine.ranks.rank_passes import RankPasses
from homefire.trainer.engine.ranks.row_shares import packed_targets, packed_tokens
from homefire.wire.engine import Arrays, LoraSpec, OpenModel
from homefire.wire.errors import ErrorRecord, HomefireError, OutOfMemory

log = logging.getLogger(__name__)


class SharedWeights(TrainableWeights, Protocol):
    """Trainable weights that this rank holds a part of."""

    def take_over(self, incoming: Incoming) -> None: ...


class SharedNetwork(Protocol):
    """What a rank computes with: `Network`, with parts for weights."""

    def use_threads(self, count: int) -> None: ...

    def reference(self) -> FrozenWeights: ...

    def open_full(self) -> SharedWeights: ...

    def open_lora(self, spec: LoraSpec) -> SharedWeights: ...

    def close(self, weights: TrainableWeights) -> None: ...


class Joining(Protocol):
    """Brings a rank's network up, in the two steps that all ranks take together."""

    @property
    def passes(self) -> RankPasses: ...

    def load(self, request: OpenModel) -> None: ...

    def join(self) -> SharedNetwork: ...


class ExchangeWithFirst:
    """Implements `Exchange`."""

    def __init__(self, link: LinkToFirst) -> None:
        self._link = link

    def gradient_of(self, logprobs: Float32) -> Float32:
        self._link.answer(None, {"logprobs": logprobs})
        return self._pushed()

    def give_up(self, error: OutOfMemory) -> Float32:
        self._link.answer(ErrorRecord.of(error))
        return self._pushed()

    def _pushed(self) -> Float32:
        command, arrays = self._link.next_command()
        if isinstance(command, commands.Abandon):
            raise command.error.exception()
        return arrays["gradient"].copy()


class Follower:
    def __init__(self, link: LinkToFirst, joining: Joining) -> None:
        self._link = link
        self._joining = joining
        self._passes = joining.passes
        self._network: SharedNetwork | None = None
        self._frozen: dict[int, FrozenWeights] = {}
        self._trained: dict[int, SharedWeights] = {}

    def serve(self) -> None:
        """Returns when rank 0 has gone. What is not a HomefireError ends the rank: rank 0 cannot have
        met it too."""
        try:
            while True:
                command, arrays = self._link.next_command()
                self._link.answer(*self._outcome(command, arrays))
        except LinkClosed:
            log.info("rank 0 has gone")

    def _outcome(self, command: Command, arrays: Arrays) -> tuple[ErrorRecord | None, Arrays]:
        try:
            failpoint(f"rank.{self._passes.rank}.{type(command).__name__}")
            return None, self._do(command, arrays)
        except HomefireError as exc:
            log.info("%s failed: %s", type(command).__name__, exc)
            return ErrorRecord.of(exc), {}

    def _do(self, command: Command, arrays: Arrays) -> Arrays:
        match command:
            case commands.Score(number):
                rows = packed_targets(arrays)
                return {"logprobs": self._passes.logprobs(self._frozen[number], rows)}
            case commands.Likeliest(number, count):
                rows = packed_tokens(arrays)
                found = self._passes.likeliest(self._frozen[number], rows, count)
                return {"logprobs": found[0], "tokens": found[1]}
            case commands.Embed(number, pooling):
                rows = packed_tokens(arrays)
                return {"embeddings": self._passes.embeddings(self._frozen[number], rows, pooling)}
            case commands.Backward(number):
                rows, exchange = packed_targets(arrays), ExchangeWithFirst(self._link)
                self._passes.backward(self._trained[number], rows, exchange)
            case commands.EmbedBackward(number, pooling):
                rows, gradient = packed_tokens(arrays), arrays["gradient"].copy()
                found = self._passes.embedding_backward(
                    self._trained[number], rows, pooling, gradient
                )
                return {"embeddings": found}
            case _:
                self._do_without_rows(command)
        return {}

    def _do_without_rows(self, command: Command) -> None:
        match command:
            case commands.KeepGradient(number):
                self._trained[number].keep_gradient()
            case commands.DropGradient(number):
                self._trained[number].drop_gradient()
            case commands.ClearGradient(number):
                self._trained[number].clear_gradient()
            case commands.Step(number, adam, divisor, norm_metrics):
                self._trained[number].step(adam, divisor, norm_metrics)
            case commands.GatherServing(number):
                self._frozen[number].serving()
            case commands.GatherMerged(number):
                self._trained[number].merged()
            case commands.GatherFiles(number):
                self._trained[number].files()
            case commands.TakeOver(number, updates, names):
                incoming = Incoming(updates, names, masters=None, moments=None, gradient=None)
                self._trained[number].take_over(incoming)
            case _:
                self._open_or_close(command)

    def _open_or_close(self, command: Command) -> None:
        match command:
            case commands.LoadModel(request):
                self._joining.load(request)
            case commands.JoinRanks():
                self._network = self._joining.join()
            case commands.UseThreads(count):
                self._opened.use_threads(count)
            case commands.OpenReference(number):
                self._frozen[number] = self._opened.reference()
            case commands.OpenFull(number):
                self._keep(number, self._opened.open_full)
            case commands.OpenLora(number, spec):
                self._keep(number, lambda: self._opened.open_lora(spec))
            case commands.CloseWeights(number):
                del self._frozen[number]
                self._opened.close(self._trained.pop(number))
            case _:
                raise TypeError(f"{type(command).__name__} comes in the middle of another command")

    def _keep(self, number: int, opening: Callable[[], SharedWeights]) -> None:
        self._frozen[number] = self._trained[number] = opening()

    @property
    def _opened(self) -> SharedNetwork:
        if self._network is None:
            raise TypeError("no model has been opened")
        return self._network
