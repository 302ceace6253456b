"""From the engine's updates to the result of an `asample`."""

from __future__ import annotations

import numpy as np

from homefire.inference.engine.protocol import Alternatives, Prefilled, Sampled, ServedWeights
from homefire.inference.replica.reply import Reply
from homefire.inference.replica.tinker_order import SampleOrder, Targets
from homefire.wire.completions import FinishReason
from homefire.wire.pooled import SamplingSession
from homefire.wire.tinker_sampling import (
    AltTokens,
    FloatTensor,
    SampledTokens,
    SampleOutput,
    StopReason,
    TopkLogprobs,
    WeightsName,
)

_STOP_REASONS = {
    FinishReason.STOP: StopReason.STOP,
    FinishReason.LENGTH: StopReason.LENGTH,
}


class _Sample:
    """One sequence while it comes about."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[Alternatives] = []
        self.stop_reason = StopReason.LENGTH

    def add(self, update: Sampled) -> None:
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.alternatives += update.alternatives
        if update.finish is not None:
            self.stop_reason = _STOP_REASONS[update.finish]

    def result(self, num_alternatives: int) -> SampledTokens:
        return SampledTokens(
            stop_reason=self.stop_reason,
            tokens=np.array(self.tokens, np.int32).tobytes(),
            logprobs=_floats(self.logprobs),
            topk=TopkLogprobs.of(self.alternatives, num_alternatives) if num_alternatives else None,
        )


async def collect(reply: Reply, order: SampleOrder, session: SamplingSession) -> SampleOutput:
    """Waits for all samples. Raises what ended the generation."""
    started = await reply.started()
    samples = [_Sample() for _ in range(order.num_samples)]
    prefilled: Prefilled | None = None
    async for updates in reply.batches():
        for update in updates:
            if isinstance(update, Sampled):
                samples[update.index].add(update)
            elif update.index == 0:
                prefilled = update
    assert prefilled is not None, "a prompt is prefilled before its first token"
    return _output(samples, prefilled, order, _name(started.weights, session))


def _output(
    samples: list[_Sample], prefilled: Prefilled, order: SampleOrder, weights: WeightsName
) -> SampleOutput:
    """`prefilled` is the first sample's, with which the prompt was scored."""
    scoring = order.scoring
    return SampleOutput(
        sequences=[sample.result(order.num_alternatives) for sample in samples],
        weights=weights,
        prompt_logprobs=_prompt_logprobs(prefilled, order) if order.wants_prompt_logprobs else None,
        topk_prompt_logprobs=_topk_prompt(prefilled, order)
        if scoring and scoring.num_alternatives
        else None,
        target_prompt_logprobs=_target_logprobs(prefilled, order.targets)
        if order.targets
        else None,
        prompt_alt_tokens=_alt_tokens(prefilled, scoring.draws.count)
        if scoring and scoring.draws
        else None,
        prompt_cache_hit_tokens=prefilled.num_cached_tokens,
    )


def _name(served: ServedWeights, session: SamplingSession) -> WeightsName:
    return WeightsName(served.name, served.digest, session.model_path)


def _prompt_logprobs(prefilled: Prefilled, order: SampleOrder) -> bytes:
    """The whole prompt's length: NaN before what was scored, and always at position 0."""
    logprobs = np.full(len(order.prompt), np.nan, np.float32)
    logprobs[len(order.prompt) - len(prefilled.logprobs) :] = prefilled.logprobs
    logprobs[0] = np.nan
    return logprobs.tobytes()


def _topk_prompt(prefilled: Prefilled, order: SampleOrder) -> TopkLogprobs:
    assert order.scoring is not None
    unscored: list[Alternatives] = [[]] * (len(order.prompt) - len(prefilled.alternatives))
    return TopkLogprobs.of(unscored + prefilled.alternatives, order.scoring.num_alternatives)


def _target_logprobs(prefilled: Prefilled, targets: Targets) -> FloatTensor:
    return FloatTensor(
        data=_floats([logprob for row in prefilled.target_logprobs for logprob in row]),
        shape=targets.shape,
        sparse_crow_indices=targets.sparse_crow_indices,
        sparse_col_indices=targets.sparse_col_indices,
    )


def _alt_tokens(prefilled: Prefilled, count: int) -> AltTokens:
    drawn = [pair for row in prefilled.draws for pair in row]
    return AltTokens(
        tokens=np.array([token for token, _ in drawn], np.int64).tobytes(),
        logprobs=_floats([logprob for _, logprob in drawn]),
        shape=[len(prefilled.draws), count],
    )


def _floats(values: list[float]) -> bytes:
    return np.array(values, np.float32).tobytes()
