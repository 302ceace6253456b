"""Many completions through many hot loads: snapshot k makes every greedy token k, so no token can hide
which weights drew it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from unit.inference.caller import Answered, Caller


@dataclass
class Seen:
    """What the clients got."""

    num_completions: int = 0
    num_refused: int = 0
    """425, and asked again."""
    num_aborted: int = 0
    """Any other status, a broken stream, or too few tokens."""
    num_mislabelled: int = 0
    """Tokens that are not those of the weights that the answer names for them."""
    num_mixed: int = 0
    """Answers of more than one version."""
    by_identity: Counter[str] = field(default_factory=Counter[str])
    """Tokens."""


@dataclass
class CanaryRun:
    """`concurrency` clients ask until there are `num_completions`; the loads are spread over them, so that
    each finds answers running and others waiting, and some begin after it."""

    caller: Caller
    identities: list[str]
    transition: str
    num_completions: int
    concurrency: int = 64
    seen: Seen = field(default_factory=Seen)

    async def run(self) -> Seen:
        self._numbers = itertools.count()
        self._is_loaded = [asyncio.Event() for _ in self.identities]
        self._is_due = [asyncio.Event() for _ in self.identities]
        self._is_loaded[0].set()
        clients = [asyncio.create_task(self._client()) for _ in range(self.concurrency)]
        try:
            for number, identity in enumerate(self.identities[1:], start=1):
                await self._is_due[number].wait()
                status = await self.caller.hot_load(identity, transition=self.transition)
                assert (status.identity, status.error) == (identity, "")
                self._is_loaded[number].set()
            await asyncio.gather(*clients)
        finally:
            for client in clients:
                client.cancel()
        return self.seen

    async def _client(self) -> None:
        while (number := next(self._numbers)) < self.num_completions:
            load = max(0, number - self._slack) // self._per_load
            await self._loaded(load).wait()
            body = asked(number)
            while (answered := await self.caller.complete(**body)).status == 425:
                self.seen.num_refused += 1
                await self._loaded(load + 1).wait()
            judge(answered, body["max_tokens"], self.seen)
            self._is_due[self._load_at(self.seen.num_completions + self._slack)].set()

    @property
    def _per_load(self) -> int:
        return self.num_completions // len(self.identities)

    @property
    def _slack(self) -> int:
        """So many completions before its turn a load begins, and so many after it may have begun."""
        return self._per_load // 2

    def _load_at(self, completion: int) -> int:
        return min(completion // self._per_load, len(self.identities) - 1)

    def _loaded(self, load: int) -> asyncio.Event:
        return self._is_loaded[min(load, len(self.identities) - 1)]


def asked(number: int) -> dict[str, Any]:
    """Prompts share beginnings, so that what is cached of one is met by others under other weights."""
    return {
        "prompt": [1 + number % 3] * (20 + number % 5),
        "max_tokens": 2 + number % 17,
        "temperature": 0,
        "ignore_eos": True,
        "raw_output": True,
        "stream": number % 2 == 0,
    }


def judge(answered: Answered, num_tokens: int, seen: Seen) -> None:
    seen.num_completions += 1
    tokens, names = labelled(answered) if answered.status == 200 else ([], [])
    seen.num_aborted += len(tokens) != num_tokens
    seen.num_mixed += len(set(names)) > 1
    seen.num_mislabelled += sum(
        name != f"step-{token}" for token, name in zip(tokens, names, strict=True)
    )
    seen.by_identity.update(names)


def labelled(answered: Answered) -> tuple[list[int], list[str]]:
    """The tokens of the only choice, and of each the identity that the answer names for it."""
    is_stream = answered.headers["content-type"].startswith("text/event-stream")
    last = answered.events()[-1] if is_stream else answered.json()
    if "homefire" not in last:
        return [], []
    info = last["homefire"]
    tokens = last["choices"][0]["raw_output"]["completion_token_ids"]
    whole = {"start": 0, "end": len(tokens), **info["weights"]}
    (spans,) = info.get("spans", [[whole]])
    return tokens, [s["identity"] for s in spans for _ in range(s["start"], s["end"])]
