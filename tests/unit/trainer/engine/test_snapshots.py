from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from homefire.checkpoints import DirectoryStore, materialize
from homefire.trainer.engine import snapshots
from homefire.wire.engine import AdoptSnapshot, SaveExternal, SaveSampler, SlotKind
from homefire.wire.errors import (
    DuplicateCheckpoint,
    FailedPrecondition,
    InvalidArgument,
    ReplayDivergence,
    SizeCapExceeded,
    UnknownSnapshot,
)


def test_a_delta_without_a_base_writes_a_base_and_says_so(make_trainer):
    saved = make_trainer().open().save("one", "delta")
    assert saved.kind == "base"
    assert saved.parent is None
    assert "base was written" in saved.note


def test_a_delta_names_the_last_committed_snapshot_and_is_small(make_trainer):
    trainer = make_trainer().open().train(0)
    base = trainer.save("one", "base")
    delta = trainer.train(1).save("two")
    assert (delta.kind, delta.parent, delta.step) == ("delta", "one", 2)
    assert 0 < delta.num_changed < delta.num_elements
    assert delta.size_bytes < base.size_bytes / 2


def test_base_and_deltas_make_the_weights_bit_for_bit(make_trainer, tmp_path):
    trainer = make_trainer().open()
    for step in range(4):
        saved = trainer.train(step).save(f"s{step}")
    found = materialize(DirectoryStore(tmp_path / "store"), "local", "job-1", "policy", "s3")
    assert found.chain == ["s0", "s1", "s2", "s3"]
    assert found.manifest.digest == saved.digest == trainer.digest()


def test_the_same_weights_under_the_same_name_are_saved_once(make_trainer):
    trainer = make_trainer().open().train(0)
    first = trainer.save("one")
    again = trainer.save("one")
    assert (again.digest, again.size_bytes) == (first.digest, first.size_bytes)
    assert trainer.train(1).save("two").parent == "one"


def test_other_weights_under_a_used_name_are_refused(make_trainer):
    trainer = make_trainer().open().train(0)
    trainer.save("one")
    trainer.train(1)
    with pytest.raises(DuplicateCheckpoint, match="'one' exists"):
        trainer.save("one")


@pytest.mark.parametrize("gone", ["one", "two", "three"])
def test_a_broken_chain_heals_with_a_base(make_trainer, tmp_path, gone):
    trainer = make_trainer().open()
    for step, name in enumerate(("one", "two", "three")):
        trainer.train(step).save(name)
    shutil.rmtree(tmp_path / "store/local/job-1/policy/sampler" / gone)
    saved = trainer.train(3).save("four")
    assert saved.kind == "base"
    assert f"'{gone}'" in saved.note


def test_a_chain_that_grew_too_long_starts_again_with_a_base(make_trainer, monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_CHAIN", 2)
    trainer = make_trainer().open()
    kinds = [trainer.train(step).save(f"s{step}").kind for step in range(5)]
    assert kinds == ["base", "delta", "base", "delta", "base"]


def test_adopting_a_committed_snapshot_makes_it_the_parent(make_trainer):
    first = make_trainer().open().train(0)
    first.save("one")
    replayed = make_trainer().open().train(0)
    adopted = replayed.engine.adopt_snapshot(AdoptSnapshot("policy", "one"))
    assert adopted.digest == first.digest()
    assert replayed.train(1).save("two").parent == "one"


def test_adopting_what_other_weights_wrote_is_a_divergence(make_trainer):
    make_trainer().open().train(0).save("one")
    other = make_trainer().open().train(1)
    with pytest.raises(ReplayDivergence, match="'one'"):
        other.engine.adopt_snapshot(AdoptSnapshot("policy", "one"))
    with pytest.raises(UnknownSnapshot):
        other.engine.adopt_snapshot(AdoptSnapshot("policy", "never"))


@pytest.mark.parametrize(("slot", "kind"), [(SlotKind.FULL, "base"), (SlotKind.LORA, "lora")])
def test_an_export_is_whole_and_nothing_descends_from_it(make_trainer, slot, kind):
    trainer = make_trainer().open(slot).train(0)
    snapshot = trainer.save("one")
    exported = trainer.train(1).engine.prepare_save(SaveExternal(slot="policy", name="x")).write()
    assert (exported.kind, exported.step, exported.digest) == (kind, 2, trainer.digest())
    assert trainer.train(2).save("two").parent in (snapshot.identity, None)
    with pytest.raises(DuplicateCheckpoint, match="'x' exists"):
        trainer.engine.prepare_save(SaveExternal(slot="policy", name="x")).write()


def test_an_adapter_is_written_whole_every_time(make_trainer, tmp_path):
    trainer = make_trainer().open(SlotKind.LORA).train(0)
    assert trainer.save("one", "base").kind == "lora"
    saved = trainer.train(1).save("two", "delta")
    assert (saved.kind, saved.parent) == ("lora", None)
    directory = tmp_path / "store/local/job-1/policy/sampler/two"
    assert (directory / "adapter_config.json").is_file()
    assert (directory / "adapter_model.safetensors").is_file()


def test_an_adapter_is_merged_into_a_whole_model_that_nothing_is_a_delta_of(make_trainer):
    trainer = make_trainer().open(SlotKind.LORA).train(0)
    adapter = trainer.save("adapter", "base")
    merged = trainer.save("merged", "merged_base")
    assert (merged.kind, merged.parent) == ("base", None)
    assert trainer.save("merged", "merged_base").note == "saved before"
    assert trainer.engine.adopt_snapshot(AdoptSnapshot("policy", "merged")).digest == merged.digest
    assert trainer.save("again", "delta").digest == adapter.digest
    trainer.train(1)
    with pytest.raises(DuplicateCheckpoint, match="merged"):
        trainer.save("merged", "merged_base")
    with pytest.raises(ReplayDivergence):
        trainer.engine.adopt_snapshot(AdoptSnapshot("policy", "merged"))


def test_unknown_types_names_and_slots_without_weights_are_refused(make_trainer):
    trainer = make_trainer().open(SlotKind.REFERENCE)
    with pytest.raises(FailedPrecondition, match="frozen reference"):
        trainer.save("one")
    with pytest.raises(InvalidArgument, match="checkpoint_type"):
        trainer.save("one", "half")
    full = make_trainer().open()
    with pytest.raises(InvalidArgument, match="merged_base"):
        full.save("one", "merged_base")
    with pytest.raises(InvalidArgument, match="path"):
        full.save("../one")


def test_a_snapshot_above_the_cap_is_refused_and_training_goes_on(make_trainer, monkeypatch):
    trainer = make_trainer().open()
    opened = trainer.engine._opened
    capped = replace(opened.bucket, cap_bytes=1000)
    trainer.engine._opened = replace(opened, bucket=capped)
    with pytest.raises(SizeCapExceeded, match="1000"):
        trainer.save("one", "base")
    assert trainer.train(0).step().step == 2


def test_lifetime_and_metadata_reach_the_manifest(make_trainer, tmp_path):
    trainer = make_trainer().open()
    trainer.engine.prepare_save(
        SaveSampler(
            slot="policy",
            identity="one",
            checkpoint_type="base",
            metadata={"run": "a"},
            ttl_seconds=60,
        )
    ).write()
    store = DirectoryStore(tmp_path / "store")
    manifest = materialize(store, "local", "job-1", "policy", "one").manifest
    assert manifest.metadata == {"run": "a"}
    assert manifest.expires_at == manifest.created_at + 60
