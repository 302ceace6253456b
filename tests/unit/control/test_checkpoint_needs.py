"""What rests on a checkpoint, and what the trainers' events say about it."""

from __future__ import annotations

from typing import Any

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey
from homefire.control.checkpoint_deletion import LIVE_S
from homefire.control.checkpoint_needs import descendant_refusal
from homefire.control.job_activity import Activities
from homefire.foundation.events import EventLog

from .root_plane import RUN as RUN_OF_ROOT
from .root_plane import SESSION

RUN = "ts-3f9a1c2e4b50536f:train:0"


class Trainer:
    """Writes the events of job j1."""

    def __init__(self, bench: Any) -> None:
        self.clock = bench.clock
        self.path = bench.home.job("j1") / "events.jsonl"
        self.events = EventLog(self.path, bench.clock)

    def say(self, event: str, **fields: Any) -> None:
        self.clock.advance(1.0)
        self.events.append(event, **fields)


@pytest.fixture
def trainer(bench):
    made = Trainer(bench)
    yield made
    made.events.close()


def test_a_load_counts_until_a_recovery_point_lies_behind_it(bench, trainer):
    activities = Activities(bench.home)
    paths = []
    trainer.say("state_loaded", model_id="m", name="one")
    for name in ("two", "three"):
        trainer.say("model_created", model_id="m", name=name)
        paths.append([load.path for load in activities.of("j1").loads])
        trainer.say("recovery_point")
    assert paths == [["one", "two"], ["three"]]
    assert activities.of("j1").loads == []


def test_each_models_last_operation_is_known(bench, trainer):
    activities = Activities(bench.home)
    trainer.say("optim_step", model_id="a")
    first = bench.clock.now()
    assert activities.of("j1").last_at == {"a": first}
    trainer.say("forward", model_id="b")
    trainer.say("optim_step", model_id="a")
    assert activities.of("j1").last_at == {"a": first + 2.0, "b": first + 1.0}
    assert activities.of("other").last_at == {}


def test_a_line_that_is_being_written_is_read_when_it_is_whole(bench, trainer):
    activities = Activities(bench.home)
    line = b'{"at":7.0,"event":"optim_step","model_id":"a"}\n'
    with trainer.path.open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert activities.of("j1").last_at == {}
        file.write(line[20:])
    assert activities.of("j1").last_at == {"a": 7.0}


def test_a_torn_line_costs_itself_only(bench, trainer):
    with trainer.path.open("ab") as file:
        file.write(b'{"at":7.0,"ev\n{"at":8.0,"event":"optim_step","model_id":"a"}\n')
    assert Activities(bench.home).of("j1").last_at == {"a": 8.0}


@pytest.mark.parametrize(
    ("slot", "path", "is_needed"),
    [
        ("policy", "mark", True),
        ("policy", "other", False),
        ("policy", "cross_job://j1/mark", True),
        ("policy", "cross_job://j2/mark", False),
        ("policy", "tinker://j1-s12ab:train:0/weights/mark", True),
        ("policy", "tinker://j2-s12ab:train:0/weights/mark", False),
        (RUN, f"tinker://{RUN}/weights/mark", True),
        (RUN, f"tinker://{RUN[:-1]}1/weights/mark", False),
        (RUN, f"tinker://{RUN}/weights/other", False),
    ],
)
async def test_a_state_stays_while_a_recovery_would_load_it(
    bench, control, trainer, slot, path, is_needed
):
    await control.create_job()
    state = bench.save_state("mark", slot=slot)
    trainer.say("state_loaded", model_id="m", name=path)
    needs = await control.plane.deletion.needs()
    assert needs.is_needed(state) is is_needed


async def test_a_job_that_ended_behind_a_recovery_point_needs_nothing(bench, control, trainer):
    await control.create_job()
    state = bench.save_state("mark")
    trainer.say("state_loaded", model_id="m", name="mark")
    await control.call("DELETE", "/v1/accounts/local/rlorTrainerJobs/j1")
    await control.job_becomes("JOB_STATE_DELETED")
    assert not (await control.plane.deletion.needs()).is_needed(state)


async def test_what_a_deployment_serves_is_needed_under_its_slot_only(bench, control):
    await control.create_job()
    await control.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    served, other = bench.save_snapshot("a"), bench.save_snapshot("a", slot=RUN)
    headers = {"fireworks-deployment": "accounts/local/deployments/d1"}
    await control.call("POST", "/hot_load/v1/models/hot_load", {"identity": "a"}, headers=headers)
    needs = await control.plane.deletion.needs()
    assert (needs.is_needed(served), needs.is_needed(other)) == (True, False)


def test_a_parent_is_one_in_its_own_slot_only(bench):
    base = bench.save_snapshot("a")
    delta = bench.save_snapshot("b", parent=base)
    elsewhere = bench.save_snapshot("a", slot=RUN)
    refusal = descendant_refusal(base, [base, delta, elsewhere])
    assert refusal is not None
    assert "parent of 'b'" in refusal.message
    assert descendant_refusal(elsewhere, [base, delta, elsewhere]) is None


async def test_pruning_takes_what_expired_and_nobody_needs(bench, control, trainer):
    await control.create_job()
    for name in ("idle", "loaded", "kept"):
        manifest = bench.save_state(name)
        if name != "kept":
            key = CheckpointKey.of(manifest)
            bench.store.expire_at(key, bench.clock.now() + 3600.0)
    trainer.say("state_loaded", model_id="m", name="loaded")
    bench.clock.advance(2 * 3600.0)
    assert [key.name for key in await control.plane.deletion.prune()] == ["idle"]
    trainer.say("recovery_point")
    assert [key.name for key in await control.plane.deletion.prune()] == ["loaded"]
    assert [m.identity for m in bench.store.list("local", "j1")] == ["kept"]


@pytest.mark.parametrize("ending", ["finished", "silent"])
async def test_what_a_live_session_samples_is_pruned_when_the_session_is_over(root, ending):
    """By path, or as an ephemeral snapshot of one of its runs; the owner may delete it before."""
    other = "ts-00000000000000bb"
    end = root.clock.now() + 3600.0
    await root.session(other)
    for name in ("named", "ephemeral-000003-0123abcd", "idle"):
        root.save(name, CheckpointFamily.SAMPLER, expires_at=end)
    await root.sampling_session(
        "s.1", session=other, model_path=f"tinker://{RUN_OF_ROOT}/sampler_weights/named"
    )
    root.clock.advance(7200.0)
    await root.heartbeat(SESSION)
    await root.heartbeat(other)

    async def pruned() -> set[str]:
        return {key.name for key in await root.control.plane.deletion.prune()}

    assert await pruned() == {"idle"}
    if ending == "finished":
        await root.finish(SESSION, "success")
        await root.finish(other, "success")
    else:
        root.clock.advance(LIVE_S)
    assert await pruned() == {"named", "ephemeral-000003-0123abcd"}
