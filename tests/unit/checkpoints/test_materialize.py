from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKind,
    Held,
    RawTensor,
    digest_tensors,
    materialize,
    raw_tensor,
    read_state,
    whole_digest,
    write_delta,
)
from homefire.wire.errors import (
    DigestMismatch,
    InvalidArgument,
    ModelUnavailable,
    SizeCapExceeded,
    UnknownSnapshot,
    WrongCheckpointKind,
)

BUCKET = ("local", "job-1", "policy")


@pytest.fixture
def run_of(trainer, make_tensors, nudge):
    """A base `s0` and deltas `s1`, `s2`, … each of the one before."""

    def make(num_deltas: int) -> list[str]:
        trainer.base("s0", make_tensors())
        for i in range(1, num_deltas + 1):
            trainer.delta(f"s{i}", nudge(trainer.published[f"s{i - 1}"], seed=i), f"s{i - 1}")
        return list(trainer.published)

    return make


def test_base_and_deltas_equal_the_full_weights_bit_for_bit(trainer, store, run_of, same):
    for name in run_of(6):
        found = materialize(store, *BUCKET, name)
        assert same(found.tensors, trainer.published[name])
        assert found.manifest.digest == whole_digest(digest_tensors(trainer.published[name]))


def test_a_delta_counts_and_is_small(store, run_of, make_key):
    run_of(1)
    base, delta = store.manifest(make_key("s0")), store.manifest(make_key("s1"))
    assert (delta.kind, delta.parent) == (CheckpointKind.DELTA, "s0")
    assert delta.parent_digest == base.digest
    assert (delta.num_changed, delta.num_elements) == (7, 40 * 8 + 8 + 1 + 5)
    assert delta.size_bytes < base.size_bytes


def test_an_unchanged_model_is_an_empty_delta(trainer, store, make_tensors, same):
    trainer.base("s0", make_tensors())
    delta = trainer.delta("s1", make_tensors(), "s0")
    assert delta.num_changed == 0
    assert same(materialize(store, *BUCKET, "s1").tensors, make_tensors())


def test_only_deltas_since_what_is_held_are_read(trainer, store, run_of, make_key, same):
    run_of(4)
    store.delete(make_key("s0"))
    found = materialize(store, *BUCKET, "s4", held=Held("s2", trainer.published["s2"]))
    assert found.chain == ["s3", "s4"]
    assert same(found.tensors, trainer.published["s4"])


def test_any_order_of_snapshots_loads_and_the_next_delta_too(trainer, store, run_of, nudge, same):
    run_of(9)
    held = None
    for name in ("s5", "s9", "s3"):
        found = materialize(store, *BUCKET, name, held=held)
        assert same(found.tensors, trainer.published[name])
        held = Held(name, found.tensors)
    trainer.delta("s10", nudge(trainer.published["s9"], seed=99), "s9")
    found = materialize(store, *BUCKET, "s10", held=held)
    assert found.chain == [f"s{i}" for i in range(4, 11)]
    assert same(found.tensors, trainer.published["s10"])


def test_what_is_held_is_never_changed(trainer, store, run_of, same):
    run_of(1)
    before = {
        n: RawTensor(t.dtype, t.shape, t.data.copy()) for n, t in trainer.published["s0"].items()
    }
    materialize(store, *BUCKET, "s1", held=Held("s0", trainer.published["s0"]))
    assert same(trainer.published["s0"], before)


def test_what_is_held_already_is_verified_and_returned(trainer, store, run_of):
    run_of(1)
    found = materialize(store, *BUCKET, "s1", held=Held("s1", trainer.published["s1"]))
    assert found.chain == []
    assert found.manifest.identity == "s1"


@pytest.mark.parametrize("identity", ["s1", "s2"])
def test_held_tensors_that_drifted_are_noticed_and_the_store_is_read(
    trainer, store, run_of, nudge, same, caplog, identity
):
    run_of(2)
    drifted = nudge(trainer.published["s1"], seed=50)
    with caplog.at_level(logging.WARNING):
        found = materialize(store, *BUCKET, identity, held=Held("s1", drifted))
    assert same(found.tensors, trainer.published[identity])
    assert found.chain[0] == "s0"
    assert "embed.weight" in caplog.text


def test_a_tensor_that_drifted_outside_the_changed_ones_is_noticed(trainer, store, run_of, caplog):
    run_of(2)
    drifted = {**trainer.published["s1"], "steps": raw_tensor(np.zeros(5, np.int64))}
    with caplog.at_level(logging.WARNING):
        found = materialize(store, *BUCKET, "s2", held=Held("s1", drifted))
    assert found.tensors["steps"].data.tobytes() == np.arange(5, dtype=np.int64).tobytes()
    assert "'steps'" in caplog.text


def test_an_adapter_is_a_peft_directory_that_loads_by_itself(
    trainer, store, make_tensors, make_key, same
):
    manifest = trainer.lora("adapter", make_tensors())
    assert set(manifest.files) == {"adapter_model.safetensors", "adapter_config.json"}
    assert manifest.lora is not None
    assert manifest.lora.rank == 8
    assert (
        b'"peft_type"'
        in (store.directory(make_key("adapter")) / "adapter_config.json").read_bytes()
    )
    assert same(materialize(store, *BUCKET, "adapter").tensors, make_tensors())


def test_a_missing_link_names_both_snapshots(store, run_of, make_key):
    run_of(3)
    store.delete(make_key("s1"))
    with pytest.raises(UnknownSnapshot, match="'s2' is a delta of 's1'"):
        materialize(store, *BUCKET, "s3")


def test_a_parent_that_was_replaced_is_refused(trainer, store, run_of, make_key, make_tensors):
    run_of(1)
    store.delete(make_key("s0"))
    trainer.base("s0", make_tensors(seed=1))
    with pytest.raises(DigestMismatch, match="'s1' is a delta of another 's0'"):
        materialize(store, *BUCKET, "s1")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"extra": raw_tensor(np.zeros(1))}, id="new tensor"),
        pytest.param({"steps": raw_tensor(np.zeros(6, np.int64))}, id="other shape"),
        pytest.param({"steps": raw_tensor(np.zeros(5, np.uint64))}, id="other dtype"),
    ],
)
def test_a_delta_of_other_tensors_is_refused_by_name(
    trainer, store, make_tensors, make_key, change
):
    trainer.base("s0", make_tensors())
    with pytest.raises(InvalidArgument, match=f"'{next(iter(change))}'.*save a base"):
        trainer.delta("s1", {**make_tensors(), **change}, "s0")
    assert not store.exists(make_key("s1"))


@pytest.mark.parametrize("drifted", ["embed.weight", "steps", "missing"])
def test_a_delta_of_tensors_that_are_not_the_parents_is_never_saved_unseen(
    trainer, make_tensors, nudge, store, drifted
):
    """The trainer's copy of the parent went wrong: a delta of it would give other weights."""
    trainer.base("s0", make_tensors())
    new = nudge(make_tensors())
    trainer.published["s0"] = {
        "embed.weight": {**make_tensors(), "embed.weight": new["embed.weight"]},
        "steps": {**make_tensors(), "steps": raw_tensor(np.zeros(5, np.int64))},
        "missing": {"embed.weight": make_tensors()["embed.weight"]},
    }[drifted]
    with pytest.raises(DigestMismatch, match="not that snapshot"):
        trainer.delta("s1", new, "s0")


def test_a_snapshot_above_the_cap_is_refused_before_anything_is_written(
    trainer, store, make_tensors
):
    size = sum(tensor.data.nbytes for tensor in make_tensors().values())
    with pytest.raises(SizeCapExceeded, match=rf"'a' would have \d+ bytes, the cap is {size - 1}"):
        trainer.base("a", make_tensors(), cap_bytes=size - 1)
    with pytest.raises(SizeCapExceeded):
        trainer.lora("b", make_tensors(), cap_bytes=size - 1)
    assert not store.root.exists()


def test_a_delta_above_the_cap_is_refused(trainer, make_tensors, nudge):
    trainer.base("s0", make_tensors())
    with pytest.raises(SizeCapExceeded, match="'s1'"):
        trainer.delta("s1", nudge(make_tensors()), "s0", cap_bytes=10)


def test_from_eighty_percent_of_the_cap_a_warning_is_logged(trainer, make_tensors, caplog):
    size = sum(tensor.data.nbytes for tensor in make_tensors().values())
    with caplog.at_level(logging.WARNING):
        trainer.lora("a", make_tensors(), cap_bytes=size * 2)
        assert not caplog.text
        trainer.lora("b", make_tensors(), cap_bytes=int(size * 1.2))
    assert "sampler/b has" in caplog.text


def test_a_base_without_its_configuration_is_not_saved(trainer, make_tensors, model_files, store):
    (model_files / "config.json").unlink()
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        trainer.base("s0", make_tensors())
    assert store.list("local", "job-1") == []


def test_a_state_is_read_back_with_its_files_and_its_digest_covers_all(
    trainer, store, make_tensors, make_key, same
):
    saved = trainer.state("s", make_tensors())
    manifest, files = read_state(store.directory(make_key("s", CheckpointFamily.STATE)))
    assert manifest == saved
    assert set(files) == {"weights.safetensors", "optimizer.safetensors"}
    assert all(same(tensors, make_tensors()) for tensors in files.values())
    assert "optimizer.safetensors:steps" in manifest.tensors
    directory = store.directory(make_key("s", CheckpointFamily.STATE))
    assert (directory / "optimizer.json").read_bytes() == b'{"step": 3}'


def test_a_sampler_snapshot_given_as_a_state_is_named_for_what_it_is(
    trainer, store, make_key, make_tensors
):
    trainer.base("s0", make_tensors())
    with pytest.raises(WrongCheckpointKind, match="'s0' is a base sampler snapshot"):
        read_state(store.directory(make_key("s0")))


def test_a_directory_that_is_no_checkpoint_is_unknown(tmp_path):
    with pytest.raises(UnknownSnapshot, match="nothing"):
        read_state(tmp_path / "nothing")


def damage(path: Path, generator: np.random.Generator) -> bytes:
    """Flips one bit or cuts the file; returns what it was."""
    original = path.read_bytes()
    damaged = bytearray(original)
    position = int(generator.integers(len(original)))
    if generator.random() < 0.8:
        damaged[position] ^= 1 << int(generator.integers(8))
    else:
        del damaged[position:]
    path.write_bytes(damaged)
    return original


@pytest.mark.parametrize("kind", ["base", "delta", "lora", "state"])
def test_a_flipped_bit_or_a_cut_in_any_file_is_detected(
    kind, trainer, store, make_tensors, nudge, make_key
):
    trainer.base("s0", make_tensors())
    trainer.delta("s1", nudge(make_tensors()), "s0")
    trainer.lora("adapter", make_tensors())
    trainer.state("state", make_tensors())
    family = CheckpointFamily.STATE if kind == "state" else CheckpointFamily.SAMPLER
    name = {"base": "s0", "delta": "s1", "lora": "adapter", "state": "state"}[kind]
    directory = store.directory(make_key(name, family))

    def load() -> None:
        if kind == "state":
            read_state(directory)
        else:
            materialize(store, *BUCKET, name)

    generator = np.random.default_rng(7)
    for path in sorted(directory.iterdir()):
        for _ in range(30):
            original = damage(path, generator)
            with pytest.raises(DigestMismatch):
                load()
            path.write_bytes(original)
    load()


def test_a_delta_that_was_made_from_other_tensors_is_refused_before_it_is_applied(
    trainer, store, make_tensors, nudge, make_key
):
    """Files and manifests agree with each other here; only the base's own bits give it away."""
    real = trainer.base("s0", make_tensors())
    other = trainer.base("other", make_tensors(seed=1))
    write_delta(
        store,
        make_key("s1"),
        nudge(trainer.published["other"]),
        trainer.info(),
        parent=msgspec.structs.replace(other, identity="s0", digest=real.digest),
        parent_tensors=trainer.published["other"],
    )
    with pytest.raises(DigestMismatch, match=r"'s1': tensor 'embed\.weight' is not the one"):
        materialize(store, *BUCKET, "s1")
