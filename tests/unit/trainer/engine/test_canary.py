"""Snapshots say of the canary what the trainer's own forward gives, and what it gave before."""

from __future__ import annotations

import numpy as np
import pytest

from homefire.checkpoints import DirectoryStore
from homefire.checkpoints.canary import canary_tokens, distance
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import SlotKind
from homefire.wire.manifest import Canary


def canary_of(trainer, tmp_path, identity: str) -> Canary:
    store = DirectoryStore(tmp_path / "store")
    (manifest,) = [m for m in store.list("local", "job-1") if m.identity == identity]
    assert manifest.canary is not None
    return manifest.canary


def forward(trainer) -> tuple[float, ...]:
    tokens = np.array(canary_tokens(320, 1 << 20))
    arrays = {
        "tokens": tokens,
        "lengths": np.array([len(tokens)]),
        "target_tokens": np.roll(tokens, -1)[:, None],
        "weights": np.ones((len(tokens), 1), np.float32),
    }
    _, reply = trainer.forward(arrays)
    return tuple(map(float, reply["logprobs"][:-1, 0]))


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
@pytest.mark.parametrize("build", [None, torch_engine])
def test_a_snapshot_has_its_own_logprobs_and_those_of_the_one_before(
    make_trainer, make_trainer_of, tmp_path, kind, build
):
    trainer = make_trainer() if build is None else make_trainer_of(build, "job-1")
    trainer.open(kind)
    of_base = forward(trainer)
    trainer.train(0, 2).save("one", "base")
    of_one = forward(trainer)
    trainer.train(1, 2).save("two")
    first, second = (canary_of(trainer, tmp_path, name) for name in ("one", "two"))
    assert (first.logprobs, first.parent_logprobs) == (of_one, of_base)
    assert (second.logprobs, second.parent_logprobs) == (forward(trainer), of_one)
    assert second.tokens == canary_tokens(320, 1 << 20)
    assert second.compute_dtype == "float32"
    assert distance(second.logprobs, of_one) > 0 < distance(of_one, of_base)


def test_a_merged_model_has_none_since_nobody_computed_with_it(make_trainer, tmp_path):
    trainer = make_trainer().open(SlotKind.LORA).train(0)
    trainer.save("merged", "merged_base")
    (manifest,) = DirectoryStore(tmp_path / "store").list("local", "job-1")
    assert manifest.canary is None
