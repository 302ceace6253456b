"""300 deltas in a row: any of them materializes with the digest that its trainer had."""

from __future__ import annotations

import numpy as np
import pytest

from homefire.checkpoints import Held, digest_tensors, materialize, whole_digest

from .conftest import BUCKET

LENGTH = 300


@pytest.fixture
def chain(trainer, make_tensors, nudge) -> list[str]:
    """Digests by number."""
    tensors = make_tensors()
    trainer.base("s0", tensors)
    for number in range(1, LENGTH + 1):
        tensors = nudge(tensors, number)
        trainer.delta(f"s{number}", tensors, f"s{number - 1}")
    return [
        whole_digest(digest_tensors(trainer.published[f"s{number}"]))
        for number in range(LENGTH + 1)
    ]


def test_a_hundred_random_points_of_three_hundred_deltas_have_their_digests(store, chain) -> None:
    """Half from nothing but the store, half by a replica that goes from point to point."""
    generator = np.random.default_rng(0)
    held: Held | None = None
    for turn in range(100):
        number = int(generator.integers(LENGTH + 1))
        alone = turn % 2 == 0
        found = materialize(store, *BUCKET, f"s{number}", held=None if alone else held)
        assert whole_digest(digest_tensors(found.tensors)) == chain[number]
        if not alone:
            held = Held(f"s{number}", found.tensors)
