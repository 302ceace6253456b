"""Verifying and comparing checkpoints that already lie in the store."""

from __future__ import annotations

import numpy as np
import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey, raw_tensor
from homefire.checkpoints.difference import compare
from homefire.checkpoints.verification import verify
from homefire.wire.errors import FailedPrecondition


@pytest.fixture
def saved(trainer, store, make_tensors, nudge):
    """A base, two deltas, an adapter, a state and an exported adapter; their manifests by name."""
    first = make_tensors()
    second = nudge(first, seed=1)
    trainer.base("one", first)
    trainer.delta("two", second, "one")
    trainer.delta("three", nudge(second, seed=2), "two")
    trainer.lora("adapter", make_tensors(seed=5))
    trainer.state("state", make_tensors(seed=6))
    trainer.lora("outside", make_tensors(seed=7), family=CheckpointFamily.EXTERNAL)
    found = store.list("local", "job-1", slot="policy")
    return {manifest.identity: manifest for manifest in found}


@pytest.fixture
def verdicts(store, saved):
    """What is wrong, by name of the checkpoint; None for what is whole."""

    def of(*names: str) -> dict[str, str | None]:
        chosen = [saved[name] for name in names or saved]
        return {v.manifest.identity: v.error and v.error.message for v in verify(store, chosen)}

    return of


def flip(path, *, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_whole_checkpoints_of_every_kind_verify(verdicts, saved):
    assert verdicts() == dict.fromkeys(saved)
    assert len(saved) == 6


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("adapter", "adapter_model.safetensors"),
        ("state", "optimizer.safetensors"),
        ("outside", "adapter_model.safetensors"),
    ],
)
def test_one_flipped_bit_damages_that_checkpoint_alone(store, saved, verdicts, name, file):
    flip(store.directory(CheckpointKey.of(saved[name])) / file)
    found = verdicts()
    assert file in found.pop(name)
    assert found == dict.fromkeys(found)


def test_a_damaged_base_damages_what_descends_from_it(store, saved, verdicts):
    flip(store.directory(CheckpointKey.of(saved["one"])) / "model.safetensors")
    found = verdicts()
    assert [name for name, error in found.items() if error] == ["one", "two", "three"]
    assert "'one' is damaged" in found["three"]


def test_a_delta_whose_base_was_verified_just_before_is_read_alone(store, saved, verdicts):
    """What is in memory stands for the base, so each file of a chain is read once."""
    flip(store.directory(CheckpointKey.of(saved["two"])) / "delta.safetensors")
    found = verdicts("one", "two")
    assert found["one"] is None
    assert "delta.safetensors" in found["two"]


def test_elements_that_differ_are_counted_by_their_bits():
    before = {"w": raw_tensor(np.array([0.0, 1.0, 2.0, 3.0], np.float32))}
    after = {"w": raw_tensor(np.array([-0.0, 1.0, 2.5, 3.0], np.float32))}
    (row,) = compare(before, after)
    assert (row.num_elements, row.num_changed, row.largest) == (4, 2, 0.5)


def test_dtypes_that_are_no_floats_are_compared_without_a_size():
    before = {"n": raw_tensor(np.array([1, 2], np.int64))}
    after = {"n": raw_tensor(np.array([1, 5], np.int64))}
    (row,) = compare(before, after)
    assert (row.num_changed, row.largest) == (1, None)


def test_snapshots_of_other_shapes_are_not_compared():
    before = {"w": raw_tensor(np.zeros(4, np.float32))}
    after = {"w": raw_tensor(np.zeros(5, np.float32))}
    with pytest.raises(FailedPrecondition, match=r"'w' is F32 \[4\] in the first and F32 \[5\]"):
        compare(before, after)
