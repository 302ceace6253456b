"""Parking and closing: what nobody uses holds nothing, and a request brings it back as it was."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request
from starlette.routing import Route

from homefire.control.tinker.parking import CROWDED_FREE_S, CROWDED_IDLE_S
from homefire.http.bodies import json_response

from .test_tinker_plane import place, session

IDLE_S = 600.0
LOOK_S = IDLE_S / 4


@pytest.fixture
async def control(bench):
    return await bench.control(pool_idle_s=IDLE_S)


async def running_pool(control: Any, session_id: str) -> str:
    job = (await place(control, session_id, base_model="tiny"))["job"]
    await control.job_becomes("JOB_STATE_RUNNING", job)
    return job


async def sampler(control: Any, session_id: str) -> str:
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    created = await control.call("POST", "/api/v1/create_sampling_session", body)
    name = created["sampling_session_id"].partition(".")[0]
    await control.deployment_becomes("READY", name)
    return name


async def wait(bench: Any, control: Any, seconds: float) -> None:
    """Time passes, and the reconciler looks as often as it would."""
    left = seconds
    while left > 0:
        bench.clock.advance(min(LOOK_S, left))
        left -= LOOK_S
        passes = control.plane.reconciler.passes
        version = passes.version
        control.plane.reconciler.wake()
        await passes.wait_beyond(after=version, timeout_s=20.0)


async def finish(control: Any, session_id: str) -> None:
    path = f"/api/v1/sessions/{session_id}/finish"
    await control.call("POST", path, {"reason": {"type": "success"}})


async def beat(control: Any, session_id: str) -> None:
    await control.call("POST", "/api/v1/session_heartbeat", {"session_id": session_id})


async def wake(control: Any, service: str) -> None:
    await control.call("POST", "/internal/tinker/wake", {"account": "local", "service": service})


async def test_a_pool_that_nobody_uses_is_parked_says_why_and_holds_nothing(bench, control):
    job = await running_pool(control, await session(control))
    await wait(bench, control, IDLE_S - 1)
    assert await control.job(job) == "JOB_STATE_RUNNING"
    await wait(bench, control, LOOK_S + 1)
    await control.job_becomes("JOB_STATE_PAUSED", job)
    row = await control.plane.jobs.get("local", job)
    assert row.message == "parked: nobody used it for 10 min; the next request wakes it"

    async def holds_nothing() -> bool:
        capacity = (await control.plane.status("local")).capacity
        return capacity.threads_used == 0

    await control.eventually(holds_nothing)


async def test_a_request_for_a_run_wakes_its_parked_pool(bench, control):
    session_id = await session(control)
    job = await running_pool(control, session_id)
    await wait(bench, control, 2 * IDLE_S)
    await control.job_becomes("JOB_STATE_PAUSED", job)
    await control.call("GET", f"/internal/tinker/runs/{session_id}:train:0?account=local")
    await control.job_becomes("JOB_STATE_RUNNING", job)
    assert (await control.plane.jobs.get("local", job)).message == ""


async def test_waking_twice_is_waking_once(bench, control):
    job = await running_pool(control, await session(control))
    await wait(bench, control, 2 * IDLE_S)
    await control.job_becomes("JOB_STATE_PAUSED", job)
    await wake(control, job)
    await wake(control, job)
    await control.job_becomes("JOB_STATE_RUNNING", job)
    starts = [s for s in bench.services.all if s.process.spec.name == f"trainer {job}"]
    assert len(starts) == 2


async def test_heartbeats_keep_a_pool_and_its_sampler(bench, control):
    session_id = await session(control)
    job = await running_pool(control, session_id)
    name = await sampler(control, session_id)
    for _ in range(12):
        await wait(bench, control, LOOK_S)
        await beat(control, session_id)
    assert await control.job(job) == "JOB_STATE_RUNNING"
    assert (await control.plane.deployments.get("local", name)).config.num_replicas == 1


async def test_a_finished_session_keeps_nothing(bench, control):
    session_id = await session(control)
    job = await running_pool(control, session_id)
    await wait(bench, control, LOOK_S)
    await beat(control, session_id)
    await finish(control, session_id)
    await wait(bench, control, IDLE_S)
    await control.job_becomes("JOB_STATE_PAUSED", job)


@pytest.mark.parametrize("counts", [(5, 4), (5, 5)], ids=["work is waiting", "work was done"])
async def test_operations_keep_a_pool(bench, control, counts):
    job = await running_pool(control, await session(control))
    await wait(bench, control, IDLE_S - LOOK_S)
    accepted, applied = counts
    bench.trainer(job).say(num_accepted=accepted, num_applied=applied)
    await wait(bench, control, 2 * LOOK_S)
    assert await control.job(job) == "JOB_STATE_RUNNING"
    bench.trainer(job).say(num_accepted=accepted, num_applied=accepted)
    await wait(bench, control, IDLE_S + 2 * LOOK_S)
    await control.job_becomes("JOB_STATE_PAUSED", job)


async def test_a_sampler_that_nobody_uses_is_parked_and_woken(bench, control):
    name = await sampler(control, await session(control))
    bench.replica(name).say(running=1)
    await wait(bench, control, 2 * IDLE_S)
    assert (await control.plane.deployments.get("local", name)).config.num_replicas == 1
    bench.replica(name).say(running=0)
    await wait(bench, control, IDLE_S + 2 * LOOK_S)

    async def is_parked() -> bool:
        row = await control.plane.deployments.get("local", name)
        replicas = (await control.plane.deployment_view("local", name)).replicas
        return row.state == "READY" and not row.config.num_replicas and not replicas

    await control.eventually(is_parked)
    row = await control.plane.deployments.get("local", name)
    assert row.message.startswith("parked: ")
    assert control.plane.routes.get().deployments[f"local/{name}"].detail == row.message
    await wake(control, name)
    await wake(control, name)
    await control.deployment_becomes("READY", name)
    assert control.plane.routes.get().deployments[f"local/{name}"].replicas


async def test_a_pool_that_never_found_room_is_parked_too(bench):
    control = await bench.control(threads=1, pool_idle_s=IDLE_S)
    await control.create_job("j1")
    await control.job_becomes("JOB_STATE_RUNNING")
    job = (await place(control, await session(control), base_model="tiny"))["job"]
    assert await control.job(job) == "JOB_STATE_PENDING"
    await wait(bench, control, 2 * IDLE_S)
    assert await control.job(job) == "JOB_STATE_PAUSED"


@pytest.mark.parametrize("end", ["finished", "silent"])
async def test_what_waits_for_room_gets_that_of_a_pool_without_a_live_session(bench, end):
    control = await bench.control(threads=2, pool_idle_s=IDLE_S)
    left = await session(control)
    idle = await running_pool(control, left)
    if end == "finished":
        await finish(control, left)
    used = await session(control)
    busy = (await place(control, used, base_model="tiny", rank=0))["job"]
    await control.job_becomes("JOB_STATE_RUNNING", busy)
    await control.create_job("j1")
    patience_s = CROWDED_FREE_S if end == "finished" else CROWDED_IDLE_S
    passed_s = 0.0
    while await control.job(idle) == "JOB_STATE_RUNNING":
        await beat(control, used)
        await wait(bench, control, 1.0)
        passed_s += 1.0
        assert passed_s <= patience_s + 1.0
    assert passed_s >= patience_s
    message = (await control.plane.jobs.get("local", idle)).message
    assert message == "parked: something waits for its room; the next request wakes it"
    await control.job_becomes("JOB_STATE_RUNNING", "j1")
    assert await control.job(busy) == "JOB_STATE_RUNNING"


async def test_dedicated_jobs_and_ordinary_deployments_are_never_parked(bench, control):
    await control.create_job("j1")
    await control.create_deployment("d1")
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.deployment_becomes("READY")
    await running_pool(control, await session(control))
    await wait(bench, control, 3 * IDLE_S)
    assert await control.job("j1") == "JOB_STATE_RUNNING"
    assert (await control.plane.deployments.get("local", "d1")).config.num_replicas == 1


async def test_an_idle_time_of_zero_parks_nothing(bench):
    control = await bench.control(pool_idle_s=0.0)
    job = await running_pool(control, await session(control))
    await wait(bench, control, 10 * IDLE_S)
    assert await control.job(job) == "JOB_STATE_RUNNING"


async def test_a_restarted_control_counts_from_what_is_written_down(bench):
    first = await bench.control(pool_idle_s=IDLE_S)
    session_id = await session(first)
    job = await running_pool(first, session_id)
    await wait(bench, first, IDLE_S - LOOK_S)
    await beat(first, session_id)
    await first.close()
    second = await bench.control(pool_idle_s=IDLE_S)
    await wait(bench, second, IDLE_S - LOOK_S)
    assert await second.job(job) == "JOB_STATE_RUNNING"
    await wait(bench, second, 2 * LOOK_S)
    await second.job_becomes("JOB_STATE_PAUSED", job)


async def test_a_trainer_is_told_that_a_session_is_over_again_until_it_hears(bench, control):
    session_id = await session(control)
    job = await running_pool(control, session_id)
    told: list[str] = []

    async def hear(request: Request) -> Any:
        told.append(request.path_params["session"])
        return json_response({}, status=503 if len(told) == 1 else 200)

    route = Route("/api/v1/sessions/{session}/finish", hear, methods=["POST"])
    bench.trainer(job).app.routes.append(route)
    await finish(control, session_id)
    await wait(bench, control, 3.0)
    await wait(bench, control, 3.0)
    assert told == [session_id, session_id]
    await wait(bench, control, 3.0)
    assert len(told) == 2
