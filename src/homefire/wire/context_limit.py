"""How long a text may be so that its numbers are its own, from a Hugging Face configuration.

Control asks when a job or deployment is created, the engines when they load: both by this rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import msgspec

_DEFAULT_TOKENS = 2048
_LENGTH_FIELDS = ("max_position_embeddings", "n_positions")


class ContextLimit(msgspec.Struct, frozen=True):
    """Example: ContextLimit(4096, "longrope changes its frequencies …")."""

    num_tokens: int
    reason: str = ""
    """Why it is fewer than the positions that the model has; empty where it is not."""


def context_limit(text_config: Mapping[str, object]) -> ContextLimit:
    """Tokens of one text up to which no other text of its batch changes its numbers."""
    positions = _positions(text_config)
    limits = [ContextLimit(positions), *_rope_limits(text_config), *_temperature(text_config)]
    return min(limits, key=lambda limit: limit.num_tokens)


def _positions(config: Mapping[str, object]) -> int:
    return next((n for name in _LENGTH_FIELDS if (n := _count(config, name))), _DEFAULT_TOKENS)


def _rope_limits(config: Mapping[str, object]) -> Iterator[ContextLimit]:
    """These ropes choose frequencies by the longest text of the batch, once it is past pre-training."""
    for rope in _ropes(config):
        kind = rope.get("rope_type") or rope.get("type")
        if kind in ("longrope", "su"):
            field = "original_max_position_embeddings"
            tokens = _count(rope, field) or _count(config, field) or _positions(config)
        elif kind == "dynamic":
            tokens = _positions(config)
        else:
            continue
        yield ContextLimit(
            tokens, f"past {tokens} tokens its {kind} rope depends on the longest text of the batch"
        )


def _ropes(config: Mapping[str, object]) -> list[Mapping[str, object]]:
    """One, or one per type of layer."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(found, Mapping):
        return []
    rope = cast("Mapping[str, object]", found)
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return [cast("Mapping[str, object]", value) for value in nested] or [rope]


def _temperature(config: Mapping[str, object]) -> Iterator[ContextLimit]:
    """Llama 4 scales queries by their place in the batch's row; below floor_scale by exactly 1."""
    floor = _count(config, "floor_scale")
    if config.get("attn_temperature_tuning") and floor:
        tokens = floor - 1
        yield ContextLimit(
            tokens, f"past {tokens} tokens it scales queries by their place in the batch's row"
        )


def _count(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    return int(value) if isinstance(value, int | float) else None
