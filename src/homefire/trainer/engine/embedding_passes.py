"""Forward and backward of passes that end in pooled embeddings rather than logprobs.

An objective that compares rows needs all embeddings before any gradient. So its backward is two
sweeps over the plan: embeddings without a graph, then each micro-batch again with its share of the
gradient. Memory stays that of one micro-batch, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from homefire.trainer.engine.batch import Batch, MicroBatch, micro_batches
from homefire.trainer.engine.embeddings import (
    Objective,
    contrastive,
    cosine_matrix,
    given_cosine_gradient,
    given_gradient,
)
from homefire.trainer.engine.network import Float32, FrozenWeights, TrainableWeights
from homefire.wire.engine import Arrays, ExecutionPlan
from homefire.wire.errors import InvalidArgument, NonFiniteGradient
from homefire.wire.pass_extras import EMBEDDING_GRADS, EmbeddingOutput, EmbeddingPass, Pooling


def forward(
    weights: FrozenWeights, batch: Batch, plan: ExecutionPlan, asked: EmbeddingPass
) -> tuple[dict[str, float], Arrays]:
    """Metrics, and `embedding` [N, E], or [N, N] for cosines."""
    embeddings = _embeddings(weights, batch, plan, asked.pooling)
    return _metrics(batch, {"loss:sum": 0.0}), _reply(embeddings, asked)


def backward(
    weights: TrainableWeights,
    batch: Batch,
    plan: ExecutionPlan,
    asked: EmbeddingPass,
    arrays: Arrays,
) -> tuple[dict[str, float], Arrays, Float32]:
    """The same, with the gradient aside on `weights` and d loss / d embeddings [N, E]."""
    embeddings = _embeddings(weights, batch, plan, asked.pooling)
    objective = _objective(embeddings, asked, arrays)
    gradient = objective.gradient.astype(np.float32)
    if not np.isfinite(gradient).all():
        row = int(np.argwhere(~np.isfinite(gradient))[0][0])
        raise NonFiniteGradient(
            f"the gradient of the embedding of row {row} is not finite; nothing was accumulated"
        )

    def run(cut: MicroBatch) -> Float32:
        share = gradient[cut.batch.row_ids]
        return weights.embedding_backward(cut.batch.packed(), asked.pooling, share)

    _sweep(batch, plan, run)
    return _metrics(batch, objective.metrics), _reply(embeddings, asked), gradient


def num_loss_tokens(gradient: Float32, batch: Batch, pooling: Pooling) -> tuple[int, int]:
    """Tokens and rows that a non-zero gradient reaches."""
    reached = gradient.any(1)
    tokens = batch.lengths[reached].sum() if pooling is Pooling.MEAN else reached.sum()
    return int(tokens), int(reached.sum())


def _objective(embeddings: Float32, asked: EmbeddingPass, arrays: Arrays) -> Objective:
    if asked.contrast is not None:
        return contrastive(embeddings, asked.contrast)
    if EMBEDDING_GRADS not in arrays:
        raise InvalidArgument(f"the batch has no {EMBEDDING_GRADS}", field=EMBEDDING_GRADS)
    if asked.output is EmbeddingOutput.COSINES:
        return given_cosine_gradient(embeddings, arrays[EMBEDDING_GRADS])
    return given_gradient(embeddings, arrays[EMBEDDING_GRADS])


def _embeddings(
    weights: FrozenWeights, batch: Batch, plan: ExecutionPlan, pooling: Pooling
) -> Float32:
    def run(cut: MicroBatch) -> Float32:
        return weights.embeddings(cut.batch.packed(), pooling)

    return _sweep(batch, plan, run)


def _sweep(batch: Batch, plan: ExecutionPlan, run: Callable[[MicroBatch], Float32]) -> Float32:
    """What `run` gives for each row, in the order of the request."""
    parts = [(cut.batch.row_ids, run(cut)) for cut in micro_batches(batch, plan)]
    rows = np.concatenate([row_ids for row_ids, _ in parts])
    return np.concatenate([values for _, values in parts])[np.argsort(rows)]


def _reply(embeddings: Float32, asked: EmbeddingPass) -> Arrays:
    if asked.output is EmbeddingOutput.CONTRASTIVE:
        return {}
    if asked.output is EmbeddingOutput.COSINES:
        return {"embedding": cosine_matrix(embeddings)}
    return {"embedding": embeddings}


def _metrics(batch: Batch, measured: dict[str, float]) -> dict[str, float]:
    return {**measured, "tokens:sum": float(len(batch.tokens))}
