from __future__ import annotations

import pytest

from homefire.wire.engine import LoadState, SaveState, SlotKind
from homefire.wire.errors import (
    DuplicateCheckpoint,
    InvalidArgument,
    UnknownSnapshot,
    WrongCheckpointKind,
)


def save(trainer, name="state-1", **options):
    return trainer.engine.prepare_save(SaveState(slot="policy", name=name, **options)).write()


def load(trainer, name="state-1", *, job="job-1", with_optimizer=True, family="state"):
    directory = trainer.root / "store/local" / job / "policy" / family / name
    return trainer.engine.load_state(
        LoadState(slot="policy", directory=str(directory), with_optimizer=with_optimizer)
    )


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_save_load_step_equals_step_bit_for_bit(make_trainer, kind):
    trainer = make_trainer().open(kind).train(0, num_steps=3)
    save(trainer)
    expected = trainer.train(9).digest()
    branch = make_trainer("job-2").open(kind)
    loaded = load(branch)
    assert loaded.step == 3
    assert branch.train(9).digest() == expected


def test_without_the_optimizer_its_moments_start_afresh(make_trainer):
    trainer = make_trainer().open().train(0, num_steps=3)
    save(trainer)
    digest = trainer.digest()
    expected = trainer.train(9).digest()
    assert load(trainer, with_optimizer=False).digest == digest
    assert trainer.train(9).digest() != expected


def test_loading_clears_accumulated_gradients(make_trainer, make_batch):
    trainer = make_trainer().open()
    save(trainer)
    trainer.backward(make_batch())
    load(trainer)
    assert trainer.step().metrics["num_loss_tokens"] == 0


def test_the_next_delta_after_loading_is_against_the_last_snapshot(make_trainer):
    trainer = make_trainer().open()
    save(trainer)
    trainer.train(0).save("one")
    load(trainer)
    saved = trainer.save("two")
    assert (saved.kind, saved.parent, saved.step) == ("delta", "one", 0)
    assert saved.digest == trainer.digest()


def test_the_same_state_again_is_fine_and_another_is_not(make_trainer):
    trainer = make_trainer().open().train(0)
    first = save(trainer)
    assert save(trainer) == first
    trainer.train(1)
    with pytest.raises(DuplicateCheckpoint, match="overwrite"):
        save(trainer)
    assert save(trainer, overwrite=True).digest != first.digest


def test_a_sampler_snapshot_is_not_a_state(make_trainer):
    trainer = make_trainer().open()
    trainer.save("one")
    with pytest.raises(WrongCheckpointKind, match="'one'"):
        load(trainer, "one", family="sampler")


def test_a_state_that_does_not_exist_is_named(make_trainer):
    with pytest.raises(UnknownSnapshot, match="never"):
        load(make_trainer().open(), "never")


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_a_state_of_another_rank_or_kind_changes_nothing(make_trainer, kind):
    save(make_trainer().open(SlotKind.LORA, rank=8))
    trainer = make_trainer("job-2").open(kind, rank=4).train(0)
    digest = trainer.digest()
    with pytest.raises(InvalidArgument, match="LoRA of rank 8"):
        load(trainer)
    assert trainer.digest() == digest


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_a_state_is_of_a_step_whatever_gradients_wait(make_trainer, make_batch, kind):
    """Gradients that no step took are no part of it, and saving does not take them away."""
    trainer = make_trainer().open(kind).train(0)
    before = save(trainer, "before")
    trainer.backward(make_batch())
    assert save(trainer, "amid").digest == before.digest
    assert trainer.step().metrics["num_loss_tokens"] > 0


def test_a_state_is_safetensors_and_its_manifest_and_nothing_else(make_trainer):
    trainer = make_trainer().open().train(0)
    save(trainer)
    directory = trainer.root / "store/local/job-1/policy/state/state-1"
    assert {path.name for path in directory.iterdir()} == {
        "manifest.json",
        "optimizer.safetensors",
        "weights.safetensors",
    }
