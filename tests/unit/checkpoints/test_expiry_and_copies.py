"""What changes of a committed checkpoint, what ends, and what is one checkpoint under two keys."""

from __future__ import annotations

import os
import threading

import msgspec
import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey, materialize, read_state
from homefire.checkpoints.amendments import amend_manifest
from homefire.checkpoints.expiry import GRACE_S
from homefire.wire.errors import (
    DigestMismatch,
    DuplicateCheckpoint,
    FailedPrecondition,
    UnknownSnapshot,
)

SAMPLER, STATE, EXTERNAL = CheckpointFamily


def nothing_is_needed(manifest) -> bool:
    return False


def names(store, **filters) -> list[str]:
    return [m.identity for m in store.list("local", "job-1", **filters)]


def test_a_checkpoint_gets_an_end_and_loses_it_again(trainer, store, clock, make_key, make_tensors):
    key = make_key("a")
    written = trainer.base("a", make_tensors())
    end = clock.now() + 3600.0
    assert store.expire_at(key, end) == msgspec.structs.replace(written, expires_at=end)
    clock.advance(3600.0)
    assert names(store) == []
    with pytest.raises(UnknownSnapshot, match="has expired"):
        store.loadable(key)
    assert store.manifest(key).has_expired(clock.now())
    store.expire_at(key, None)
    assert names(store) == ["a"]
    assert store.loadable(key) == written


def test_publishing_changes_nothing_but_the_flag(trainer, store, make_key, make_tensors):
    written = trainer.base("a", make_tensors())
    assert not written.public
    assert store.publish(make_key("a"), public=True) == msgspec.structs.replace(
        written, public=True
    )
    assert store.publish(make_key("a"), public=False) == written
    assert store.manifest(make_key("a")) == written


def test_what_does_not_exist_cannot_be_changed(store, make_key):
    for change in (
        lambda: store.expire_at(make_key("a"), 1.0),
        lambda: store.publish(make_key("a"), public=True),
        lambda: store.loadable(make_key("a")),
    ):
        with pytest.raises(UnknownSnapshot, match="'a'"):
            change()


def test_amendments_at_the_same_time_are_all_kept(trainer, store, make_key, make_tensors):
    """Each reads what the one before wrote."""
    step = trainer.base("a", make_tensors()).step
    directory = store.directory(make_key("a"))

    def count() -> None:
        for _ in range(20):
            amend_manifest(directory, lambda m: msgspec.structs.replace(m, step=m.step + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.manifest(make_key("a")).step == step + 80
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        ["manifest.json", *store.manifest(make_key("a")).files]
    )


def test_an_amendment_never_reaches_what_replaced_the_checkpoint(
    trainer, store, make_key, make_tensors
):
    """The successor is committed between reading the old manifest and writing it back."""
    key = make_key("s", STATE)
    trainer.state("s", make_tensors(1))
    directory = store.directory(key)

    def overwrite_meanwhile(manifest):
        trainer.state("s", make_tensors(2), overwrite=True)
        return msgspec.structs.replace(manifest, public=True)

    with pytest.raises(FileNotFoundError):
        amend_manifest(directory, overwrite_meanwhile)
    manifest, _ = read_state(store.directory(key))
    assert not manifest.public
    assert manifest == store.manifest(key)


def test_what_expired_is_pruned_after_a_grace_and_nothing_else(
    trainer, store, clock, make_key, make_tensors
):
    trainer.base("stays", make_tensors())
    trainer.base("ends", make_tensors(), expires_at=clock.now() + 3600.0)
    clock.advance(3600.0 + GRACE_S - 10.0)
    assert store.prune(nothing_is_needed) == []
    clock.advance(10.0)
    assert store.prune(nothing_is_needed) == [make_key("ends")]
    assert store.exists(make_key("stays"))
    assert not store.exists(make_key("ends"))
    assert store.prune(nothing_is_needed) == []


def test_a_parent_stays_for_as_long_as_what_descends_from_it(
    trainer, store, clock, make_key, make_tensors, nudge
):
    end = clock.now() + 3600.0
    first, second = make_tensors(), nudge(make_tensors())
    trainer.base("base", first, expires_at=end)
    trainer.delta("middle", second, "base", expires_at=end)
    trainer.delta("leaf", nudge(second, seed=1), "middle")
    clock.advance(3600.0 + GRACE_S)
    assert store.prune(nothing_is_needed) == []
    assert materialize(store, "local", "job-1", "policy", "leaf").manifest.identity == "leaf"

    store.expire_at(make_key("leaf"), clock.now() - GRACE_S)
    assert store.prune(nothing_is_needed) == [make_key(n) for n in ("leaf", "middle", "base")]


def test_what_somebody_needs_stays_with_its_parents(
    trainer, store, clock, make_key, make_tensors, nudge
):
    end = clock.now() + 3600.0
    trainer.base("base", make_tensors(), expires_at=end)
    trainer.delta("served", nudge(make_tensors()), "base", expires_at=end)
    clock.advance(3600.0 + GRACE_S)
    assert store.prune(lambda manifest: manifest.identity == "served") == []
    assert store.exists(make_key("base"))


def test_a_state_named_like_a_parent_is_no_parent(
    trainer, store, clock, make_key, make_tensors, nudge
):
    trainer.base("one", make_tensors())
    trainer.delta("two", nudge(make_tensors()), "one")
    trainer.state("one", make_tensors())
    store.expire_at(make_key("one", STATE), clock.now() - GRACE_S)
    assert store.prune(nothing_is_needed) == [make_key("one", STATE)]
    assert store.exists(make_key("one"))


def test_a_copy_is_the_same_checkpoint_under_another_key(
    trainer, store, clock, make_key, make_tensors
):
    written = trainer.lora("a", make_tensors())
    store.publish(make_key("a"), public=True)
    clock.advance(5.0)
    to = CheckpointKey("local", "job-1", "other", SAMPLER, "b")
    copied = store.copy(make_key("a"), to, expires_at=clock.now() + 7200.0)
    assert store.manifest(to) == copied
    assert (copied.digest, copied.files, copied.public) == (written.digest, written.files, False)
    assert (copied.created_at, copied.expires_at) == (clock.now(), clock.now() + 7200.0)
    originals = {n: (store.directory(make_key("a")) / n).read_bytes() for n in written.files}
    store.delete(make_key("a"))
    assert {n: (store.directory(to) / n).read_bytes() for n in copied.files} == originals
    found = materialize(store, "local", "job-1", "other", "b")
    assert found.manifest == copied


def test_a_copy_takes_no_key_that_is_there(trainer, store, make_key, make_tensors):
    trainer.base("a", make_tensors())
    before = trainer.base("b", make_tensors(1))
    with pytest.raises(DuplicateCheckpoint, match="'b'"):
        store.copy(make_key("a"), make_key("b"), expires_at=None)
    assert store.manifest(make_key("b")) == before


def test_a_delta_is_not_copied_without_its_parent(trainer, store, make_key, make_tensors, nudge):
    trainer.base("a", make_tensors())
    trainer.delta("b", nudge(make_tensors()), "a")
    with pytest.raises(FailedPrecondition, match="delta of 'a'"):
        store.copy(make_key("b"), make_key("c"), expires_at=None)
    assert not store.exists(make_key("c"))


def test_a_copy_of_what_is_overwritten_meanwhile_is_refused(
    trainer, store, make_key, make_tensors, monkeypatch
):
    """Files of one checkpoint under the manifest of another must never be committed."""
    trainer.state("s", make_tensors(1))
    real = store.manifest
    calls = iter([True])

    def overwritten_after_the_first_look(key):
        found = real(key)
        if next(calls, False):
            trainer.state("s", make_tensors(2), overwrite=True)
        return found

    monkeypatch.setattr(store, "manifest", overwritten_after_the_first_look)
    with pytest.raises(FailedPrecondition, match="overwritten"):
        store.copy(make_key("s", STATE), make_key("t", STATE), expires_at=None)
    assert not store.exists(make_key("t", STATE))


def test_external_weights_have_names_of_their_own(trainer, store, make_key, make_tensors):
    trainer.lora("final", make_tensors())
    key = make_key("final", EXTERNAL)
    trainer.lora("final", make_tensors(), family=EXTERNAL)
    assert store.manifest(key).external
    assert names(store, family=EXTERNAL) == ["final"]
    assert names(store, family=SAMPLER) == ["final"]


# Summaries --------------------------------------------------------------------------------------


def summarized(store, slot="policy"):
    return store.summaries("local", "job-1", slot=slot)


def test_summaries_are_what_is_listed_without_the_tensors(trainer, store, make_tensors):
    trainer.base("a", make_tensors())
    trainer.state("a", make_tensors())
    trainer.lora("b", make_tensors(), family=EXTERNAL)
    listed = store.list("local", "job-1", slot="policy")
    assert len(listed) == 3
    assert summarized(store) == [msgspec.structs.replace(m, tensors={}) for m in listed]
    assert summarized(store, "other") == []


def test_summaries_follow_every_change(trainer, store, clock, make_key, make_tensors):
    trainer.base("a", make_tensors())
    trainer.state("s", make_tensors(1))
    first = summarized(store)
    assert [m.identity for m in first] == ["a", "s"]
    store.publish(make_key("a"), public=True)
    assert [m.public for m in summarized(store)] == [True, False]
    overwritten = trainer.state("s", make_tensors(2), overwrite=True)
    assert summarized(store)[-1].digest == overwritten.digest != first[-1].digest
    store.expire_at(make_key("s", STATE), clock.now() + 10.0)
    clock.advance(10.0)
    assert [m.identity for m in summarized(store)] == ["a"]
    store.delete(make_key("a"))
    trainer.base("b", make_tensors())
    assert [m.identity for m in summarized(store)] == ["b"]


def test_a_manifest_that_did_not_change_is_not_read_again(trainer, store, make_key, make_tensors):
    """Damage that leaves no trace in the file's time, size and place is seen when it is loaded."""
    trainer.base("a", make_tensors())
    before = summarized(store)
    path = store.directory(make_key("a")) / "manifest.json"
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[20] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert summarized(store) == before
    with pytest.raises(DigestMismatch):
        store.loadable(make_key("a"))
