"""The store on S3, against a server on loopback that keeps to the rules, and one that fails and lies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    SnapshotInfo,
    file_entry,
    materialize,
    raw_tensor,
    read_state,
    write_base,
)
from homefire.checkpoints.bucket import BucketConfig, parse_url
from homefire.checkpoints.open_store import open_store
from homefire.checkpoints.s3_server import Asked, Reply, S3Server, fail_once
from homefire.checkpoints.verification import verify
from homefire.foundation.clock import ManualClock
from homefire.wire.errors import (
    DigestMismatch,
    DuplicateCheckpoint,
    HomefireError,
    InvalidArgument,
    StorageFailed,
    UnknownSnapshot,
)

URL = "s3://bucket/some/prefix"
SMALL = BucketConfig(
    piece_bytes=64, max_retries=3, first_backoff_s=0.001, max_backoff_s=0.002, request_timeout_s=20
)


@pytest.fixture
def server(monkeypatch):
    with S3Server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def machine(server, tmp_path, clock) -> Callable:
    """The store as another machine has it: nothing in common but the URL."""

    def make(name: str, config: BucketConfig = SMALL):
        return open_store(URL, clock, cache=tmp_path / f"cache-{name}", config=config)

    return make


@pytest.fixture
def store(machine):
    """What the shared `trainer` fixture publishes into."""
    return machine("trainer")


def test_a_chain_is_served_by_a_machine_that_knows_the_url_only(
    trainer, machine, make_tensors, nudge, same
):
    one = make_tensors()
    two = nudge(one)
    trainer.base("a", one)
    trainer.delta("b", two, "a")
    replica = machine("replica")
    found = materialize(replica, "local", "job-1", "policy", "b")
    assert found.chain == ["a", "b"]
    assert same(found.tensors, two)
    directory = replica.directory(CheckpointKey.of(replica.manifest(found_key("a"))))
    assert {"config.json", "model.safetensors"} <= {path.name for path in directory.iterdir()}


def found_key(name: str, family: CheckpointFamily = CheckpointFamily.SAMPLER) -> CheckpointKey:
    return CheckpointKey("local", "job-1", "policy", family, name)


def test_every_kind_is_listed_verified_amended_copied_and_deleted(
    store, trainer, machine, make_tensors, clock
):
    tensors = make_tensors()
    trainer.base("a", tensors)
    trainer.lora("b", tensors)
    trainer.state("s", tensors)
    other = machine("other")
    assert [m.identity for m in other.list("local", "job-1")] == ["a", "b", "s"]
    assert other.jobs("local") == ["job-1"]
    assert [v.error for v in verify(other, other.list("local", "job-1"))] == [None] * 3
    manifest, files = read_state(other.directory(found_key("s", CheckpointFamily.STATE)))
    assert (manifest.identity, set(files)) == (
        "s",
        {"weights.safetensors", "optimizer.safetensors"},
    )
    assert other.pin(found_key("a"), pinned=True).pinned
    assert store.manifest(found_key("a")).pinned
    copied = store.copy(found_key("a"), found_key("c"), expires_at=clock.now() + 5)
    assert (copied.digest, copied.pinned) == (store.manifest(found_key("a")).digest, False)
    assert materialize(other, "local", "job-1", "policy", "c").manifest == copied
    clock.advance(10_000.0)
    with pytest.raises(UnknownSnapshot, match="expired"):
        other.loadable(found_key("c"))
    assert [key.name for key in other.prune(lambda m: False)] == ["c"]
    other.delete(found_key("b"))
    assert [m.identity for m in store.list("local", "job-1")] == ["a", "s"]
    with pytest.raises(UnknownSnapshot, match="'b'"):
        store.directory(found_key("b"))


def test_nothing_is_left_of_a_deleted_checkpoint(server, store, trainer, make_tensors):
    trainer.base("a", make_tensors())
    assert len(server.objects) > 2
    store.delete(found_key("a"))
    assert server.objects == {}


def test_a_name_is_taken_once(store, trainer, machine, make_tensors):
    trainer.base("a", make_tensors())
    with pytest.raises(DuplicateCheckpoint, match="'a'"):
        trainer.base("a", make_tensors(1))
    first = store.manifest(found_key("a"))
    assert materialize(machine("x"), "local", "job-1", "policy", "a").manifest == first


def test_of_two_that_commit_at_once_one_wins(server, store, trainer, machine, make_tensors):
    """The other came into being while this one was being written."""
    trainer.store = machine("other")
    with store.stage(found_key("a")) as staged:
        (staged.directory / "f.bin").write_bytes(b"one")
        won = trainer.base("a", make_tensors())
        late = replace(won, files={"f.bin": file_entry(staged.directory / "f.bin")})
        with pytest.raises(DuplicateCheckpoint):
            staged.commit(late)
    assert store.manifest(found_key("a")) == won


def test_an_overwritten_state_is_the_new_one_or_the_old_one(server, store, trainer, machine, same,
                                                           make_tensors):  # fmt: skip
    old, new = make_tensors(), make_tensors(1)
    trainer.state("s", old)
    reader = machine("reader")
    assert same(read_state(reader.directory(found_key("s", CheckpointFamily.STATE)))[1]
                ["weights.safetensors"], old)  # fmt: skip
    server.faults.append(fail_once("PUT", status=500, times=100, key="manifest.json"))
    with pytest.raises(StorageFailed):
        trainer.state("s", new, overwrite=True)
    state = found_key("s", CheckpointFamily.STATE)
    assert same(read_state(machine("second").directory(state))[1]["weights.safetensors"], old)
    server.faults.clear()
    trainer.state("s", new, overwrite=True)
    assert same(read_state(reader.directory(state))[1]["weights.safetensors"], new)


def test_a_commit_whose_reply_was_lost_is_a_commit(server, trainer, machine, make_tensors):
    lost = 0

    def lose(asked: Asked, honest: Callable[[], Reply]) -> Reply | None:
        nonlocal lost
        if asked.method == "PUT" and asked.key.endswith("manifest.json") and not lost:
            lost += 1
            honest()
            return Reply(503)
        return None

    server.faults.append(lose)
    manifest = trainer.base("a", make_tensors())
    assert lost == 1
    assert machine("x").manifest(found_key("a")) == manifest


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "HEAD"])
def test_a_server_that_is_busy_now_and_then_is_asked_again(
    server, trainer, machine, make_tensors, method
):
    server.faults.append(fail_once(method, status=503, times=2))
    trainer.base("a", make_tensors())
    server.faults[:] = [fail_once(method, status=500, times=2)]
    assert materialize(machine("x"), "local", "job-1", "policy", "a").chain == ["a"]


@pytest.mark.parametrize("key", ["model.safetensors", "manifest.json"])
def test_a_save_that_the_storage_refuses_leaves_nothing_that_is_listed(
    server, store, trainer, make_tensors, key
):
    trainer.base("before", make_tensors())
    server.faults.append(fail_once("PUT", status=500, times=10**6, key=key))
    with pytest.raises(StorageFailed, match="credentials"):
        trainer.base("a", make_tensors(1))
    server.faults.clear()
    assert [m.identity for m in store.list("local", "job-1")] == ["before"]
    assert not store.exists(found_key("a"))
    trainer.base("a", make_tensors(1))


def lying(how: Callable[[bytes], bytes], *, times: int, key: str = "") -> Callable:
    left = times
    lock = threading.Lock()

    def fault(asked: Asked, honest: Callable[[], Reply]) -> Reply | None:
        nonlocal left
        if asked.method != "GET" or not asked.key.endswith(key) or "list-type" in asked.query:
            return None
        with lock:
            left -= 1
            if left < 0:
                return None
        reply = honest()
        reply.body = how(reply.body)
        return reply

    return fault


def flip(body: bytes) -> bytes:
    return bytes([body[0] ^ 1]) + body[1:] if body else body


@pytest.mark.parametrize("key", ["model.safetensors", "config.json", "manifest.json"])
def test_bytes_that_were_wrong_once_are_asked_for_again(
    server, trainer, machine, make_tensors, same, key
):
    trainer.base("a", make_tensors())
    server.faults.append(lying(flip, times=1, key=key))
    found = materialize(machine("x"), "local", "job-1", "policy", "a")
    assert same(found.tensors, make_tensors())


@pytest.mark.parametrize("key", ["model.safetensors", "config.json", "manifest.json"])
def test_a_server_that_always_lies_is_found_out(server, trainer, machine, make_tensors, key):
    trainer.base("a", make_tensors())
    server.faults.append(lying(flip, times=10**6, key=key))
    with pytest.raises(DigestMismatch, match=key.partition(".")[0]):
        materialize(machine("x"), "local", "job-1", "policy", "a")


def test_an_answer_that_is_cut_short_is_not_taken(server, trainer, machine, make_tensors, same):
    trainer.base("a", make_tensors())
    cuts = 0

    def cut(asked: Asked, honest: Callable[[], Reply]) -> Reply | None:
        nonlocal cuts
        if asked.method == "GET" and "range" in asked.headers and cuts < 3:
            cuts += 1
            reply = honest()
            reply.cut = 5
            return reply
        return None

    server.faults.append(cut)
    assert same(materialize(machine("x"), "local", "job-1", "policy", "a").tensors, make_tensors())
    assert cuts == 3


def test_a_download_that_broke_goes_on_where_it_was(
    server, trainer, machine, tmp_path, make_tensors
):
    trainer.base("a", make_tensors())
    first = machine("x")
    pieces = [n for n in server.objects if n.endswith("model.safetensors")]
    size = len(server.objects[pieces[0]].data)
    assert size > 6 * SMALL.piece_bytes
    served = 0

    def break_later(asked: Asked, honest: Callable[[], Reply]) -> Reply | None:
        nonlocal served
        if asked.method == "GET" and asked.key.endswith("model.safetensors"):
            served += 1
            return None if served <= 4 else Reply(404)
        return None

    server.faults.append(break_later)
    with pytest.raises(HomefireError):
        first.directory(found_key("a"))
    server.faults.clear()
    server.asked.clear()
    (partial,) = (tmp_path / "cache-x").glob("*/*/partial-*")
    dead = partial.with_name(f"{partial.name.rpartition('-')[0]}-{2**22 + 1}")
    partial.rename(dead)
    directory = machine("x").directory(found_key("a"))
    ranges = [a for a in server.asked if a.key.endswith("model.safetensors")]
    assert 0 < len(ranges) <= -(-size // SMALL.piece_bytes) - 4
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == (
        machine("y").manifest(found_key("a")).files["model.safetensors"].sha256
    )


def test_large_files_go_up_in_parts_and_come_down_in_ranges(
    server, machine, tmp_path, model_files, clock
):
    store = machine("big", BucketConfig(piece_bytes=5 << 20))
    weights = np.random.default_rng(0).integers(0, 255, 12 << 20, np.uint8)
    info = SnapshotInfo(step=1, base_model="tiny", created_at=1.0)
    write_base(store, found_key("a"), {"w": raw_tensor(weights)}, info, model_files=model_files)
    parts = [a for a in server.asked if "partNumber" in a.query]
    assert len(parts) == 3
    assert server.uploads == {}
    server.asked.clear()
    reader = machine("reader", BucketConfig(piece_bytes=5 << 20))
    assert materialize(reader, "local", "job-1", "policy", "a").chain == ["a"]
    assert sum("range" in a.headers for a in server.asked) >= 3
    server.asked.clear()
    assert materialize(store, "local", "job-1", "policy", "a").chain == ["a"]
    assert not any("range" in a.headers for a in server.asked), "what was written here is here"


def test_what_a_save_left_that_never_committed_is_swept_after_a_day(
    server, store, trainer, machine, make_tensors
):
    trainer.state("s", make_tensors())
    trainer.state("s", make_tensors(1), overwrite=True)
    server.faults.append(fail_once("PUT", status=500, times=100, key="manifest.json"))
    with pytest.raises(StorageFailed):
        trainer.base("dead", make_tensors())
    server.faults.clear()
    before = set(server.objects)
    machine("x").prune(lambda m: False)
    assert set(server.objects) == before
    for stored in server.objects.values():
        stored.modified -= 2 * 86400
    machine("x").prune(lambda m: False)
    left = {name.rpartition("/")[2] for name in server.objects}
    assert len(server.objects) == 4, "the state's two files, its optimizer.json and its manifest"
    assert "manifest.json" in left
    assert not any("/dead/" in name for name in server.objects)


def test_the_storage_that_is_not_there_is_named(server, machine, monkeypatch, tmp_path):
    with S3Server() as gone:
        url = gone.url
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(StorageFailed, match="s3://bucket/some/prefix"):
        machine("x").jobs("local")


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://b/../c", "s3://b//c", "gs://b/x"])
def test_a_url_that_is_none_is_refused(url, tmp_path):
    with pytest.raises(InvalidArgument, match="s3://bucket/prefix"):
        open_store(url, cache=tmp_path)
    assert parse_url("s3://bucket/a/b/") == ("bucket", "a/b")


def test_two_prefixes_share_no_cache_and_no_names(server, tmp_path, clock, trainer, make_tensors):
    trainer.base("a", make_tensors())
    other = open_store("s3://bucket/other", clock, cache=tmp_path / "cache-trainer", config=SMALL)
    assert not other.exists(found_key("a"))
    assert other.jobs("local") == []


@example([(19, "lost")])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["503", "flip", "cut", "lost"])),
                max_size=6))  # fmt: skip
def test_whatever_the_server_does_a_checkpoint_is_right_or_an_error(
    server, tmp_path, model_files, make_tensors, same, plan
):
    """Requests are counted; at those of the plan the server fails or lies. Nothing wrong is served."""
    number = 0
    lock = threading.Lock()
    faults = dict(plan)

    def fault(asked: Asked, honest: Callable[[], Reply]) -> Reply | None:
        nonlocal number
        with lock:
            mine, number = faults.get(number), number + 1
        if mine == "503":
            return Reply(503)
        if mine == "lost":
            honest()
            return Reply(500)
        reply = honest()
        if mine == "flip" and asked.method == "GET" and "list-type" not in asked.query:
            reply.body = flip(reply.body)
        if mine == "cut" and reply.body:
            reply.cut = len(reply.body) // 2
        return reply

    server.objects.clear()
    server.faults[:] = [fault]
    run = os.urandom(4).hex()
    writer = open_store(URL, ManualClock(), cache=tmp_path / f"w{run}", config=SMALL)
    reader = open_store(URL, ManualClock(), cache=tmp_path / f"r{run}", config=SMALL)
    tensors = make_tensors()
    info = SnapshotInfo(step=1, base_model="tiny", created_at=1.0)
    with contextlib.suppress(HomefireError):
        write_base(writer, found_key("a"), tensors, info, model_files=model_files)
    try:
        found = materialize(reader, "local", "job-1", "policy", "a").tensors
    except HomefireError:
        pass
    else:
        assert same(found, tensors)
    server.faults.clear()
    for manifest in reader.list("local", "job-1"):
        assert same(
            materialize(reader, "local", "job-1", "policy", manifest.identity).tensors, tensors
        )


def test_a_save_that_is_given_up_leaves_nothing(server, store, tmp_path):
    def give_up() -> None:
        with store.stage(found_key("a")) as staged:
            (staged.directory / "half.bin").write_bytes(b"half")
            raise OSError("no space")

    with pytest.raises(StorageFailed, match="no space"):
        give_up()
    assert server.objects == {}
    assert list((tmp_path / "cache-trainer").glob("*/*/*")) == []


def test_files_of_another_boot_are_not_trusted(server, trainer, tmp_path, clock, make_tensors):
    trainer.base("a", make_tensors())
    cache = tmp_path / "cache-trainer"
    (boot,) = cache.glob("boot-*")
    old: Path = boot.rename(cache / "boot-earlier")
    keep = cache / "not-ours"
    keep.mkdir()
    open_store(URL, clock, cache=cache, config=SMALL)
    assert not old.exists()
    assert keep.is_dir()
