"""The saver's thread beside a training one: whole copies, in order, within the memory that it may take."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints import DirectoryStore, digest_tensors, whole_digest
from homefire.checkpoints.verification import verify
from homefire.trainer.engine.saver import Saver
from homefire.trainer.engine.saves import PreparedSave
from homefire.wire.engine import (
    Failure,
    LoadRecovery,
    SamplerSaved,
    SaveBegun,
    SaveFinished,
    SaveRecovery,
    SaveReply,
    SaveSampler,
    SaveState,
    StateSaved,
)
from homefire.wire.manifest import CheckpointFamily, Manifest

PLENTY = 1 << 40


class Gate:
    """Writes wait until it is open."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def before(self, save: PreparedSave[SaveReply]) -> PreparedSave[SaveReply]:
        def keep() -> Callable[[], SaveReply]:
            write = save.keep()

            def later() -> SaveReply:
                assert self.opened.wait(30)
                return write()

            return later

        return replace(save, keep=keep)


@pytest.fixture
def make_saver() -> Iterator[Callable[..., tuple[Saver, list[SaveFinished]]]]:
    savers: list[Saver] = []

    def make(budget_bytes: int = PLENTY) -> tuple[Saver, list[SaveFinished]]:
        ended: list[SaveFinished] = []
        savers.append(Saver(ended.append, lambda: budget_bytes))
        return savers[-1], ended

    yield make
    for saver in savers:
        saver.finish()
        saver.close()


def sampler(name: str) -> SaveSampler:
    return SaveSampler(slot="policy", identity=name, checkpoint_type="delta")


def manifests(root: Path, family: CheckpointFamily) -> dict[str, Manifest]:
    store = DirectoryStore(root / "store")
    found = store.list("local", "job-1", family=family)
    assert [v.error for v in verify(store, found)] == [None] * len(found)
    return {manifest.identity: manifest for manifest in found}


def test_saves_while_stepping_are_of_one_step(make_trainer, make_saver, tmp_path) -> None:
    """Snapshots and states by turns, up to four in flight, while the other thread trains."""
    trainer = make_trainer().open().train(0)
    saver, _ = make_saver()
    expected: dict[str, str] = {}
    for number in range(60):
        expected[f"w{number}"] = trainer.digest()
        saver.begin(trainer.engine.prepare_save(sampler(f"w{number}")))
        if number % 4 == 0:
            save = trainer.engine.prepare_save(SaveState(slot="policy", name=f"s{number}"))
            expected[f"s{number}"] = state_digest(save)
            saver.begin(save)
        trainer.train(number)
        if number % 8 == 7:
            saver.finish()
    saver.finish()
    found = manifests(tmp_path, CheckpointFamily.SAMPLER)
    found |= manifests(tmp_path, CheckpointFamily.STATE)
    assert {name: manifest.digest for name, manifest in found.items()} == expected
    assert found["w59"].parent == "w58"


def state_digest(save: PreparedSave[Any]) -> str:
    """Of the live tensors that a state save has views of, when it is taken."""
    masters, optimizer = save.write.args
    files = {"weights.safetensors": masters, "optimizer.safetensors": optimizer}
    flat = {f"{file}:{name}": t for file, tensors in files.items() for name, t in tensors.items()}
    return whole_digest(digest_tensors(flat))


@pytest.mark.parametrize("torn", [False, True])
def test_a_copy_that_is_none_is_noticed(make_trainer, make_saver, tmp_path, torn: bool) -> None:
    """The planted mistake: a save that keeps views of live weights and is written after a step."""
    trainer = make_trainer().open().train(0)
    saver, _ = make_saver()
    save = trainer.engine.prepare_save(SaveState(slot="policy", name="s"))
    expected = state_digest(save)
    if torn:
        save = replace(save, keep=lambda written=save.write: written)
    gate = Gate()
    saver.begin(gate.before(save))
    for live in save.write.args[0].values():
        live.data[:] ^= 1  # as a step in place does
    gate.opened.set()
    saver.finish()
    assert (manifests(tmp_path, CheckpointFamily.STATE)["s"].digest == expected) is not torn


def test_saves_are_written_and_reported_in_the_order_in_which_they_began(
    make_trainer, make_saver
) -> None:
    trainer = make_trainer().open()
    saver, ended = make_saver()
    gate = Gate()
    begun = []
    for name in "abc":
        begun.append(saver.begin(gate.before(trainer.engine.prepare_save(sampler(name)))))
        trainer.train(ord(name))
    assert not ended
    gate.opened.set()
    saver.finish()
    assert [SaveBegun(e.ticket) for e in ended] == begun
    replies = [e.reply for e in ended]
    assert all(isinstance(reply, SamplerSaved) for reply in replies)
    assert [(r.kind, r.parent) for r in replies] == [("base", None), ("delta", "a"), ("delta", "b")]


def test_what_would_not_fit_into_memory_is_written_at_once_behind_the_others(
    make_trainer, make_saver
) -> None:
    trainer = make_trainer().open().train(0)
    first = trainer.engine.prepare_save(sampler("a"))
    saver, ended = make_saver(first.size_bytes)
    gate = Gate()
    assert isinstance(saver.begin(gate.before(first)), SaveBegun)
    opening = threading.Timer(0, gate.opened.set)
    opening.start()
    reply = saver.begin(trainer.engine.prepare_save(sampler("b")))
    opening.join()
    assert isinstance(reply, SamplerSaved)
    assert reply.parent == "a"
    assert [e.reply.identity for e in ended] == ["a"]


def test_a_save_over_the_budget_takes_no_copy(make_trainer, make_saver) -> None:
    def refuse() -> Any:
        raise AssertionError("copied")

    trainer = make_trainer().open().train(0)
    saver, ended = make_saver(0)
    save = trainer.engine.prepare_save(SaveState(slot="policy", name="s"))
    assert isinstance(saver.begin(replace(save, keep=refuse)), StateSaved)
    assert ended == []


def test_the_room_of_a_written_save_is_free_again(make_trainer, make_saver) -> None:
    trainer = make_trainer().open().train(0)
    save = trainer.engine.prepare_save(sampler("a"))
    saver, _ = make_saver(save.size_bytes)
    for name in "abc":
        assert isinstance(saver.begin(trainer.engine.prepare_save(sampler(name))), SaveBegun)
        saver.finish()


def test_a_save_that_breaks_is_a_failure_and_the_next_is_written(make_trainer, make_saver) -> None:
    def broken() -> SaveReply:
        raise ZeroDivisionError("planted")

    trainer = make_trainer().open()
    saver, ended = make_saver()
    save = trainer.engine.prepare_save(sampler("a"))
    saver.begin(replace(save, keep=lambda: broken))
    saver.begin(trainer.engine.prepare_save(sampler("b")))
    saver.finish()
    assert isinstance(ended[0].reply, Failure)
    assert "ZeroDivisionError: planted" in ended[0].reply.error.message
    assert isinstance(ended[1].reply, SamplerSaved)


def test_a_recovery_point_knows_the_parent_that_a_save_before_it_makes(
    make_trainer, make_saver, tmp_path
) -> None:
    trainer = make_trainer().open().train(0)
    saver, _ = make_saver()
    gate = Gate()
    saver.begin(gate.before(trainer.engine.prepare_save(sampler("a"))))
    saver.begin(trainer.engine.prepare_save(SaveRecovery(str(tmp_path / "point"))))
    digest = trainer.digest()
    trainer.train(1)
    gate.opened.set()
    saver.finish()
    again = make_trainer()
    again.engine.load_recovery(LoadRecovery(str(tmp_path / "point")))
    assert again.digest() == digest
    assert again.train(2).save("b").parent == "a"
