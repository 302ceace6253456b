"""Five loads: what the steps of a research loop ask of a deployment."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

VOCABULARY = 256
"""Of `tiny`, without its special tokens."""


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Shape:
    name: str
    steps: Callable[[random.Random, int], list[list[Request]]]
    """Makes so many steps, each a list of requests that are sent at once."""
    num_clients: int = 1


def request(numbers: random.Random, prompt_length: int, max_new_tokens: int) -> Request:
    return Request([numbers.randrange(VOCABULARY) for _ in range(prompt_length)], max_new_tokens)


def short_prompts(numbers: random.Random, num_steps: int) -> list[list[Request]]:
    return [[request(numbers, 32, 32) for _ in range(128)] for _ in range(num_steps)]


def long_prompts(numbers: random.Random, num_steps: int) -> list[list[Request]]:
    return [[request(numbers, 1024, 16) for _ in range(48)] for _ in range(num_steps)]


def bursts(numbers: random.Random, num_steps: int) -> list[list[Request]]:
    """Every fourth step is eight times as large as the others."""
    sizes = [256 if number % 4 == 3 else 32 for number in range(num_steps)]
    return [[request(numbers, 64, 32) for _ in range(size)] for size in sizes]


def mixed_lengths(numbers: random.Random, num_steps: int) -> list[list[Request]]:
    def one() -> Request:
        return request(numbers, int(2 ** numbers.uniform(4, 10)), int(2 ** numbers.uniform(2, 7)))

    return [[one() for _ in range(96)] for _ in range(num_steps)]


SHAPES = (
    Shape("short prompts", short_prompts),
    Shape("long prompts", long_prompts),
    Shape("bursts", bursts),
    Shape("mixed lengths", mixed_lengths),
    Shape("two clients", short_prompts, num_clients=2),
)
