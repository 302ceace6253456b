"""Supervision as a whole: rows, an in-memory machine, and services that live and die by script."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec
import pytest

from homefire.control.reconcile import Reconciler
from homefire.control.routes import internal
from homefire.control.supervision import CRASH_LIMIT
from homefire.foundation.home import Home
from homefire.launch import ProcessRecord
from homefire.wire.errors import EngineFailed, ErrorRecord, HomeBusy, StorageFailed
from homefire.wire.internal import RouteTable, TrainerState
from homefire.wire.resources import TrainerJobRequest, TrainingConfig
from homefire.wire.specs import ReplicaSpec, TrainerMode, TrainerSpec


async def test_a_job_runs_when_its_trainer_says_so_and_not_before(bench: Any, control: Any) -> None:
    bench.services.trainers_start_as = TrainerState.STARTING
    await control.create_job()

    async def is_routed() -> bool:
        route = control.plane.routes.get().trainers["local/j1"]
        return route.upstream is not None

    await control.eventually(is_routed)
    assert await control.job() == "JOB_STATE_CREATING"
    bench.trainer().say(state=TrainerState.READY)
    await control.job_becomes("JOB_STATE_RUNNING")


async def test_a_trainer_is_started_with_all_that_its_row_says(bench: Any, control: Any) -> None:
    await control.create_job(trainingConfig={"loraRank": 8, "maxContextLength": 512})
    await control.job_becomes("JOB_STATE_RUNNING")
    process = bench.launcher.process("trainer j1")
    spec = msgspec.json.decode(process.spec.spec, type=TrainerSpec)
    assert (spec.mode, spec.lora_rank, spec.max_context_length) == (TrainerMode.LORA, 8, 512)
    assert spec.job_dir == str(bench.home.job("j1"))
    assert spec.store_root == str(bench.home.store)
    assert spec.model_dir == spec.tokenizer_id == str(bench.home.models / "tiny")
    assert spec.listen == process.record.listen
    assert process.spec.module == "homefire.trainer.front"


async def test_a_replica_is_started_with_all_that_its_row_says(bench: Any, control: Any) -> None:
    await control.create_deployment(baseModel="accounts/local/models/tiny")
    await control.deployment_becomes("READY")
    process = bench.launcher.process("replica d1/0")
    spec = msgspec.json.decode(process.spec.spec, type=ReplicaSpec)
    assert (spec.base_model, spec.deployment) == ("accounts/local/models/tiny", "d1")
    assert spec.replica_dir == str(bench.home.replica("d1", 0))
    assert process.spec.module == "homefire.inference.replica"


async def test_a_dead_trainer_is_started_again_and_its_job_never_leaves_running(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    first = bench.trainer()
    first.process.exit(-9)

    async def is_replaced() -> bool:
        assert await control.job() == "JOB_STATE_RUNNING"
        route = control.plane.routes.get().trainers["local/j1"]
        replaced = bench.trainer() is not first
        return replaced and route.upstream == bench.trainer().process.spec.listen

    await control.eventually(is_replaced)
    assert len(bench.launcher.running("trainer j1")) == 1


async def test_a_trainer_that_dies_at_every_start_fails_its_job_with_reason_and_log(
    bench: Any, control: Any
) -> None:
    bench.services.die_at_once = ["loading", "RuntimeError: boom"]
    await control.create_job()

    async def has_failed() -> bool:
        bench.clock.advance(10.0)
        control.plane.reconciler.wake()
        return await control.job() == "JOB_STATE_FAILED"

    await control.eventually(has_failed)
    row = await control.plane.jobs.get("local", "j1")
    assert len(bench.launcher.started) == CRASH_LIMIT
    assert "exited with 1" in row.message
    assert "RuntimeError: boom" in row.message
    bench.services.die_at_once = None
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:resume")
    await control.job_becomes("JOB_STATE_RUNNING")


async def test_back_off_waits_for_the_clock(bench: Any, control: Any) -> None:
    bench.services.die_at_once = []
    await control.create_job()

    async def died_twice() -> bool:
        return (await control.plane.jobs.get("local", "j1")).supervision.restarts == 2

    await control.eventually(died_twice)
    await control.plane.reconciler.reconcile()
    assert len(bench.launcher.started) == 2


async def test_a_trainer_that_cannot_run_fails_its_job_and_is_stopped(
    bench: Any, control: Any
) -> None:
    bench.services.trainers_start_as = TrainerState.STARTING
    await control.create_job()

    async def is_watched() -> bool:
        return bool(bench.services.all)

    await control.eventually(is_watched)
    error = ErrorRecord.of(EngineFailed("the weights are damaged"))
    bench.trainer().say(state=TrainerState.FAILED, error=error)
    await control.job_becomes("JOB_STATE_FAILED")
    job = await control.call("GET", "/v1/accounts/local/rlorTrainerJobs/j1")
    assert job["status"]["message"].startswith("the weights are damaged")
    assert job["completedTime"]

    async def is_stopped() -> bool:
        return not bench.launcher.running()

    await control.eventually(is_stopped)


async def test_a_start_that_the_disk_refuses_is_tried_again(bench: Any, control: Any) -> None:
    bench.launcher.refusals = [StorageFailed("no space left")]
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")


async def test_cancelling_stops_the_trainer_politely_and_resuming_starts_it_on_the_same_folder(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    answer = await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:cancel")
    assert answer["state"] in ("JOB_STATE_CANCELLING", "JOB_STATE_CANCELLED")
    await control.job_becomes("JOB_STATE_CANCELLED")
    first = bench.trainer()
    assert first.process.signals == ["SIGTERM"]
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:resume")
    await control.job_becomes("JOB_STATE_RUNNING")
    second = bench.trainer()
    assert second is not first
    specs = [msgspec.json.decode(s.process.spec.spec, type=TrainerSpec) for s in (first, second)]
    assert specs[0].job_dir == specs[1].job_dir
    assert specs[0].nonce != specs[1].nonce


@pytest.mark.parametrize("state", ["JOB_STATE_FAILED", "JOB_STATE_PAUSED", "JOB_STATE_COMPLETED"])
async def test_a_job_that_stopped_for_any_reason_is_resumed_on_demand(
    bench: Any, control: Any, state: str
) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.plane.database.transact(
        lambda c: c.execute("UPDATE jobs SET state = ?", (state,)) and None
    )
    control.plane.reconciler.wake()

    async def is_stopped() -> bool:
        return not bench.launcher.running()

    await control.eventually(is_stopped)
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:resume")
    await control.job_becomes("JOB_STATE_RUNNING")


async def test_resuming_a_running_job_leaves_it_alone(bench: Any, control: Any) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:resume")
    await control.plane.reconciler.reconcile()
    assert len(bench.launcher.started) == 1


async def test_a_second_job_is_pending_until_the_first_has_gone(bench: Any) -> None:
    control = await bench.control()
    await control.create_job("first")
    await control.job_becomes("JOB_STATE_RUNNING", "first")
    threads = (await control.plane.jobs.get("local", "first")).config.need.threads
    await control.plane.stop_processes()
    await control.close()

    control = await bench.control(threads=threads, hold_s=0.0)
    await control.job_becomes("JOB_STATE_RUNNING", "first")
    second = await control.create_job("second")
    assert second["state"] == "JOB_STATE_PENDING"
    assert f"waiting for {threads} engine threads: 0 of {threads}" in second["status"]["message"]
    deployment = await control.create_deployment()
    assert deployment["state"] == "CREATING"

    report = await control.call("GET", "/v1/homefire/status")
    assert set(report["capacity"]["waiting"]) == {
        "accounts/local/rlorTrainerJobs/second",
        "accounts/local/deployments/d1",
    }
    await control.call("DELETE", "/v1/accounts/local/deployments/d1?hard=true")
    await control.call("DELETE", "/v1/accounts/local/rlorTrainerJobs/first")
    await control.job_becomes("JOB_STATE_RUNNING", "second")
    assert len(bench.launcher.running()) == 1


async def test_what_can_never_fit_is_refused_at_once(bench: Any) -> None:
    control = await bench.control(threads=8)
    object.__setattr__(control.plane.jobs.capacity, "memory_bytes", 1)
    refused = await control.create_job(expect=400)
    assert refused["error"]["code"] == "failed_precondition"
    assert "cannot be trained here" in refused["message"]


async def test_deleting_leaves_a_tombstone_and_no_process(bench: Any, control: Any) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    bench.save_snapshot("step_1")
    path = "/v1/accounts/local/rlorTrainerJobs"
    assert await control.call("DELETE", f"{path}/j1") == {}
    await control.job_becomes("JOB_STATE_DELETED")
    assert not bench.launcher.running()
    assert await control.call("DELETE", f"{path}/j1") == {}
    assert (await control.call("GET", f"{path}/j1"))["state"] == "JOB_STATE_DELETED"
    assert (await control.call("GET", path))["rlorTrainerJobs"] == []
    (row,) = (await control.call("GET", f"{path}/j1/checkpoints"))["checkpoints"]
    assert row["name"].endswith("/checkpoints/step_1")
    refused = await control.call("POST", f"{path}/j1:cancel", expect=400)
    assert "cannot cancel job in state: JOB_STATE_DELETED" in refused["message"]
    assert "local/j1" not in control.plane.routes.get().trainers


async def test_a_trainer_that_ignores_sigterm_is_killed(bench: Any, control: Any) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    bench.trainer().process.deaf = True
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:cancel")
    await control.job_becomes("JOB_STATE_CANCELLED")
    assert bench.trainer().process.signals == ["SIGTERM", "SIGKILL"]


async def test_a_killed_control_leaves_everything_running_and_the_next_one_adopts_it(
    bench: Any,
) -> None:
    control = await bench.control()
    await control.create_job()
    await control.create_deployment()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.deployment_becomes("READY")
    before = [process.record for process in bench.launcher.running()]
    routed = control.plane.routes.get()
    await control.close()

    control = await bench.control()
    await control.plane.reconciler.reconcile()
    table = control.plane.routes.get()
    assert table.trainers == routed.trainers
    assert table.deployments == routed.deployments
    assert table.version != routed.version
    await control.eventually(lambda: _answers(control))
    assert [process.record for process in bench.launcher.running()] == before
    assert len(bench.launcher.started) == 2


async def _answers(control: Any) -> bool:
    report = await control.plane.status("local")
    return all(replica.ready for row in report.deployments for replica in row.replicas)


async def test_a_process_that_died_while_control_was_away_is_started_again(bench: Any) -> None:
    control = await bench.control()
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.close()
    bench.trainer().process.exit(1)

    control = await bench.control()

    async def is_replaced() -> bool:
        return len(bench.launcher.running("trainer j1")) == 1

    await control.eventually(is_replaced)
    assert len(bench.launcher.started) == 2


async def test_a_start_that_was_not_written_down_any_more_is_found_by_the_next_control(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = await bench.control()
    start = bench.launcher.start

    async def start_and_lose_control(spec: Any) -> ProcessRecord:
        await start(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.launcher, "start", start_and_lose_control)
    with pytest.raises(KeyboardInterrupt):
        await _reconcile_after_create(control)
    await control.close()
    monkeypatch.undo()

    control = await bench.control()
    await control.job_becomes("JOB_STATE_RUNNING")
    assert len(bench.launcher.started) == 1


async def _reconcile_after_create(control: Any) -> None:
    """One pass in this task, so that what ends it is seen here."""
    await control.plane.stop_reconciling()
    request = TrainerJobRequest(training_config=TrainingConfig(base_model="tiny"))
    await control.plane.jobs.create(
        "local", request, job_id="j1", training_shape=None, deployment_id=None
    )
    await control.plane.reconciler.reconcile()


async def test_a_start_that_never_happened_is_made_up_for_by_the_next_control(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = await bench.control()

    async def lose_control(spec: Any) -> ProcessRecord:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.launcher, "start", lose_control)
    with pytest.raises(KeyboardInterrupt):
        await _reconcile_after_create(control)
    await control.close()
    monkeypatch.undo()

    control = await bench.control()
    await control.job_becomes("JOB_STATE_RUNNING")
    assert len(bench.launcher.started) == 1


async def test_a_process_with_another_nonce_is_neither_adopted_nor_signalled(
    bench: Any,
) -> None:
    control = await bench.control()
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.close()
    stranger = bench.trainer()
    stranger.say(nonce="somebody-else")

    control = await bench.control()

    async def is_replaced() -> bool:
        return bench.trainer() is not stranger

    await control.eventually(is_replaced)
    await control.job_becomes("JOB_STATE_RUNNING")
    assert stranger.process.signals == []
    assert (await control.plane.jobs.get("local", "j1")).supervision.restarts == 1


async def test_a_clean_stop_ends_every_process_and_the_next_control_resumes_what_ran(
    bench: Any,
) -> None:
    control = await bench.control()
    await control.create_job("runs")
    await control.create_job("cancelled")
    await control.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/runs")
    await control.job_becomes("JOB_STATE_RUNNING", "runs")
    await control.deployment_becomes("READY")
    bench.save_snapshot("step_1", job="runs")
    headers = {"fireworks-deployment": "accounts/local/deployments/d1"}
    await control.call(
        "POST", "/hot_load/v1/models/hot_load", {"identity": "step_1"}, headers=headers
    )
    await control.call("GET", "/hot_load/v1/models/hot_load", headers=headers)
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/cancelled:cancel")
    await control.job_becomes("JOB_STATE_CANCELLED", "cancelled")

    await control.plane.stop_processes()
    assert not bench.launcher.running()
    assert await control.job("runs") == "JOB_STATE_RUNNING"
    assert await control.deployment() == "READY"
    await control.close()

    control = await bench.control()

    async def has_caught_up() -> bool:
        route = control.plane.routes.get().deployments.get("local/d1")
        return route is not None and bool(route.replicas)

    await control.eventually(has_caught_up)
    assert bench.replica().status.get().identity == "step_1"
    assert await control.job("runs") == "JOB_STATE_RUNNING"
    assert not bench.launcher.running("trainer cancelled")


async def test_held_requests_are_answered_when_control_stops(bench: Any) -> None:
    bench.services.trainers_start_as = TrainerState.STARTING
    control = await bench.control()
    await control.create_job()
    job = asyncio.create_task(control.call("GET", "/v1/accounts/local/rlorTrainerJobs/j1"))
    version = control.plane.routes.version
    routes = asyncio.create_task(
        control.call("GET", f"/internal/routes?after={version + 1000}&wait_s=0")
    )
    await routes
    await control.plane.stop_processes()
    assert (await job)["state"] == "JOB_STATE_CREATING"


async def test_a_second_control_plane_on_the_home_is_refused(bench: Any, control: Any) -> None:
    with pytest.raises(HomeBusy):
        await bench.control()


async def test_the_routing_table_is_on_disk_for_the_owner_only_and_knows_the_homes_key(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.plane.reconciler.reconcile()
    file = Home(bench.home.root).routes_file
    assert file.stat().st_mode & 0o077 == 0
    table = msgspec.json.decode(file.read_bytes(), type=RouteTable)
    assert table.trainers["local/j1"].upstream is not None
    digest = hashlib.sha256(bench.home.api_key().encode()).hexdigest()
    assert [(key.sha256, key.account) for key in table.keys] == [(digest, "local")]


async def test_a_control_plane_that_restarts_gives_no_table_before_it_has_looked(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that restarts beside it would take an empty one for the truth."""
    first = await bench.control()
    await first.create_job()
    await first.close()
    may_look, reconcile = asyncio.Event(), Reconciler.reconcile

    async def look_later(self: Reconciler) -> float | None:
        await may_look.wait()
        return await reconcile(self)

    monkeypatch.setattr(Reconciler, "reconcile", look_later)
    monkeypatch.setattr(internal, "FIRST_TABLE_WAIT_S", 0.0)
    again = await bench.control()
    assert (await again.call("GET", "/internal/routes", expect=503))["error"][
        "code"
    ] == "unavailable"
    monkeypatch.setattr(internal, "FIRST_TABLE_WAIT_S", 20.0)
    may_look.set()
    assert "local/j1" in (await again.call("GET", "/internal/routes"))["trainers"]


async def test_a_watcher_of_the_table_is_woken_by_its_next_change(control: Any) -> None:
    first = await control.call("GET", "/internal/routes")
    await control.create_deployment()
    after = first["version"]
    second = await control.call("GET", f"/internal/routes?after={after}&wait_s=20")
    assert second["version"] > after


async def test_two_replicas_are_started_and_one_is_dismissed_again(
    bench: Any, control: Any
) -> None:
    await control.create_deployment(minReplicaCount=2, maxReplicaCount=2)
    await control.deployment_becomes("READY")

    async def both_serve() -> bool:
        return len(control.plane.routes.get().deployments["local/d1"].replicas) == 2

    await control.eventually(both_serve)
    await control.call("PATCH", "/v1/accounts/local/deployments/d1:scale", {"replicaCount": 1})
    await control.deployment_becomes("READY")
    assert [p.spec.name for p in bench.launcher.running()] == ["replica d1/0"]


async def test_a_replica_that_dies_at_every_start_fails_its_deployment_until_it_is_scaled_again(
    bench: Any, control: Any
) -> None:
    bench.services.die_at_once = ["Traceback", "MemoryError"]
    await control.create_deployment()

    async def has_failed() -> bool:
        bench.clock.advance(10.0)
        control.plane.reconciler.wake()
        return await control.deployment() == "FAILED"

    await control.eventually(has_failed)
    failed = await control.call("GET", "/v1/accounts/local/deployments/d1")
    assert "MemoryError" in failed["status"]["message"]
    bench.services.die_at_once = None
    await control.call("PATCH", "/v1/accounts/local/deployments/d1:scale", {"replicaCount": 1})
    await control.deployment_becomes("READY")


async def test_a_stopping_trainer_is_not_asked_any_more(bench: Any, control: Any) -> None:
    """A held poll would keep its server from ending for seconds."""
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    trainer = bench.trainer()
    trainer.process.hold_sigterm = True
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:cancel")
    async with asyncio.timeout(20):
        while trainer.num_held:
            await asyncio.sleep(0)
    assert trainer.process.alive
    trainer.process.exit(0)
    await control.job_becomes("JOB_STATE_CANCELLED")


async def test_a_job_resumed_while_its_old_trainer_still_ends_waits_for_that(
    bench: Any, control: Any
) -> None:
    bench.services.trainers_start_as = TrainerState.STARTING
    await control.create_job()

    async def is_watched() -> bool:
        return bool(bench.services.all)

    await control.eventually(is_watched)
    old = bench.trainer()
    old.process.hold_sigterm = True
    old.say(state=TrainerState.FAILED, detail="no")
    await control.job_becomes("JOB_STATE_FAILED")
    bench.services.trainers_start_as = TrainerState.READY
    resumed = await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:resume")
    assert resumed["state"] == "JOB_STATE_PENDING"
    assert "last trainer" in resumed["status"]["message"]
    assert len(bench.launcher.running()) == 1
    old.process.exit(0)
    await control.job_becomes("JOB_STATE_RUNNING")
    assert len(bench.launcher.running()) == 1


async def test_a_stop_in_the_middle_of_a_start_leaves_nothing_running(
    bench: Any, control: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, begun, go_on = bench.launcher.start, asyncio.Event(), asyncio.Event()

    async def slow_start(spec: Any) -> ProcessRecord:
        begun.set()
        await go_on.wait()
        return await start(spec)

    monkeypatch.setattr(bench.launcher, "start", slow_start)
    creating = asyncio.create_task(control.create_job())
    await begun.wait()
    stopping = asyncio.create_task(control.plane.stop_processes())
    go_on.set()
    await stopping
    await creating
    assert len(bench.launcher.started) == 1
    assert not bench.launcher.running()
    assert await control.job() == "JOB_STATE_CREATING"


async def test_a_paused_job_gives_its_room_back_and_goes_on_in_its_folder_when_woken(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    answer = await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:pause")
    assert answer["state"] == "JOB_STATE_PAUSED"
    assert "homefire trainer resume" in answer["status"]["message"]
    again = await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:pause")
    assert again["state"] == "JOB_STATE_PAUSED"
    await control.call("GET", "/v1/accounts/local/rlorTrainerJobs/j1")  # held until it has ended
    assert bench.trainer().process.signals == ["SIGTERM"]
    assert (await control.plane.status("local")).capacity.threads_used == 0
    await control.call("POST", "/internal/tinker/wake", {"account": "local", "service": "j1"})
    await control.job_becomes("JOB_STATE_RUNNING")
    assert len(bench.launcher.started) == 2


async def test_a_job_that_was_cancelled_is_neither_paused_nor_woken(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:cancel")
    await control.job_becomes("JOB_STATE_CANCELLED")
    await control.call("POST", "/v1/accounts/local/rlorTrainerJobs/j1:pause", expect=400)
    await control.call("POST", "/internal/tinker/wake", {"account": "local", "service": "j1"})
    assert await control.job() == "JOB_STATE_CANCELLED"
