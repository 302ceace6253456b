"""What an evaluation's record says of its completions, and what a rerun of it compares. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from homefire.sdk.completions import SampledCompletion
from homefire.wire.records import token_lists_sha256

SEED_IS_INDEX = "index of the prompt"
"""A `seed` that is another for every prompt: 0 for the first."""


def prompts_of(completions: Sequence[SampledCompletion]) -> list[list[int]]:
    return [completion.full_tokens[: completion.prompt_len] for completion in completions]


def completions_sha256(completions: Sequence[SampledCompletion]) -> str:
    return token_lists_sha256([c.full_tokens[c.prompt_len :] for c in completions])


def check_same_weights(
    completions: Sequence[SampledCompletion], *, identity: str, digest: str
) -> None:
    """ValueError names the first completion that other weights made. A digest may be short."""
    for number, completion in enumerate(completions):
        made_by = completion.weights
        if made_by is None:
            continue
        shorter = min(len(digest), len(made_by.digest or ""))
        same_digest = (made_by.digest or "")[:shorter] == digest[:shorter]
        if made_by.identity != identity or not same_digest:
            raise ValueError(f"completion {number} was made by {made_by}, not by {identity!r}")


def request_options(sampling: Mapping[str, Any], *, index: int) -> dict[str, Any]:
    """The request of prompt `index` again. ValueError says why it cannot be the same.

    Example: {"temperature": 1.0, "max_tokens": 8, "seed": "index of the prompt"}.
    """
    options = {name: value for name, value in sampling.items() if name in _REQUEST_FIELDS}
    if not isinstance(options.get("max_tokens"), int):
        raise ValueError("the record does not say max_tokens")
    temperature = options.get("temperature")
    if not isinstance(temperature, int | float):
        raise ValueError("the record does not say the temperature")
    seed = options.get("seed")
    if seed == SEED_IS_INDEX:
        options["seed"] = index
    elif temperature > 0 and not isinstance(seed, int):
        raise ValueError("it was sampled without a seed, so it cannot be sampled the same again")
    return options


_REQUEST_FIELDS = frozenset(
    {"max_tokens", "temperature", "seed", "top_p", "top_k", "min_p", "stop"}
    | {"frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"}
)
"""What of `sampling` goes into the request; the rest is for people."""
