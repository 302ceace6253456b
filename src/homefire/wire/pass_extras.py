"""What a pass may compute beside, or instead of, a loss on its targets (fireworks.md §3.5).

`loss_fn_config` says so, next to the loss's own keys:
    {"top_k": 5}                                          the likeliest tokens at each position
    {"output": "embedding", "pooling": "mean"}            one vector per row
    {"output": "cos_similarity_matrix", "pooling": …}     row i of the matrix of their cosines
    {"output": "contrastive_loss", "num_queries": …, …}   a loss on those cosines
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.losses import Config

TOP_K = "top_k"
MAX_TOP_K = 1024
MAX_TOP_ELEMENTS = 1 << 26
"""Tokens times `top_k` of one request; each costs 12 bytes of its answer."""
EMBEDDING_GRADS = "embedding_grads"
_OUTPUT = "output"
Choice = TypeVar("Choice", bound=StrEnum)
_CONTRASTIVE_KEYS = ("num_queries", "temperature", "num_extra_negatives")


class Pooling(StrEnum):
    """How the last layer's states of a row's tokens become one vector."""

    MEAN = "mean"
    LAST = "last"


class EmbeddingOutput(StrEnum):
    """What is made of the pooled vectors."""

    EMBEDDING = "embedding"
    """The vectors themselves."""
    COSINES = "cos_similarity_matrix"
    """Their cosines with every row of the request."""
    CONTRASTIVE = "contrastive_loss"
    """Bidirectional InfoNCE; computed on the server, nothing per row comes back."""


@dataclass(frozen=True)
class Contrast:
    """Rows are queries, then their documents, then documents of no query."""

    num_queries: int
    temperature: float
    num_extra_negatives: int = 0

    @property
    def num_rows(self) -> int:
        return 2 * self.num_queries + self.num_extra_negatives


@dataclass(frozen=True)
class EmbeddingPass:
    output: EmbeddingOutput
    pooling: Pooling
    contrast: Contrast | None = None
    """Of a contrastive loss."""


@dataclass(frozen=True)
class PassExtras:
    loss_config: Config = field(default_factory=dict[str, float | str])
    """What is left for the loss."""
    top_k: int | None = None
    embedding: EmbeddingPass | None = None
    """The pass runs on pooled states, and computes no loss on targets."""


def read_extras(loss_fn: str, config: Config, *, num_rows: int, forward_only: bool) -> PassExtras:
    """Raises InvalidArgument or Unsupported, naming the key."""
    if _OUTPUT in config and config[_OUTPUT] != "logprobs":
        _require_cross_entropy(loss_fn, _OUTPUT)
        return PassExtras(embedding=_embedding(config, num_rows, forward_only=forward_only))
    rest = {key: value for key, value in config.items() if key not in (TOP_K, _OUTPUT)}
    if TOP_K not in config:
        return PassExtras(rest)
    _require_cross_entropy(loss_fn, TOP_K)
    if not forward_only:
        raise InvalidArgument(
            "top_k comes with forward, not with forward_backward",
            hint="call forward on the same data",
            field=f"loss_fn_config.{TOP_K}",
        )
    return PassExtras(rest, top_k=_integer(config, TOP_K, at_least=1, at_most=MAX_TOP_K))


def _embedding(config: Config, num_rows: int, *, forward_only: bool) -> EmbeddingPass:
    output = _choice(config, _OUTPUT, EmbeddingOutput)
    contrastive = output is EmbeddingOutput.CONTRASTIVE
    allowed = {_OUTPUT, "pooling", *(_CONTRASTIVE_KEYS if contrastive else ())}
    unknown = sorted(config.keys() - allowed)
    if unknown:
        raise InvalidArgument(
            f"loss_fn_config has {unknown[0]!r}, which output {output.value!r} does not take",
            hint=f"it takes {', '.join(sorted(allowed))}",
            field=f"loss_fn_config.{unknown[0]}",
        )
    pooling = _choice(config, "pooling", Pooling)
    if not contrastive:
        return EmbeddingPass(output, pooling)
    if forward_only:
        raise InvalidArgument(
            "contrastive_loss comes with forward_backward, not with forward",
            hint="forward with output 'cos_similarity_matrix' gives what it is made of",
            field="loss_fn_config.output",
        )
    return EmbeddingPass(output, pooling, _contrast(config, num_rows))


def _contrast(config: Config, num_rows: int) -> Contrast:
    temperature = config.get("temperature", "absent")
    if isinstance(temperature, str) or not 0 < temperature < float("inf"):
        raise InvalidArgument(
            f"temperature is {temperature}",
            hint="use a number above 0, typically 0.01 to 0.1",
            field="loss_fn_config.temperature",
        )
    negatives = "num_extra_negatives"
    contrast = Contrast(
        num_queries=_integer(config, "num_queries", at_least=1),
        temperature=float(temperature),
        num_extra_negatives=_integer(config, negatives) if negatives in config else 0,
    )
    if contrast.num_rows != num_rows:
        raise InvalidArgument(
            f"contrastive_loss with {contrast.num_queries} queries and"
            f" {contrast.num_extra_negatives} extra negatives needs {contrast.num_rows} datums,"
            f" not {num_rows}",
            hint="send the queries, then their documents, then the extra negatives",
            field="data",
        )
    return contrast


def _require_cross_entropy(loss_fn: str, key: str) -> None:
    if loss_fn != "cross_entropy":
        raise InvalidArgument(
            f"loss_fn_config {key!r} goes with cross_entropy, not with {loss_fn}",
            field=f"loss_fn_config.{key}",
        )


def _choice(config: Config, key: str, kind: type[Choice]) -> Choice:
    asked = config.get(key, "absent")
    if asked == "projection":
        raise Unsupported(
            "output 'projection' is not supported: models have no projection head here",
            hint="use output 'embedding' and project in your own loss",
            field=f"loss_fn_config.{key}",
        )
    if asked not in list(kind):
        raise InvalidArgument(
            f"{key} is {asked!r}", hint=f"use {', '.join(kind)}", field=f"loss_fn_config.{key}"
        )
    return kind(asked)


def _integer(config: Config, key: str, *, at_least: int = 0, at_most: int = 1 << 30) -> int:
    """Some clients send all numbers as floats."""
    value = config.get(key, "absent")
    if isinstance(value, str) or not float(value).is_integer() or not at_least <= value <= at_most:
        raise InvalidArgument(
            f"{key} is {value}",
            hint=f"use a whole number from {at_least} to {at_most}",
            field=f"loss_fn_config.{key}",
        )
    return int(value)
