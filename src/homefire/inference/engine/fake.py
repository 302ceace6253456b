"""A `Network` without torch, for tests of everything around it: the bigram model of `homefire.model.bigram`.

It serves what the trainer's fake engine saves, bases, deltas and adapters, and starts at once. Its
sampling works row by row in float64, short enough to trust by eye: the torch sampler is tested
against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from homefire.checkpoints import read_model_directory
from homefire.inference.engine.adjustments import Adjustments
from homefire.inference.engine.network import Adapter, PrefillResult, PrefillRow, PromptScore
from homefire.inference.engine.protocol import (
    Alternatives,
    PromptDraws,
    Sampling,
    ServedWeights,
    WeightSet,
)
from homefire.inference.engine.sampling_plan import Draws, SamplingPlan, Uniforms
from homefire.model import bigram
from homefire.wire.errors import InvalidArgument
from homefire.wire.manifest import CheckpointKind, whole_digest
from homefire.wire.tensors import RawTensor, digest_tensors

Doubles = npt.NDArray[np.float64]
LORA_A = f"base_model.model.{bigram.LAYER}.lora_A.weight"
"""float32 [r, V]"""
LORA_B = f"base_model.model.{bigram.LAYER}.lora_B.weight"
"""float32 [V, r]; logits = base[token] + alpha / rank * B @ A[:, token]"""


_Kept = tuple[tuple[int, ...], bigram.Float32]
"""The tokens of a block and the table that they were computed with."""


class BigramNetwork:
    """The state of a sequence is its last token. What slots and blocks would hold is noted all the same,
    and a block of other tokens or weights is an error."""

    def __init__(
        self,
        directory: Path,
        *,
        max_context_length: int,
        num_blocks: int = 4096,
        block_tokens: int = 16,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._base = _base_of(directory)
        self._max_context_length = max_context_length
        self._weight = self._base
        self._adapted: dict[ServedWeights, bigram.Float32] = {}
        self._blocks: dict[int, _Kept] = {}
        self._slots: dict[int, tuple[list[int], bigram.Float32]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self._base)

    @property
    def compute_dtype(self) -> str:
        return "float64"

    @property
    def max_context_length(self) -> int:
        return self._max_context_length

    def prefill(
        self, rows: Sequence[PrefillRow], plan: SamplingPlan, uniforms: Uniforms
    ) -> PrefillResult:
        for row in rows:
            self._check_held(row)
            self._fill(row.tokens, self._table(row.adapter), len(row.held), row.kept)
            for slot in row.slots:
                self._slots[slot] = [*row.tokens], self._table(row.adapter)
        row_of = {slot: row for row in rows for slot in row.slots}
        last = [row_of[slot] for slot in sorted(row_of)]
        tokens, adapters = [row.tokens[-1] for row in last], [row.adapter for row in last]
        draws = self._draw(tokens, plan, uniforms, adapters)
        return PrefillResult(draws, [self._score(row) for row in rows])

    def decode(
        self,
        tokens: Sequence[int],
        plan: SamplingPlan,
        uniforms: Uniforms,
        adapters: Sequence[Adapter],
    ) -> Draws:
        for slot, token in enumerate(tokens):
            self._slots[slot][0].append(token)
        return self._draw(tokens, plan, uniforms, adapters)

    def keep(self, slot: int, *, first: int, blocks: Sequence[int]) -> None:
        tokens, table = self._slots[slot]
        self._fill(tokens, table, first, blocks)

    def move(self, *, source: int, destination: int) -> None:
        self._slots[destination] = self._slots[source]

    def install(self, weights: WeightSet) -> str:
        if weights.kind is CheckpointKind.LORA:
            self._weight, digest = self._read_adapter(weights)
            return digest
        self._weight = self._checked(weights.tensors)
        return _digest({bigram.TENSOR: bigram.to_raw(self._weight)})

    def add_adapter(self, weights: WeightSet) -> str:
        self._adapted[weights.served], digest = self._read_adapter(weights)
        return digest

    def drop_adapter(self, adapter: ServedWeights) -> None:
        del self._adapted[adapter]

    def base_weights(self) -> WeightSet:
        tensors = {bigram.TENSOR: bigram.to_raw(self._base)}
        return WeightSet(ServedWeights(None, _digest(tensors)), CheckpointKind.BASE, tensors)

    def _read_adapter(self, weights: WeightSet) -> tuple[bigram.Float32, str]:
        """The table of base and adapter together, and the digest of the adapter."""
        if weights.lora is None or weights.tensors.keys() != {LORA_A, LORA_B}:
            raise InvalidArgument(f"{weights.served.name!r} is not an adapter of the bigram model")
        a, b = (bigram.from_raw(weights.tensors[name]) for name in (LORA_A, LORA_B))
        if a.shape != (weights.lora.rank, len(self._base)) or b.shape != a.shape[::-1]:
            raise InvalidArgument(f"the adapter's factors are {list(a.shape)} and {list(b.shape)}")
        scaling = np.float32(weights.lora.alpha / weights.lora.rank)
        table = self._base + ((a.T * scaling) @ b.T).astype(np.float32)
        return table, _digest({LORA_A: _raw(a), LORA_B: _raw(b)})

    def _table(self, adapter: Adapter) -> bigram.Float32:
        return self._weight if adapter is None else self._adapted[adapter]

    def _checked(self, tensors: Mapping[str, RawTensor]) -> bigram.Float32:
        tensor = tensors.get(bigram.TENSOR)
        if tensor is None or len(tensors) != 1:
            raise InvalidArgument(f"the weights hold {sorted(tensors)[:3]}, not {bigram.TENSOR!r}")
        if tuple(tensor.shape) != self._base.shape:
            raise InvalidArgument(
                f"{bigram.TENSOR!r} is {list(tensor.shape)}, the model's {list(self._base.shape)}",
                hint="it belongs to another base model",
            )
        return bigram.from_raw(tensor)

    def _fill(
        self, tokens: Sequence[int], table: bigram.Float32, first: int, blocks: Sequence[int]
    ) -> None:
        size = self.block_tokens
        for at, block in enumerate(blocks, start=first):
            filled = tuple(tokens[at * size : (at + 1) * size])
            assert len(filled) == size, f"block {block} is filled with {len(filled)} tokens"
            self._blocks[block] = filled, table

    def _check_held(self, row: PrefillRow) -> None:
        size, table = self.block_tokens, self._table(row.adapter)
        assert row.start <= min(len(row.held) * size, len(row.tokens) - 1)
        for at, block in enumerate(row.held):
            tokens, made_with = self._blocks[block]
            assert tokens == row.tokens[at * size : (at + 1) * size], f"block {block}: {tokens}"
            assert made_with is table or np.array_equal(made_with, table), "other weights"

    def _draw(
        self,
        tokens: Sequence[int],
        plan: SamplingPlan,
        uniforms: Uniforms,
        adapters: Sequence[Adapter],
    ) -> Draws:
        draws = Draws([], [], [], [])
        for row, (token, sampling, uniform, adapter) in enumerate(
            zip(tokens, plan.samplings, uniforms, adapters, strict=True)
        ):
            logits_V = self._table(adapter)[token].astype(np.float64)
            logprobs_V = log_softmax(logits_V)
            sampling_V = sampling_logprobs(adjusted(logits_V, plan.adjustments, row), sampling)
            drawn = inverse_cdf(sampling_V, float(uniform))
            draws.tokens.append(drawn)
            draws.logprobs.append(float(logprobs_V[drawn]))
            draws.sampling_logprobs.append(float(sampling_V[drawn]))
            if plan.num_alternatives:
                draws.alternatives.append(likeliest(logprobs_V, plan.num_alternatives))
        return draws

    def _score(self, row: PrefillRow) -> PromptScore:
        """Position by position, as `PromptScoring` says it."""
        score, scoring = PromptScore(), row.scoring
        if scoring is None:
            return score
        for position in range(len(row.tokens)):
            wants_logprob = scoring.logprobs_from is not None and position >= scoring.logprobs_from
            if position == 0:
                score.logprobs.extend([0.0] * wants_logprob)
                score.alternatives.extend([[]] * wants_logprob)
                continue
            logits_V = self._table(row.adapter)[row.tokens[position - 1]].astype(np.float64)
            logprobs_V = log_softmax(logits_V)
            if wants_logprob:
                score.logprobs.append(float(logprobs_V[row.tokens[position]]))
                score.alternatives.append(likeliest(logprobs_V, scoring.num_alternatives))
            if scoring.targets:
                ids = scoring.targets[position - 1]
                score.target_logprobs.append([float(logprobs_V[i]) if i >= 0 else 0.0 for i in ids])
            if (draws := scoring.draws) is not None:
                drawn = _draw_prompt(logits_V, draws, position)
                score.draws.append([(token, float(logprobs_V[token])) for token in drawn])
        return score


def _draw_prompt(logits_V: Doubles, draws: PromptDraws, position: int) -> list[int]:
    sampling_V = sampling_logprobs(logits_V, Sampling(temperature=draws.temperature))
    uniforms = np.random.default_rng([draws.seed, position]).random(draws.count)
    return [inverse_cdf(sampling_V, float(uniform)) for uniform in uniforms]


def log_softmax(logits_V: Doubles) -> Doubles:
    shifted = logits_V - logits_V.max()
    return shifted - np.log(np.exp(shifted).sum())


def adjusted(logits_V: Doubles, adjustments: Adjustments | None, row: int) -> Doubles:
    """The row's logits with its adjustments, entry by entry."""
    if adjustments is None:
        return logits_V
    changed_V = logits_V.copy()
    for entry in np.flatnonzero(adjustments.rows == row):
        token, repetition = adjustments.tokens[entry], adjustments.repetitions[entry]
        logit = changed_V[token] + adjustments.biases[entry]
        logit = logit / repetition if logit > 0 else logit * repetition
        changed_V[token] = logit - adjustments.penalties[entry]
    return changed_V


def sampling_logprobs(logits_V: Doubles, sampling: Sampling) -> Doubles:
    """The log-probabilities that are drawn from; -inf for what truncation cut off."""
    if sampling.temperature == 0:
        return np.where(np.arange(len(logits_V)) == logits_V.argmax(), 0.0, -np.inf)
    logprobs_V = log_softmax(logits_V / sampling.temperature)
    order = np.argsort(-logprobs_V, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    probabilities = np.exp(logprobs_V[order])
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    keep = (before < sampling.top_p) | (sampling.top_p >= 1)
    keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    kept_V = np.full_like(logprobs_V, -np.inf)
    kept_V[order[keep]] = logprobs_V[order[keep]]
    return log_softmax(kept_V)


def inverse_cdf(logprobs_V: Doubles, uniform: float) -> int:
    cumulative = np.cumsum(np.exp(logprobs_V))
    threshold = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(np.searchsorted(cumulative, threshold, side="right"))


def likeliest(logprobs_V: Doubles, count: int) -> Alternatives:
    order = np.argsort(-logprobs_V, kind="stable")[:count]
    return [(int(token), float(logprobs_V[token])) for token in order]


def _base_of(directory: Path) -> bigram.Float32:
    """The directory's own table when it is a fake's snapshot, else the one every fake starts from."""
    if any(directory.glob("model*.safetensors")):
        tensors = read_model_directory(directory)
        if bigram.TENSOR in tensors:
            return bigram.bfloat16(bigram.from_raw(tensors[bigram.TENSOR]))
    return bigram.base_weight(bigram.vocab_size_of(directory))


def _digest(tensors: Mapping[str, RawTensor]) -> str:
    return whole_digest(digest_tensors(tensors))


def _raw(array: bigram.Float32) -> RawTensor:
    return RawTensor("F32", array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
