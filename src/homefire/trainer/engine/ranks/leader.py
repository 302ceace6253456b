"""Rank 0: a network like any other to the engine above it, computed by all ranks together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from homefire.trainer.engine.network import (
    Float32,
    FrozenWeights,
    GradientOf,
    Ints,
    MergedWeights,
    Network,
    PackedTargets,
    PackedTokens,
    Part,
    PassGraph,
    SpanGradientOf,
    TrainableWeights,
    WeightFiles,
)
from homefire.trainer.engine.protocol import EngineUnusable
from homefire.trainer.engine.ranks import commands
from homefire.trainer.engine.ranks.commands import Answer, Command, LinkClosed, LinkToRank
from homefire.trainer.engine.ranks.rank_passes import RankPasses
from homefire.trainer.engine.ranks.row_shares import (
    RowShare,
    divide,
    divide_rows,
    divide_tokens,
    join_rows,
    join_tokens,
)
from homefire.wire.engine import AdamParams, Arrays, GradNormMetrics, LoraSpec
from homefire.wire.errors import ErrorRecord, HomefireError, OutOfMemory, Unsupported
from homefire.wire.pass_extras import Pooling
from homefire.wire.specs import PassBudget
from homefire.wire.tensors import RawTensor, Tensors

Result = TypeVar("Result")


class Ranks:
    """All ranks, as one that does things: rank 0 here, the others over their links.

    Whatever leaves the ranks in different states is EngineUnusable: only a new start, with replay,
    makes them equal again.
    """

    def __init__(self, links: Sequence[LinkToRank]) -> None:
        self._links = links

    @property
    def count(self) -> int:
        return 1 + len(self._links)

    def do(
        self,
        command: Command,
        own: Callable[[], Result],
        arrays: Sequence[Arrays] | None = None,
    ) -> tuple[Result, list[Arrays]]:
        """Every rank does its part; rank 0's result, and the arrays of the others' answers.

        `arrays` are the command's, by rank. An error that is everybody's is raised as it is, and so is
        a pass's OutOfMemory on any rank: it has kept nothing on the others.
        """
        for link in self._links:
            self.tell(link, command, arrays[link.rank] if arrays else None)
        outcome = self._own(command, own)
        answers = [self.hear(link, command) for link in self._links]
        if (error := self._agreed(command, outcome, answers)) is not None:
            raise error
        assert not isinstance(outcome, HomefireError)
        return outcome, [found for _, found in answers]

    def exchange(
        self,
        command: Command,
        found: Float32 | OutOfMemory,
        reply: Callable[[list[Arrays]], list[Arrays]],
    ) -> list[Arrays]:
        """In the middle of `command`: what all ranks found goes into `reply`, whose arrays go back.

        When `reply` raises or a rank has run out of memory, all hear why and give up.
        """
        answers = [self.hear(link, command) for link in self._links]
        error = self._agreed(command, found, answers)
        try:
            if error is not None:
                raise error
            assert not isinstance(found, OutOfMemory)
            pushed = reply([{"logprobs": found}, *(arrays for _, arrays in answers)])
        except HomefireError as exc:
            for link in self._links:
                self.tell(link, commands.Abandon(ErrorRecord.of(exc)), None)
            raise
        for link in self._links:
            self.tell(link, commands.Push(), pushed[link.rank])
        return pushed

    def _agreed(
        self, command: Command, outcome: object, answers: Sequence[tuple[Answer, Arrays]]
    ) -> HomefireError | None:
        """What all ranks have come to. EngineUnusable when they differ."""
        errors = [answer.error for answer, _ in answers if answer.error is not None]
        if isinstance(command, commands.PASSES):
            if isinstance(outcome, OutOfMemory):
                return outcome
            for error in errors:
                if error.code == OutOfMemory.code:
                    return error.exception()
        mine = outcome if isinstance(outcome, HomefireError) else None
        for link, (answer, _) in zip(self._links, answers, strict=True):
            _require_same(link, command, answer, mine.code if mine else None)
        return mine

    def _own(self, command: Command, own: Callable[[], Result]) -> Result | HomefireError:
        try:
            return own()
        except HomefireError as exc:
            return exc
        except EngineUnusable:
            raise
        except (
            Exception
        ) as exc:  # a broken operation here leaves the other ranks in the middle of it
            raise EngineUnusable(f"rank 0 broke in {_name(command)}: {exc}") from exc

    def tell(self, link: LinkToRank, command: Command, arrays: Arrays | None) -> None:
        try:
            link.tell(command, arrays)
        except (LinkClosed, TimeoutError) as exc:
            raise _lost(link, command, exc) from exc

    def hear(self, link: LinkToRank, command: Command) -> tuple[Answer, Arrays]:
        try:
            return link.hear()
        except (LinkClosed, TimeoutError) as exc:
            raise _lost(link, command, exc) from exc


def _lost(link: LinkToRank, command: Command, why: Exception) -> EngineUnusable:
    what = "did not answer in time" if isinstance(why, TimeoutError) else "ended"
    return EngineUnusable(f"rank {link.rank} {what} in {_name(command)}")


def _require_same(link: LinkToRank, command: Command, answer: Answer, code: str | None) -> None:
    theirs = answer.error.code if answer.error else None
    if theirs != code:
        message = answer.error.message if answer.error else "succeeded"
        raise EngineUnusable(
            f"the ranks differ in {_name(command)}: rank 0 {code or 'succeeded'},"
            f" rank {link.rank} {message}"
        )


def _name(command: Command) -> str:
    return type(command).__name__


class RankedNetwork:
    """Implements `Network`."""

    def __init__(self, own: Network, ranks: Ranks, passes: RankPasses) -> None:
        self._own = own
        self._ranks = ranks
        self._passes = passes
        self._numbers = itertools.count(1)
        self._threads: int | None = None

    @property
    def architecture(self) -> str:
        return self._own.architecture

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size

    @property
    def max_context_length(self) -> int:
        return self._own.max_context_length

    @property
    def num_parameters(self) -> int:
        return self._own.num_parameters

    @property
    def num_layers(self) -> int:
        return self._own.num_layers

    @property
    def memory_bytes(self) -> int:
        """None for kept graphs: a backward among ranks computes its forward again."""
        return 0

    @property
    def num_ranks(self) -> int:
        return self._ranks.count

    @property
    def compute_dtype(self) -> str:
        return self._own.compute_dtype

    def pass_budget(self) -> PassBudget | None:
        return None

    def available_bytes(self) -> int | None:
        return self._own.available_bytes()

    def free_memory(self) -> None:
        self._own.free_memory()

    def use_threads(self, count: int) -> None:
        if count != self._threads:
            self._ranks.do(commands.UseThreads(count), lambda: self._own.use_threads(count))
            self._threads = count

    def reference(self) -> FrozenWeights:
        number = next(self._numbers)
        own, _ = self._ranks.do(commands.OpenReference(number), self._own.reference)
        return RankedWeights(own, number, self._ranks, self._passes)

    def open_full(self) -> TrainableWeights:
        number = next(self._numbers)
        own, _ = self._ranks.do(commands.OpenFull(number), self._own.open_full)
        return RankedTrainable(own, number, self._ranks, self._passes)

    def open_lora(self, spec: LoraSpec) -> TrainableWeights:
        number = next(self._numbers)
        own, _ = self._ranks.do(commands.OpenLora(number, spec), lambda: self._own.open_lora(spec))
        return RankedTrainable(own, number, self._ranks, self._passes)

    def shares_passes(self, weights: TrainableWeights) -> bool:
        """Not among ranks: each adapter's rows are divided by its own plan."""
        return False

    def backward_together(self, parts: Sequence[Part]) -> list[Float32]:
        raise Unsupported("adapters share no pass where a job has several ranks")

    def close(self, weights: TrainableWeights) -> None:
        assert isinstance(weights, RankedTrainable)
        command = commands.CloseWeights(weights.number)
        self._ranks.do(command, lambda: self._own.close(weights.own))


class RankedWeights:
    """Implements `FrozenWeights`."""

    def __init__(self, own: FrozenWeights, number: int, ranks: Ranks, passes: RankPasses) -> None:
        self.number = number
        self._frozen = own
        self._ranks = ranks
        self._passes = passes

    def logprobs(self, batch: PackedTargets) -> Float32:
        shares = self._divide(batch)
        own, others = self._ranks.do(
            commands.Score(self.number),
            lambda: self._passes.logprobs(self._frozen, shares[0].targets()),
            [share.arrays() for share in shares],
        )
        return join_tokens([own, *(arrays["logprobs"] for arrays in others)], shares)

    def likeliest(self, batch: PackedTokens, count: int) -> tuple[Float32, Ints]:
        shares = self._divide(batch)
        own, others = self._ranks.do(
            commands.Likeliest(self.number, count),
            lambda: self._passes.likeliest(self._frozen, shares[0].batch, count),
            [share.arrays() for share in shares],
        )
        logprobs = [own[0], *(arrays["logprobs"] for arrays in others)]
        tokens = [own[1], *(arrays["tokens"] for arrays in others)]
        return join_tokens(logprobs, shares), join_tokens(tokens, shares)

    def embeddings(self, batch: PackedTokens, pooling: Pooling) -> Float32:
        shares = self._divide(batch)
        own, others = self._ranks.do(
            commands.Embed(self.number, pooling),
            lambda: self._passes.embeddings(self._frozen, shares[0].batch, pooling),
            [share.arrays() for share in shares],
        )
        return join_rows([own, *(arrays["embeddings"] for arrays in others)], shares)

    def serving(self) -> dict[str, RawTensor]:
        return self._ranks.do(commands.GatherServing(self.number), self._frozen.serving)[0]

    def _divide(self, batch: PackedTokens) -> list[RowShare]:
        return divide(batch, self._ranks.count)


class RankedTrainable(RankedWeights):
    """Implements `TrainableWeights`."""

    def __init__(
        self, own: TrainableWeights, number: int, ranks: Ranks, passes: RankPasses
    ) -> None:
        super().__init__(own, number, ranks, passes)
        self.own = own

    @property
    def num_trainable(self) -> int:
        return self.own.num_trainable

    def backward(self, batch: PackedTargets, gradient_of: GradientOf) -> Float32:
        """The loss is evaluated once, here, on all ranks' logprobs."""
        shares = self._divide(batch)
        command = commands.Backward(self.number)
        whole: list[Float32] = []

        def reply(found: list[Arrays]) -> list[Arrays]:
            logprobs = join_tokens([arrays["logprobs"] for arrays in found], shares)
            whole.append(logprobs)
            parts = divide_tokens(gradient_of(logprobs), shares)
            return [{"gradient": part} for part in parts]

        exchange = _ExchangeWithAll(self._ranks, command, reply)
        self._ranks.do(
            command,
            lambda: self._passes.backward(self.own, shares[0].targets(), exchange),
            [share.arrays() for share in shares],
        )
        return whole[0]

    def graph(self, batch: PackedTargets) -> PassGraph:
        return RankedGraph(self, batch)

    def fused_backward(self, batch: PackedTargets, gradient_of: SpanGradientOf) -> Float32:
        """Not fused: a rank's logits go before the derivative comes."""
        everything = slice(0, len(batch.tokens))
        return self.backward(batch, lambda logprobs: gradient_of(logprobs, everything))

    def embedding_backward(
        self, batch: PackedTokens, pooling: Pooling, gradient: Float32
    ) -> Float32:
        shares = self._divide(batch)
        gradients = divide_rows(gradient, shares)
        own, others = self._ranks.do(
            commands.EmbedBackward(self.number, pooling),
            lambda: self._passes.embedding_backward(
                self.own, shares[0].batch, pooling, gradients[0]
            ),
            [share.arrays(part) for share, part in zip(shares, gradients, strict=True)],
        )
        return join_rows([own, *(arrays["embeddings"] for arrays in others)], shares)

    def keep_gradient(self) -> None:
        self._ranks.do(commands.KeepGradient(self.number), self.own.keep_gradient)

    def drop_gradient(self) -> None:
        self._ranks.do(commands.DropGradient(self.number), self.own.drop_gradient)

    def clear_gradient(self) -> None:
        self._ranks.do(commands.ClearGradient(self.number), self.own.clear_gradient)

    def step(
        self, adam: AdamParams, divisor: float, norm_metrics: GradNormMetrics
    ) -> dict[str, float]:
        command = commands.Step(self.number, adam, divisor, norm_metrics)
        return self._ranks.do(command, lambda: self.own.step(adam, divisor, norm_metrics))[0]

    def adapter_config(self) -> dict[str, Any] | None:
        return self.own.adapter_config()

    def merged(self) -> MergedWeights:
        return self._ranks.do(commands.GatherMerged(self.number), self.own.merged)[0]

    def files(self) -> WeightFiles:
        return self._ranks.do(commands.GatherFiles(self.number), self.own.files)[0]

    def check_fits(self, masters: Tensors) -> None:
        self.own.check_fits(masters)

    def restore(self, masters: Tensors, optimizer: Tensors | None, gradient: Tensors) -> None:
        updates = None if optimizer is None else _updates(optimizer)
        command = commands.TakeOver(self.number, updates, list(gradient))
        self._ranks.do(command, lambda: self.own.restore(masters, optimizer, gradient))


class _ExchangeWithAll:
    """Implements `Exchange`, for rank 0."""

    def __init__(
        self, ranks: Ranks, command: Command, reply: Callable[[list[Arrays]], list[Arrays]]
    ) -> None:
        self._ranks = ranks
        self._command = command
        self._reply = reply

    def gradient_of(self, logprobs: Float32) -> Float32:
        return self._ranks.exchange(self._command, logprobs, self._reply)[0]["gradient"]

    def give_up(self, error: OutOfMemory) -> Float32:
        return self._ranks.exchange(self._command, error, self._reply)[0]["gradient"]


class RankedGraph:
    """Implements `PassGraph`, and keeps nothing: the backward computes its forward again."""

    def __init__(self, weights: RankedTrainable, batch: PackedTargets) -> None:
        self._weights = weights
        self._batch = batch
        self._logprobs = weights.logprobs(batch)
        self._is_intact = True

    @property
    def logprobs(self) -> Float32:
        return self._logprobs

    @property
    def is_intact(self) -> bool:
        return self._is_intact

    @property
    def size_bytes(self) -> int:
        return 0

    def backward(self, gradient: Float32) -> None:
        self.release()
        self._weights.backward(self._batch, lambda _: gradient)

    def release(self) -> None:
        self._is_intact = False


def _updates(optimizer: Tensors) -> int:
    return int(np.ascontiguousarray(optimizer["updates"].data).view(np.int64)[0])
