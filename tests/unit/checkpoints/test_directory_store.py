from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey, read_state
from homefire.wire.errors import (
    DuplicateCheckpoint,
    InvalidArgument,
    StorageFailed,
    UnknownSnapshot,
)

SAVE_STATE_OVER_PREDECESSOR = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    from homefire.checkpoints import *

    store = DirectoryStore(Path(sys.argv[1]))
    key = CheckpointKey("local", "job-1", "policy", CheckpointFamily.STATE, "s")
    tensors = {"w": raw_tensor(np.full(4, float(sys.argv[2]), np.float32))}
    info = SnapshotInfo(step=int(sys.argv[2]), base_model="tiny", created_at=0.0)
    write_state(store, key, {"weights.safetensors": tensors}, info, overwrite=True)
    """
)


def save_in_process(store, step: int, failpoints: str = "") -> int:
    command = [sys.executable, "-c", SAVE_STATE_OVER_PREDECESSOR, str(store.root), str(step)]
    environment = {**os.environ, "HOMEFIRE_FAILPOINTS": failpoints}
    return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode


def entries(store) -> list[str]:
    directory = store.root / "local/job-1/policy"
    return sorted(path.name for family in directory.iterdir() for path in family.iterdir())


def copy_files_of(store, key, manifest, destination) -> None:
    for name in manifest.files:
        (destination / name).write_bytes((store.directory(key) / name).read_bytes())


def test_a_committed_checkpoint_is_found_under_its_key(trainer, store, make_key, make_tensors):
    manifest = trainer.base("a", make_tensors())
    assert store.exists(make_key("a"))
    assert store.manifest(make_key("a")) == manifest
    assert store.directory(make_key("a")) == store.root / "local/job-1/policy/sampler/a"
    assert {path.name for path in store.directory(make_key("a")).iterdir()} == {
        "manifest.json",
        *manifest.files,
    }


def test_what_is_not_committed_leaves_nothing(store, make_key):
    with store.stage(make_key("a")) as staged:
        (staged.directory / "file").write_bytes(b"x")
    assert not store.exists(make_key("a"))
    assert entries(store) == []


def test_an_error_while_writing_leaves_nothing(store, make_key):
    def fail_half_way():
        with store.stage(make_key("a")) as staged:
            (staged.directory / "file").write_bytes(b"x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert entries(store) == []


def test_a_disk_error_is_reported_as_such(store, make_key):
    with pytest.raises(StorageFailed, match="No space left"), store.stage(make_key("a")):
        raise OSError(28, "No space left on device")
    assert entries(store) == []


def test_a_name_can_be_used_once(trainer, store, make_key, make_tensors, nudge, same):
    first = trainer.base("a", make_tensors())
    with pytest.raises(DuplicateCheckpoint, match="'a'"):
        trainer.base("a", nudge(make_tensors()))
    assert store.manifest(make_key("a")) == first


def test_of_two_writers_of_one_name_the_second_to_commit_is_refused(
    trainer, store, make_key, make_tensors
):
    def be_second():
        with store.stage(make_key("a")) as staged:
            manifest = trainer.base("a", make_tensors())
            copy_files_of(store, make_key("a"), manifest, staged.directory)
            staged.commit(manifest)

    with pytest.raises(DuplicateCheckpoint):
        be_second()
    assert entries(store) == ["a"]


def test_overwriting_replaces_the_predecessor(trainer, store, make_tensors, make_key, nudge):
    trainer.state("s", make_tensors())
    second = trainer.state("s", nudge(make_tensors()), overwrite=True)
    assert store.manifest(make_key("s", CheckpointFamily.STATE)) == second
    assert entries(store) == ["s"]


def test_a_manifest_of_another_checkpoint_is_refused(trainer, store, make_key, make_tensors):
    manifest = trainer.base("a", make_tensors())
    with pytest.raises(InvalidArgument, match="sampler/a"), store.stage(make_key("b")) as staged:
        staged.commit(manifest)
    assert not store.exists(make_key("b"))


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda file: file.unlink(), id="missing"),
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-1]), id="shorter"),
        pytest.param(lambda file: file.with_name("stray").write_bytes(b""), id="surplus"),
    ],
)
def test_files_that_differ_from_the_manifest_are_not_committed(
    trainer, store, make_key, make_tensors, spoil
):
    key = make_key("s", CheckpointFamily.STATE)
    manifest = trainer.state("s", make_tensors())

    def commit_spoiled():
        with store.stage(key, overwrite=True) as staged:
            copy_files_of(store, key, manifest, staged.directory)
            spoil(staged.directory / "weights.safetensors")
            staged.commit(manifest)

    with pytest.raises(StorageFailed, match="not written as its manifest says"):
        commit_spoiled()
    assert read_state(store.directory(key))[0] == manifest


def test_an_unknown_checkpoint_error_names_what_exists(trainer, store, make_key, make_tensors):
    trainer.base("step_00001-aa", make_tensors())
    with pytest.raises(UnknownSnapshot, match=r"'nope'.*job-1.*'step_00001-aa'"):
        store.manifest(make_key("nope"))
    with pytest.raises(UnknownSnapshot, match="none yet"):
        store.directory(make_key("nope", CheckpointFamily.STATE))
    assert not store.exists(make_key("nope"))


@pytest.mark.parametrize("name", ["../other", "a/b", ".tmp-x", "", "a..b"])
def test_a_name_that_is_a_path_is_refused(store, make_key, name):
    with pytest.raises(InvalidArgument, match="not a valid name"):
        store.exists(make_key(name))


def test_a_listing_is_oldest_first_and_filters(trainer, store, make_tensors):
    trainer.base("z", make_tensors())
    trainer.state("s", make_tensors())
    trainer.base("a", make_tensors())

    def names(**filters):
        return [m.identity for m in store.list("local", "job-1", **filters)]

    assert names() == ["z", "s", "a"]
    assert names(family=CheckpointFamily.SAMPLER) == ["z", "a"]
    assert names(slot="policy", family=CheckpointFamily.STATE) == ["s"]
    assert names(slot="other") == []
    assert store.list("local", "job-2") == []


def test_an_accounts_jobs_are_those_that_saved_something(trainer, store, make_tensors):
    assert store.jobs("local") == []
    trainer.base("a", make_tensors())
    assert store.jobs("local") == ["job-1"]
    assert store.jobs("other") == []


def test_an_expired_checkpoint_is_not_listed(trainer, store, clock, make_tensors):
    trainer.base("a", make_tensors(), expires_at=clock.now() + 100)
    assert [m.identity for m in store.list("local", "job-1")] == ["a"]
    clock.advance(100)
    assert store.list("local", "job-1") == []


def test_a_damaged_manifest_is_left_out_of_the_listing_with_a_warning(
    trainer, store, make_key, make_tensors, caplog
):
    trainer.base("a", make_tensors())
    trainer.base("b", make_tensors())
    path = store.directory(make_key("a")) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 0', b'"step": 9').replace(b"1", b"2"))
    with caplog.at_level(logging.WARNING):
        assert [m.identity for m in store.list("local", "job-1")] == ["b"]
    assert "checksum" in caplog.text


def test_a_deleted_checkpoint_is_gone_and_its_name_is_free(trainer, store, make_key, make_tensors):
    trainer.base("a", make_tensors())
    store.delete(make_key("a"))
    assert not store.exists(make_key("a"))
    assert entries(store) == []
    trainer.base("a", make_tensors())
    with pytest.raises(UnknownSnapshot):
        store.delete(make_key("b"))


def test_leftovers_of_a_dead_writer_are_removed_and_a_living_one_is_left_alone(
    trainer, store, make_key, make_tensors
):
    family = store.root / "local/job-1/policy/sampler"
    leftover = family / ".tmp-00000000"
    leftover.mkdir(parents=True)
    (leftover / "manifest.json").write_bytes(b"{}")
    assert store.list("local", "job-1") == []
    with store.stage(make_key("mine")) as staged:
        trainer.base("a", make_tensors())
        assert staged.directory.is_dir()
        assert not leftover.exists()
    assert entries(store) == ["a"]


@pytest.mark.parametrize(
    ("failpoints", "survivor"),
    [
        ("store.before_commit=kill", 1),
        ("durable.before_publish=kill", 1),
        ("durable.after_publish=kill", 2),
        ("store.after_commit=kill", 2),
        ("store.before_commit=enospc", 1),
        ("durable.before_publish=eio", 1),
    ],
)
def test_a_crash_while_replacing_leaves_the_old_or_the_new_one_whole(
    store, make_key, failpoints, survivor
):
    key = make_key("s", CheckpointFamily.STATE)
    assert save_in_process(store, 1) == 0
    assert save_in_process(store, 2, failpoints) != 0
    listed = store.list("local", "job-1")
    assert [m.step for m in listed] == [survivor]
    manifest, _ = read_state(store.directory(key))
    assert manifest.step == survivor
    assert save_in_process(store, 3) == 0
    assert store.manifest(key).step == 3
    assert entries(store) == ["s"]


def test_an_interrupted_replacement_can_be_deleted(store, make_key):
    key = make_key("s", CheckpointFamily.STATE)
    assert save_in_process(store, 1) == 0
    assert save_in_process(store, 2, "durable.before_publish=kill") != 0
    with pytest.raises(DuplicateCheckpoint), store.stage(key):
        pass
    store.delete(key)
    assert not store.exists(key)


def test_a_sibling_differs_in_name_only():
    key = CheckpointKey("local", "job-1", "policy", CheckpointFamily.SAMPLER, "a")
    assert str(key.sibling("b")) == "local/job-1/policy/sampler/b"
