"""What the run checks while it goes: a promise that does not hold ends it."""

from __future__ import annotations


class PromiseBroken(RuntimeError):
    """homefire did something else than it says; the message says what was seen and expected."""


def promise(holds: bool, text: str) -> None:
    if not holds:
        raise PromiseBroken(text)
