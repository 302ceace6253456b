"""Which weights drew which of an answer's tokens, run by run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import msgspec

from homefire.inference.engine.protocol import Prefilled, Sampled, ServedWeights
from homefire.wire.completions import WeightsSpan

Update = Prefilled | Sampled


class WeightSpans:
    """Of one choice. Tokens count from the first sampled one: nobody drew an echoed prompt."""

    def __init__(self) -> None:
        self.spans: list[WeightsSpan] = []

    def add(self, num_tokens: int, weights: ServedWeights) -> None:
        if num_tokens == 0:
            return
        last = self.spans[-1] if self.spans else None
        end = (last.end if last is not None else 0) + num_tokens
        if last is not None and (last.identity, last.digest) == (weights.name, weights.digest):
            self.spans[-1] = msgspec.structs.replace(last, end=end)
        else:
            self.spans.append(WeightsSpan(end - num_tokens, end, weights.name, weights.digest))

    def are_all_of(self, weights: ServedWeights) -> bool:
        return all(span.digest == weights.digest for span in self.spans)


def by_version(
    updates: Sequence[Update], current: ServedWeights
) -> Iterator[tuple[ServedWeights, list[Update]]]:
    """Neighbours of one version together. A prefill belongs to the version before it, first `current`."""
    versions: list[ServedWeights] = []
    for update in updates:
        current = update.weights if isinstance(update, Sampled) else current
        versions.append(current)
    pairs = zip(versions, updates, strict=True)
    for version, group in groupby(pairs, key=lambda pair: pair[0]):
        yield version, [update for _, update in group]
