"""The root Tinker plane in control: sessions, runs placed in pools, samplers."""

from __future__ import annotations

import shutil
from typing import Any

import msgspec
import pytest

from homefire.checkpoints import (
    CheckpointKey,
    SnapshotInfo,
    ensure_tiny,
    read_model_directory,
    write_base,
    write_state,
)
from homefire.wire.manifest import CheckpointFamily
from homefire.wire.pooled import parse_sampling_session
from homefire.wire.specs import ReplicaSpec, TrainerMode, TrainerSpec

RUNS = "/internal/tinker/runs"


async def session(control: Any, **body: Any) -> str:
    return (await control.call("POST", "/api/v1/create_session", body))["session_id"]


async def place(control: Any, session_id: str, number: int = 0, *, expect: int = 200, **new: Any):
    body = {"account": "local", "session_id": session_id, "model_seq_id": number, **new}
    return await control.call("POST", RUNS, body, expect=expect)


async def pool(control: Any, base_model: str = "tiny") -> str:
    return (await place(control, await session(control), base_model=base_model))["job"]


def trainer_spec(bench: Any, job: str) -> TrainerSpec:
    return msgspec.json.decode(bench.trainer(job).process.spec.spec, type=TrainerSpec)


def save(bench: Any, job: str, run: str, family: CheckpointFamily, name: str) -> None:
    key = CheckpointKey("local", job, run, family, name)
    tiny = ensure_tiny(bench.home.models / "tiny")
    tensors = read_model_directory(tiny)
    info = SnapshotInfo(
        step=1, base_model="tiny", created_at=bench.clock.now(), metadata={}, expires_at=None
    )
    if family is CheckpointFamily.SAMPLER:
        write_base(bench.store, key, tensors, info, model_files=tiny)
    else:
        write_state(bench.store, key, {"weights.safetensors": tensors}, info)


async def test_a_session_has_an_id_of_the_root_plane_and_keeps_what_it_was_told(control):
    session_id = await session(
        control, tags=["a"], user_metadata={"team": "x"}, sdk_version="0.38.0", display_name="d"
    )
    assert session_id.startswith("ts-")
    row = await control.plane.tinker.sessions.get("local", session_id)
    assert (row.tags, row.user_metadata) == (["a"], {"team": "x"})
    assert (row.sdk_version, row.display_name) == ("0.38.0", "d")


async def test_a_heartbeat_is_written_down_once_a_minute(bench, control):
    session_id = await session(control)
    began = bench.clock.now()

    async def beat_after(seconds: float) -> float:
        bench.clock.advance(seconds)
        body = {"session_id": session_id}
        answer = await control.call("POST", "/api/v1/session_heartbeat", body)
        assert answer == {"type": "session_heartbeat"}
        return (await control.plane.tinker.sessions.get("local", session_id)).heartbeat_at - began

    assert await beat_after(59) == 0.0
    assert await beat_after(1) == 60.0
    heard = control.plane.tinker.sessions.last_heard(session_id, began)
    assert heard == bench.clock.now()


async def test_a_finished_session_hears_nothing_and_begins_nothing(control):
    session_id = await session(control)
    path = f"/api/v1/sessions/{session_id}/finish"
    await control.call("POST", path, {"reason": {"type": "success"}, "detail": None})
    await control.call("POST", path, {"reason": {"type": "errored"}, "detail": "late"})
    await control.call("POST", "/api/v1/session_heartbeat", {"session_id": session_id}, expect=410)
    refused = await place(control, session_id, base_model="tiny", expect=400)
    assert "finished (success)" in refused["error"]["message"]
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    await control.call("POST", "/api/v1/create_sampling_session", body, expect=400)


@pytest.mark.parametrize("path", ["session_heartbeat", "create_sampling_session"])
async def test_another_accounts_session_does_not_exist(control, path):
    session_id = await session(control)
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    await control.call(
        "POST", f"/api/v1/{path}", body, expect=404, headers={"x-homefire-account": "other"}
    )


async def test_a_run_finds_the_pool_of_its_base_model_under_every_name(bench):
    control = await bench.control(aliases={"Qwen/Qwen3-8B": "tiny"})
    first = await session(control)
    placed = await place(control, first, base_model="tiny")
    assert placed["run"] == f"{first}:train:0"
    assert placed["job"].startswith("pool-")
    for name in ("Qwen/Qwen3-8B", "accounts/local/models/tiny"):
        assert await pool(control, name) == placed["job"]
    await control.job_becomes("JOB_STATE_RUNNING", placed["job"])
    spec = trainer_spec(bench, placed["job"])
    assert spec.pooled
    assert spec.sampler == f"{placed['job']}-sampler"
    assert spec.mode is TrainerMode.LORA


async def test_the_same_run_again_is_the_same_run(control):
    session_id = await session(control)
    first = await place(control, session_id, base_model="tiny")
    assert await place(control, session_id, base_model="tiny") == first
    path = f"{RUNS}/{first['run']}?account=local"
    assert await control.call("GET", path) == first


async def test_rank_zero_gets_a_job_of_its_own(bench, control):
    session_id = await session(control)
    full = await place(control, session_id, 0, base_model="tiny", rank=0)
    lora = await place(control, session_id, 1, base_model="tiny", rank=8)
    assert full["job"].startswith("run-")
    assert lora["job"].startswith("pool-")
    await control.job_becomes("JOB_STATE_RUNNING", full["job"])
    spec = trainer_spec(bench, full["job"])
    assert (spec.pooled, spec.mode, spec.lora_rank) == (True, TrainerMode.FULL, 0)


@pytest.mark.parametrize(
    ("new", "code", "words"),
    [
        ({"base_model": "nonsense"}, "unknown_model", "available: accounts/local/models/tiny"),
        ({"base_model": "tiny", "rank": 257}, "invalid_argument", "between 0 and 256"),
        ({"base_model": "tiny", "rank": -1}, "invalid_argument", "between 0 and 256"),
        ({}, "invalid_argument", "base_model is missing"),
        ({"path": "tinker://x/weights/y"}, "unknown_snapshot", "does not exist"),
        ({"path": "tinker://x/sampler_weights/y"}, "wrong_checkpoint_kind", "no optimizer"),
        ({"path": "somewhere"}, "invalid_argument", "no checkpoint path"),
    ],
)
async def test_what_cannot_be_trained_is_refused_before_anything_is_made(control, new, code, words):
    session_id = await session(control)
    refused = await place(control, session_id, expect=400, **new)
    assert refused["error"]["code"] == code
    assert words in refused["error"]["message"]
    assert await control.plane.jobs.list("local") == []


async def test_a_run_from_a_checkpoint_goes_where_its_base_model_is(bench, control):
    session_id = await session(control)
    source = await place(control, session_id, base_model="tiny", rank=0)
    save(bench, source["job"], source["run"], CheckpointFamily.STATE, "s1")
    path = f"tinker://{source['run']}/weights/s1"
    copy = await place(control, session_id, 1, path=path)
    assert copy["job"].startswith("run-")
    assert copy["job"] != source["job"]
    missing = await place(control, session_id, 2, path=f"{path}0", expect=400)
    assert "it has s1" in missing["error"]["hint"]


async def test_an_unknown_run_is_not_found(control):
    await control.call("GET", f"{RUNS}/ts-1:train:0?account=local", expect=404)


async def test_a_run_of_a_finished_session_is_refused(control):
    session_id = await session(control)
    placed = await place(control, session_id, base_model="tiny")
    path = f"/api/v1/sessions/{session_id}/finish"
    await control.call("POST", path, {"reason": {"type": "success"}})
    refused = await control.call("GET", f"{RUNS}/{placed['run']}?account=local", expect=400)
    assert "was finished" in refused["error"]["message"]


async def test_a_pool_that_a_user_stopped_starts_again_with_the_next_model(control):
    job = await pool(control)
    await control.job_becomes("JOB_STATE_RUNNING", job)
    await control.plane.jobs.cancel("local", job)
    await control.job_becomes("JOB_STATE_CANCELLED", job)
    await control.call("POST", "/internal/tinker/wake", {"account": "local", "service": job})
    assert await control.job(job) == "JOB_STATE_CANCELLED"
    assert await pool(control) == job
    await control.job_becomes("JOB_STATE_RUNNING", job)


async def test_a_deleted_pool_comes_back_with_the_next_model(control):
    job = await pool(control)
    await control.job_becomes("JOB_STATE_RUNNING", job)
    await control.plane.jobs.delete("local", job)
    await control.job_becomes("JOB_STATE_DELETED", job)
    assert await pool(control) == job
    await control.job_becomes("JOB_STATE_RUNNING", job)


async def test_a_base_model_is_sampled_without_a_trainer(bench, control):
    session_id = await session(control)
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    created = await control.call("POST", "/api/v1/create_sampling_session", body)
    again = await control.call("POST", "/api/v1/create_sampling_session", body)
    assert again == created
    parsed = parse_sampling_session(created["sampling_session_id"])
    assert parsed.is_base
    await control.deployment_becomes("READY", parsed.sampler)
    spec = msgspec.json.decode(bench.replica(parsed.sampler).process.spec.spec, type=ReplicaSpec)
    assert f"{spec.samples_job}-sampler" == parsed.sampler
    assert await control.plane.jobs.list("local") == []
    sampler = await control.call("GET", f"/api/v1/samplers/{parsed.id}")
    assert sampler == {"sampler_id": parsed.id, "base_model": "tiny"}


async def test_a_snapshot_is_sampled_by_its_path(bench, control):
    session_id = await session(control)
    placed = await place(control, session_id, base_model="tiny")
    save(bench, placed["job"], placed["run"], CheckpointFamily.SAMPLER, "ckpt-1")
    path = f"tinker://{placed['run']}/sampler_weights/ckpt-1"
    body = {"session_id": session_id, "sampling_session_seq_id": 3, "model_path": path}
    created = await control.call("POST", "/api/v1/create_sampling_session", body)
    parsed = parse_sampling_session(created["sampling_session_id"])
    assert (parsed.run, parsed.snapshot) == (placed["run"], "ckpt-1")
    assert parsed.sampler == f"{placed['job']}-sampler"
    sampler = await control.call("GET", f"/api/v1/samplers/{parsed.id}")
    assert sampler == {"sampler_id": parsed.id, "base_model": "tiny", "model_path": path}


async def test_a_snapshot_has_a_sampler_without_any_sampling_session(bench, control):
    """Its run's session may be over: what it saved is still there to sample from."""
    session_id = await session(control)
    placed = await place(control, session_id, base_model="tiny")
    save(bench, placed["job"], placed["run"], CheckpointFamily.SAMPLER, "ckpt-1")
    await control.call(
        "POST", f"/api/v1/sessions/{session_id}/finish", {"reason": {"type": "success"}}
    )
    path = f"tinker://{placed['run']}/sampler_weights/ckpt-1"
    asked = {"account": "local", "path": path}
    found = await control.call("POST", "/internal/tinker/samplers", asked)
    assert found == {"sampler": f"{placed['job']}-sampler"}
    await control.deployment_becomes("READY", found["sampler"])
    for wrong in ({**asked, "account": "other"}, {**asked, "path": path.replace("-1", "-2")}):
        refused = await control.call("POST", "/internal/tinker/samplers", wrong, expect=400)
        assert refused["error"]["code"] == "unknown_snapshot"


async def test_a_base_model_beside_a_path_has_to_be_the_same_model(bench):
    other = bench.home.models / "second"
    shutil.copytree(ensure_tiny(bench.home.models / "tiny"), other)
    control = await bench.control(aliases={"Org/Tiny": "tiny"})
    session_id = await session(control)
    placed = await place(control, session_id, base_model="tiny")
    for family in CheckpointFamily:
        save(bench, placed["job"], placed["run"], family, "c")
    sampled = f"tinker://{placed['run']}/sampler_weights/c"
    for number, (name, status) in enumerate([("Org/Tiny", 200), ("second", 400)], start=1):
        body = {"session_id": session_id, "sampling_session_seq_id": number, "base_model": name}
        await control.call(
            "POST",
            "/api/v1/create_sampling_session",
            {**body, "model_path": sampled},
            expect=status,
        )
        state = f"tinker://{placed['run']}/weights/c"
        answer = await place(
            control, session_id, number, path=state, base_model=name, expect=status
        )
    assert "is not tiny" in answer["error"]["message"]


async def test_another_accounts_checkpoints_do_not_exist(bench, control):
    session_id = await session(control)
    placed = await place(control, session_id, base_model="tiny")
    for family in CheckpointFamily:
        save(bench, placed["job"], placed["run"], family, "c")
    other = {"x-homefire-account": "other"}
    created = await control.call("POST", "/api/v1/create_session", {}, headers=other)
    asked = {"session_id": created["session_id"], "sampling_session_seq_id": 0}
    refused = await control.call(
        "POST",
        "/api/v1/create_sampling_session",
        {**asked, "model_path": f"tinker://{placed['run']}/sampler_weights/c"},
        expect=400,
        headers=other,
    )
    assert refused["error"]["code"] == "unknown_snapshot"
    new = {"account": "other", "session_id": created["session_id"], "model_seq_id": 0}
    state = f"tinker://{placed['run']}/weights/c"
    refused = await control.call("POST", RUNS, {**new, "path": state}, expect=400)
    assert refused["error"]["code"] == "unknown_snapshot"
    await control.call("GET", f"{RUNS}/{placed['run']}?account=other", expect=404)
    for service in (placed["job"], f"{placed['job']}-sampler"):
        wake = {"account": "other", "service": service}
        await control.call("POST", "/internal/tinker/wake", wake, expect=404)


async def test_two_accounts_have_pools_of_their_own(control):
    other = {"x-homefire-account": "other"}
    created = await control.call("POST", "/api/v1/create_session", {}, headers=other)
    new = {"account": "other", "session_id": created["session_id"], "model_seq_id": 0}
    placed = await control.call("POST", RUNS, {**new, "base_model": "tiny"})
    assert placed["job"] != await pool(control)


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ({}, "invalid_argument", "neither base_model nor model_path"),
        ({"base_model": "nonsense"}, "unknown_model", "available"),
        ({"model_path": "tinker://RUN/sampler_weights/none"}, "unknown_snapshot", "none"),
        ({"model_path": "tinker://RUN/weights/x"}, "wrong_checkpoint_kind", "training state"),
        ({"model_path": "tinker://ts-1:train:0/sampler_weights/x"}, "unknown_snapshot", "ts-1"),
    ],
)
async def test_what_cannot_be_sampled_is_refused_before_anything_is_made(
    control, asked, code, words
):
    session_id = await session(control)
    placed = await place(control, session_id, base_model="tiny")
    asked = {name: text.replace("RUN", placed["run"]) for name, text in asked.items()}
    body = {"session_id": session_id, "sampling_session_seq_id": 0, **asked}
    refused = await control.call("POST", "/api/v1/create_sampling_session", body, expect=400)
    assert refused["error"]["code"] == code
    assert words in refused["error"]["message"]
    assert await control.plane.deployments.list("local") == []


async def test_the_sampler_of_an_ephemeral_save_is_made_when_it_is_named(control):
    job = await pool(control)
    sampler = f"{job}-sampler"
    session_id = f"{sampler}.00000000"
    described = await control.call("GET", f"/api/v1/samplers/{session_id}")
    assert described["base_model"] == "tiny"
    await control.call("POST", "/internal/tinker/wake", {"account": "local", "service": sampler})
    await control.deployment_becomes("READY", sampler)


async def test_a_request_wakes_a_dedicated_job_that_runs_without_touching_it(bench, control):
    await control.create_job("j1")
    (trainer,) = bench.launcher.running()
    await control.call("POST", "/internal/tinker/wake", {"account": "local", "service": "j1"})
    assert bench.launcher.running() == [trainer]


@pytest.mark.parametrize("service", ["pool-1", "pool-1-sampler"])
async def test_what_the_root_plane_never_made_cannot_be_woken(control, service):
    await control.call(
        "POST", "/internal/tinker/wake", {"account": "local", "service": service}, expect=404
    )


@pytest.mark.parametrize("sampler", ["nonsense", "pool-1-sampler.00000000", "a.b.c"])
async def test_an_unknown_sampler_is_not_found(control, sampler):
    await control.call("GET", f"/api/v1/samplers/{sampler}", expect=404)


async def test_the_catalog_is_what_can_be_trained_and_sampled(bench):
    control = await bench.control(aliases={"Qwen/Qwen3-8B": "tiny", "gone": "/nowhere"})
    answer = await control.call("GET", "/api/v1/get_server_capabilities")
    models = {model["model_name"]: model for model in answer["supported_models"]}
    assert models["Qwen/Qwen3-8B"]["max_context_length"] == 2048
    assert "accounts/local/models/tiny" in models
    assert "gone" not in models


async def test_a_pool_that_finds_no_room_waits_and_says_for_what(bench):
    control = await bench.control(threads=1)
    await control.create_job("j1")
    await control.job_becomes("JOB_STATE_RUNNING")
    job = await pool(control)
    row = await control.plane.jobs.get("local", job)
    assert row.state == "JOB_STATE_PENDING"
    assert "waiting for" in row.message
    assert control.plane.routes.get().trainers[f"local/{job}"].detail == row.message


async def test_a_pool_its_sampler_and_a_dedicated_job_fit_or_the_last_waits(bench):
    control = await bench.control(threads=2)
    await control.create_job("j1")
    await control.job_becomes("JOB_STATE_RUNNING")
    session_id = await session(control)
    job = (await place(control, session_id, base_model="tiny"))["job"]
    await control.job_becomes("JOB_STATE_RUNNING", job)
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    await control.call("POST", "/api/v1/create_sampling_session", body)
    sampler = f"local/{job}-sampler"

    async def says_why() -> bool:
        detail = control.plane.routes.get().deployments[sampler].detail
        return detail == "waiting for 1 engine threads: 0 of 2 are free"

    await control.eventually(says_why)
    await control.plane.jobs.cancel("local", "j1")

    async def samples() -> bool:
        return bool(control.plane.routes.get().deployments[sampler].replicas)

    await control.eventually(samples)


async def test_the_status_shows_runs_whose_clients_may_be_there(bench, control):
    session_id = await session(control, display_name="mine")
    placed = await place(control, session_id, base_model="tiny", rank=8)
    over = await session(control)
    await place(control, over, base_model="tiny")
    path = f"/api/v1/sessions/{over}/finish"
    await control.call("POST", path, {"reason": {"type": "success"}})
    bench.clock.advance(30.0)
    (run,) = (await control.call("GET", "/v1/homefire/status"))["runs"]
    assert run == {
        "run": placed["run"],
        "sessionName": "mine",
        "job": placed["job"],
        "baseModel": "tiny",
        "loraRank": 8,
        "silentS": 30.0,
    }
    bench.clock.advance(25 * 3600.0)
    assert (await control.call("GET", "/v1/homefire/status"))["runs"] == []
