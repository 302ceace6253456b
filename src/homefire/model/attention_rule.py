"""What one attention layer asks for beside queries, keys and values, and softmax attention by it.

Softmax attention goes through torch's fused `scaled_dot_product_attention` where that has the terms
(window, chunk, scaling), and is written out where it has not (soft cap, sinks).

Axes: N rows, H query heads, G key/value heads, n queries, m keys, D key width, Dv value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees: none behind it, and only those of its window or chunk.

    All in positions of the text, whatever the place in the batch.
    """

    window: int | None = None
    """`query - key < window`."""
    chunk: int | None = None
    """`query // chunk == key // chunk` (Llama 4)."""

    def cuts(self, length: int) -> bool:
        """Whether a text of that length sees less than plain causal attention shows."""
        return any(size is not None and size < length for size in (self.window, self.chunk))

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Positions [..., n] and [..., m] -> bool [..., n, m]."""
        query, key = query_positions[..., :, None], key_positions[..., None, :]
        seen = key <= query
        if self.window is not None:
            seen = seen & (query - key < self.window)
        if self.chunk is not None:
            seen = seen & (query // self.chunk == key // self.chunk)
        return seen

    def mask(self, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to scores, [..., n, m]: 0 where visible, else -inf."""
        visible = self.visible(query_positions, key_positions)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return mask.masked_fill_(~visible, float("-inf"))


@dataclass(frozen=True, eq=False)
class AttentionRule:
    """One layer's terms. A context that cannot keep one of them must refuse it by name."""

    reach: Reach = Reach()
    scaling: float | None = None
    """None means D**-0.5."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H]: a score per head that takes its share of the softmax and has no value (gpt-oss)."""

    @property
    def uncommon(self) -> tuple[str, ...]:
        """The terms in use that fused kernels seldom have, by name; a window is common."""
        terms = {
            "chunked attention": self.reach.chunk,
            "a soft cap on attention scores": self.softcap,
            "attention sinks": self.sinks,
        }
        return tuple(name for name, value in terms.items() if value is not None)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: Tensor | None
) -> Tensor:
    """query [N, H, n, D], key [N, G, m, D], value [N, G, m, Dv] -> [N, H, n, Dv].

    `mask` is `rule.reach.mask`, broadcast to [N, 1, n, m]; None means plain causal, n = m.
    """
    if rule.softcap is None and rule.sinks is None:
        return _fused(query, key, value, rule, mask)
    return _written_out(query, key, value, rule, mask)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: Tensor | None
) -> Tensor:
    num_rows, num_heads, num_queries, _ = query.shape
    if num_queries == 1:
        # query heads that share a key head are rows of one product: no repetition of keys
        grouped = query.reshape(num_rows, key.shape[1], -1, query.shape[3])
        output = F.scaled_dot_product_attention(
            grouped, key, value, attn_mask=mask, scale=rule.scaling
        )
        return output.reshape(num_rows, num_heads, 1, -1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=rule.scaling,
        enable_gqa=num_heads != key.shape[1],
    )


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule, mask: Tensor | None
) -> Tensor:
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    grouped = query.unflatten(1, (key.shape[1], -1))  # [N, G, H / G, n, D]
    scores = grouped @ key[:, :, None].transpose(-1, -2) * scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is None:
        positions = torch.arange(query.shape[2], device=query.device)
        mask = Reach().mask(positions, positions, scores.dtype)[None, None]
    scores = scores + mask[:, :, None]
    weights = _softmax(scores, rule.sinks)
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """[N, G, H / G, n, m], in float32 as the models' own; a sink is one more column, dropped after."""
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32)
    column = sinks.view(1, scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1]
