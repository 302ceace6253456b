"""Objectives on pooled embeddings: value and gradient, in float64.

The whole request is one objective, whatever micro-batches it runs in: cosines are with every row.
With U the embeddings divided by their norms:

    cos_similarity_matrix   S = U U'; the client's gradient is d loss / d S
    contrastive_loss        (cross entropy of each query's own document among all documents and
                            extra negatives, plus that of each document's own query among the queries)
                            / 2, both means over the B pairs, logits = cosine / temperature
                            (InfoNCE, arXiv:1807.03748, in both directions)

Axes: N rows, E width, B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from homefire.trainer.engine.losses import Float64
from homefire.trainer.engine.network import Float32
from homefire.wire.errors import LengthMismatch, NonFiniteGradient
from homefire.wire.pass_extras import EMBEDDING_GRADS, Contrast


@dataclass(frozen=True)
class Objective:
    gradient: Float64
    """[N, E]: d loss / d embeddings."""
    metrics: dict[str, float]


def given_gradient(embeddings: Float32, gradient: Float32) -> Objective:
    """A loss that is linear in the embeddings; `gradient` [N, E] is the client's."""
    _check_shape(gradient, embeddings.shape)
    slope = gradient.astype(np.float64)
    return Objective(slope, {"loss:sum": float((slope * embeddings).sum())})


def cosine_matrix(embeddings: Float32) -> Float32:
    """[N, N]"""
    unit, _ = _unit(embeddings)
    return (unit @ unit.T).astype(np.float32)


def given_cosine_gradient(embeddings: Float32, gradient: Float32) -> Objective:
    """`gradient` [N, N] is d loss / d cosines, the client's; row i came with row i."""
    count = len(embeddings)
    _check_shape(gradient, (count, count))
    unit, norms = _unit(embeddings)
    slope = gradient.astype(np.float64)
    value = float((slope * (unit @ unit.T)).sum())
    return Objective(_through_norm((slope + slope.T) @ unit, unit, norms), {"loss:sum": value})


def contrastive(embeddings: Float32, contrast: Contrast) -> Objective:
    pairs = contrast.num_queries
    unit, norms = _unit(embeddings)
    queries, documents = unit[:pairs], unit[pairs:]
    logits = queries @ documents.T / contrast.temperature
    forth, d_forth = _own_among(logits)
    back, d_back = _own_among(logits[:, :pairs].T)
    d_logits = d_forth / 2
    d_logits[:, :pairs] += d_back.T / 2
    d_cosine = d_logits / contrast.temperature
    d_unit = np.concatenate([d_cosine @ documents, d_cosine.T @ queries])
    loss = (forth + back) / 2
    hits = (logits.argmax(1) == np.arange(pairs)).mean()
    measured = {
        "loss": loss,
        "loss:sum": loss,
        "query_to_document_loss:mean": forth,
        "document_to_query_loss:mean": back,
        "retrieval_accuracy:mean": float(hits),
    }
    return Objective(_through_norm(d_unit, unit, norms), measured)


def _own_among(logits: Float64) -> tuple[float, Float64]:
    """Mean over rows i of -log softmax(logits[i])[i], and its derivative."""
    count = len(logits)
    own = np.arange(count)
    shifted = logits - logits.max(1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    gradient = np.exp(logprobs)
    gradient[own, own] -= 1
    return float(-logprobs[own, own].mean()), gradient / count


def _unit(embeddings: Float32) -> tuple[Float64, Float64]:
    """Embeddings of norm 1 [N, E], and the norms [N, 1]."""
    wide = embeddings.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(broken):
        row = int(broken[0])
        raise NonFiniteGradient(
            f"the embedding of row {row} has norm {norms[row, 0]}, so its cosines are undefined",
            hint="check the model's weights; nothing was accumulated",
        )
    return wide / norms, norms


def _through_norm(d_unit: Float64, unit: Float64, norms: Float64) -> Float64:
    """d loss / d unit vectors -> d loss / d vectors."""
    return (d_unit - unit * (unit * d_unit).sum(1, keepdims=True)) / norms


def _check_shape(gradient: Float32, wanted: tuple[int, ...]) -> None:
    if gradient.shape != wanted:
        raise LengthMismatch(
            f"{EMBEDDING_GRADS} has shape {list(gradient.shape)}, the output {list(wanted)}",
            hint="send the gradient of what forward returned, with the same config and rows",
            field=EMBEDDING_GRADS,
        )
