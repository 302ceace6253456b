from __future__ import annotations

import pytest

from homefire.foundation import durable
from homefire.trainer.engine import recovery
from homefire.wire.engine import LoadRecovery, SaveRecovery, SlotKind
from homefire.wire.errors import DigestMismatch, FailedPrecondition, StorageFailed


@pytest.fixture
def point(tmp_path):
    return tmp_path / "recovery" / "00000007"


def save(trainer, directory):
    return trainer.engine.prepare_save(SaveRecovery(str(directory))).write()


def load(trainer, directory):
    return trainer.engine.load_recovery(LoadRecovery(str(directory)))


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_a_recovered_engine_goes_on_bit_for_bit(make_trainer, make_batch, point, kind):
    """With an unapplied gradient, a parent snapshot and a reference beside it."""
    trainer = make_trainer().open(kind).open(SlotKind.REFERENCE, "reference").train(0, num_steps=2)
    trainer.save("one")
    trainer.backward(make_batch(5))
    saved = save(trainer, point)
    again = make_trainer()
    assert load(again, point).slots == saved.slots
    for each in (trainer, again):
        each.backward(make_batch(6))
    assert again.step() == trainer.step()
    assert again.digest() == trainer.digest()
    assert again.save("two").digest == trainer.digest()


def test_the_parent_of_the_next_delta_is_remembered(make_trainer, point):
    trainer = make_trainer().open().train(0)
    trainer.save("one")
    save(trainer, point)
    again = make_trainer()
    load(again, point)
    saved = again.train(1).save("two")
    assert (saved.kind, saved.parent) == ("delta", "one")


@pytest.mark.parametrize("name", ["policy.masters", "policy.optimizer", "policy.gradient"])
def test_a_flipped_bit_is_found_before_anything_is_loaded(make_trainer, make_batch, point, name):
    trainer = make_trainer().open()
    trainer.backward(make_batch())
    save(trainer, point)
    path = point / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    again = make_trainer()
    with pytest.raises(DigestMismatch, match=name):
        load(again, point)
    assert again.open().step().step == 1


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format":99,"slots":[],"files":{}}'])
def test_a_damaged_record_is_refused(make_trainer, point, damage):
    save(make_trainer().open(), point)
    (point / recovery.RECORD_FILE).write_bytes(damage)
    with pytest.raises(DigestMismatch):
        load(make_trainer(), point)


def test_a_write_that_fails_leaves_nothing_behind(make_trainer, point, monkeypatch):
    def full_disk(path, disk):
        raise OSError(28, "No space left on device")

    trainer = make_trainer().open()
    monkeypatch.setattr(durable, "_sync_tree", full_disk)
    with pytest.raises(StorageFailed, match="No space"):
        save(trainer, point)
    assert not point.exists()
    assert list(point.parent.iterdir()) == []


def test_a_recovery_point_is_never_overwritten(make_trainer, point):
    trainer = make_trainer().open()
    save(trainer, point)
    with pytest.raises(FailedPrecondition, match="exists"):
        save(trainer, point)


def test_slots_are_restored_into_an_empty_engine_only(make_trainer, point):
    trainer = make_trainer().open()
    save(trainer, point)
    with pytest.raises(FailedPrecondition, match="before any slot"):
        load(trainer, point)
