"""The task: write the digits of a number in ascending order (`5271` -> `1257`).

Small enough to be learned on a laptop in a minute, and verifiable: an answer is right or wrong. It
is taught from unreliable demonstrations, so imitation alone cannot solve it and the reward has
something to add.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache
from importlib import resources

DIGITS = "0123456789"
MIN_DIGITS = 3
MAX_DIGITS = 5
HELD_OUT_FILE = "held_out.json"


@dataclass(frozen=True)
class Demonstration:
    """Example: Demonstration("5271", "1237"): this one carries a wrong digit."""

    prompt: str
    answer: str


def solve(prompt: str) -> str:
    return "".join(sorted(prompt))


def reward(prompt: str, answer: str) -> float:
    """1.0 for exactly the right digits (surrounding white space is forgiven), else 0.0."""
    return float(answer.strip() == solve(prompt))


def training_prompt(rng: random.Random) -> str:
    """A random number of 3 to 5 digits that is not in the held-out set."""
    while True:
        prompt = _random_prompt(rng)
        if prompt not in _held_out_set():
            return prompt


def demonstration(rng: random.Random, *, wrong_share: float) -> Demonstration:
    """A training prompt and its answer, with one wrong digit in `wrong_share` of all cases."""
    prompt = training_prompt(rng)
    answer = solve(prompt)
    if rng.random() < wrong_share:
        answer = _with_wrong_digit(answer, rng)
    return Demonstration(prompt, answer)


def held_out_json() -> bytes:
    """The stored evaluation set as it lies in the package: `{"description", "prompts"}`."""
    return resources.files("homefire.quickstart").joinpath(HELD_OUT_FILE).read_bytes()


@cache
def held_out_prompts() -> tuple[str, ...]:
    """512 different prompts that no training step sees."""
    return tuple(json.loads(held_out_json())["prompts"])


def prompts_sha256(prompts: tuple[str, ...]) -> str:
    """Names a prompt set: SHA-256 (hex) of its prompts, one a line, in order."""
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


@cache
def _held_out_set() -> frozenset[str]:
    return frozenset(held_out_prompts())


def _random_prompt(rng: random.Random) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(rng.randint(MIN_DIGITS, MAX_DIGITS)))


def _with_wrong_digit(answer: str, rng: random.Random) -> str:
    place = rng.randrange(len(answer))
    wrong = rng.choice([digit for digit in DIGITS if digit != answer[place]])
    return answer[:place] + wrong + answer[place + 1 :]
