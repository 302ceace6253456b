from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homefire.foundation.events import EventLog
from homefire.wire.internal import TrainerState

JOB = "/v1/accounts/local/rlorTrainerJobs/j1"


@pytest.fixture
def events(bench: Any) -> Any:
    """The trainer's event log, as the front writes it."""
    log = EventLog(bench.home.job("j1") / "events.jsonl", bench.clock)
    yield log
    log.close()


async def test_the_record_holds_what_the_trainer_and_the_client_wrote_in_order(
    bench: Any, control: Any, events: Any
) -> None:
    await control.create_job()
    events.append("started", pid=1)
    events.append("forward_backward", step=0, loss=2.5, tokens=64, ms=3.0, rows=4)
    bench.clock.advance(1.0)
    events.append("optim_step", step=1, ms=1.0, metrics={"grad_norm": 0.5})
    bench.clock.advance(1.0)
    added = await control.call(
        "POST", f"{JOB}/metrics", {"step": 1, "metrics": {"reward": 0.7, "n": 3}}
    )
    assert added["event"] == "client"
    rows = (await control.call("GET", f"{JOB}/metrics"))["rows"]
    assert [(r["event"], r["step"]) for r in rows] == [
        ("forward_backward", 0),
        ("optim_step", 1),
        ("client", 1),
    ]
    assert (rows[0]["loss"], rows[0]["tokens"], rows[0]["ms"]) == (2.5, 64, 3.0)
    assert rows[1]["metrics"] == {"grad_norm": 0.5}
    assert rows[2]["metrics"] == {"reward": 0.7, "n": 3.0}


@pytest.mark.parametrize(
    "body", [{}, {"step": "x", "metrics": {}}, {"step": 1, "metrics": {"a": "b"}}]
)
async def test_metrics_that_are_no_numbers_are_refused(control: Any, body: Any) -> None:
    await control.create_job()
    await control.call("POST", f"{JOB}/metrics", body, expect=400)
    assert (await control.call("GET", f"{JOB}/metrics"))["rows"] == []


async def test_a_record_without_events_yet_is_empty(control: Any) -> None:
    await control.create_job()
    assert await control.call("GET", f"{JOB}/metrics") == {"rows": []}
    await control.call("GET", JOB.replace("j1", "nope") + "/metrics", expect=404)


async def test_evaluations_are_kept_with_what_they_evaluated(bench: Any, control: Any) -> None:
    entry = {
        "name": "held-out",
        "deployment": "d1",
        "identity": "step_1",
        "digest": "abc",
        "step": 1,
        "promptsSha256": "f00",
        "numPrompts": 256,
        "sampling": {"temperature": 0.0},
        "scores": {"reward": 0.75},
        "job": "accounts/local/rlorTrainerJobs/j1",
    }
    made = await control.call("POST", "/v1/accounts/local/evaluations", entry)
    await control.call(
        "POST",
        "/v1/accounts/local/evaluations",
        {**entry, "job": "j2", "identity": "base"},
    )
    listed = await control.call("GET", "/v1/accounts/local/evaluations?job=j1")
    assert listed["evaluations"] == [made]
    assert {key: made[key] for key in entry} == entry
    everything = await control.call("GET", "/v1/accounts/local/evaluations")
    assert [e["identity"] for e in everything["evaluations"]] == ["step_1", "base"]
    refused = await control.call("POST", "/v1/accounts/local/evaluations", {}, expect=400)
    assert refused["error"]["code"] == "invalid_argument"


async def test_the_lineage_leads_from_the_model_to_an_evaluation(
    bench: Any, control: Any, events: Any
) -> None:
    await control.create_job()
    events.append("optim_step", step=1, loss=2.0)
    events.append("optim_step", step=2, loss=1.5)
    base = bench.save_snapshot("step_1", step=1)
    delta = bench.save_snapshot("step_2", parent=base, step=2)
    bench.save_state("state_1")
    replica = EventLog(bench.home.replica("d1", 0) / "events.jsonl", bench.clock)
    replica.append("hot_load", identity="step_2", digest=delta.digest, ok=True, load_ms=1.0)
    replica.append("hot_load", identity="step_1", digest="of another job", ok=True)
    replica.close()
    evaluation = await control.call(
        "POST",
        "/v1/accounts/local/evaluations",
        {"name": "e", "deployment": "d1", "identity": "step_2", "digest": delta.digest[:16]},
    )
    lineage = await control.call("GET", f"{JOB}/lineage")
    edges = {(e["source"], e["kind"], e["target"]) for e in lineage["edges"]}
    (hot_load,) = [n["id"] for n in lineage["nodes"] if n["kind"] == "hot_load"]
    assert edges == {
        ("model:tiny", "trained", "step:1"),
        ("step:1", "trained", "step:2"),
        ("step:1", "saved", "snapshot:step_1"),
        ("step:2", "saved", "snapshot:step_2"),
        ("step:1", "saved", "state:state_1"),
        ("snapshot:step_1", "parent", "snapshot:step_2"),
        ("snapshot:step_2", "loaded", hot_load),
        ("snapshot:step_2", "evaluated", f"evaluation:{evaluation['id']}"),
    }
    named = {node["id"] for node in lineage["nodes"]}
    assert all({source, target} <= named for source, _, target in edges)


async def test_a_branch_starts_from_the_state_that_it_loaded(
    bench: Any, control: Any, events: Any
) -> None:
    await control.create_job()
    events.append("state_loaded", name="cross_job://other/state_9", step=9)
    events.append("optim_step", step=10)
    events.append("optim_step", step=10)
    edges = (await control.call("GET", f"{JOB}/lineage"))["edges"]
    assert edges == [
        {"source": "state:cross_job://other/state_9", "target": "step:10", "kind": "loaded"}
    ]


async def test_logs_are_found_by_job_deployment_and_service(bench: Any, control: Any) -> None:
    await control.create_job()
    await control.create_deployment()
    job = bench.home.job("j1")
    job.mkdir(parents=True, exist_ok=True)
    (job / "front.log").write_text("one\ntwo\nthree\n")
    (job / "engine.log").write_text("loaded\n")
    (bench.home.run / "gateway.log").write_text("ready\n")
    replica = bench.home.replica("d1", 0)
    replica.mkdir(parents=True, exist_ok=True)
    (replica / "replica.log").write_text("serving\n")
    path = "/v1/homefire/logs"
    found = await control.call("GET", f"{path}/j1?tail=2")
    assert found["lines"] == ["[front] two", "[front] three", "[engine] loaded"]
    assert (await control.call("GET", f"{path}/d1"))["lines"] == ["[0/replica] serving"]
    assert (await control.call("GET", f"{path}/gateway"))["lines"] == ["ready"]
    assert (await control.call("GET", f"{path}/control"))["lines"] == []
    refused = await control.call("GET", f"{path}/nope", expect=404)
    assert refused["error"]["hint"] == "what does: gateway, control, j1, d1"
    await control.call("GET", f"{path}/j1?tail=0", expect=400)


async def test_the_status_shows_jobs_replicas_and_capacity(bench: Any, control: Any) -> None:
    await control.create_job()
    await control.create_deployment()
    await control.job_becomes("JOB_STATE_RUNNING")
    await control.deployment_becomes("READY")
    bench.trainer().say(step=7, num_applied=20)

    async def shows_the_step() -> bool:
        report = await control.call("GET", "/v1/homefire/status")
        return report["jobs"][0]["step"] == 7

    # The step alone wakes nobody: it is picked up whenever control looks.
    async with asyncio.timeout(20):
        while not await shows_the_step():
            await asyncio.sleep(0)
    report = await control.call("GET", "/v1/homefire/status")
    (replica,) = report["deployments"][0]["replicas"]
    assert (replica["ready"], replica["identity"], replica["stage"]) == (True, None, "idle")
    assert report["capacity"]["threadsTotal"] == 8
    assert report["capacity"]["threadsUsed"] > 0
    assert report["url"] == "http://127.0.0.1:8700"


async def test_a_recovery_is_seen_in_the_job_and_in_the_status(bench: Any, control: Any) -> None:
    await control.create_job()
    await control.job_becomes("JOB_STATE_RUNNING")
    recovering = {"state": TrainerState.RECOVERING, "detail": "12 of 340 operations replayed"}
    bench.trainer().say(**recovering, num_unsaved=340)
    said = "recovering: 12 of 340 operations replayed"

    async def is_seen() -> bool:
        report = await control.call("GET", "/v1/homefire/status")
        return report["jobs"][0]["message"] == said and report["jobs"][0]["numUnsaved"] == 340

    await control.eventually(is_seen)
    job = await control.call("GET", "/v1/accounts/local/rlorTrainerJobs/j1")
    assert (job["state"], job["status"]["message"]) == ("JOB_STATE_RUNNING", said)


async def test_the_catalog_and_the_shapes_are_listed(control: Any) -> None:
    models = await control.call("GET", "/v1/homefire/models")
    assert [m["name"] for m in models["models"]] == ["accounts/local/models/tiny"]
    shapes = await control.call("GET", "/v1/homefire/shapes")
    names = [s["displayName"] for s in shapes["trainingShapeVersions"]]
    assert [name for name in names if "-x" not in name] == [
        "tiny-full",
        "tiny-lora",
        "tiny-reference",
    ]
    listed = await control.call("GET", "/v1/accounts/local/trainingShapes")
    assert "versions" not in listed["trainingShapes"][0]["name"]
    name = listed["trainingShapes"][0]["name"]
    assert (await control.call("GET", f"/v1/{name}/versions/v1"))["name"] == f"{name}/versions/v1"


async def test_a_checkpoint_goes_only_when_nothing_rests_on_it(bench: Any, control: Any) -> None:
    """Children before parents, what is served never, a state not while a job may recover from it."""
    await control.create_job()
    await control.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    base = bench.save_snapshot("step_1")
    bench.save_snapshot("step_2", parent=base)
    bench.save_snapshot("step_3")
    bench.save_state("mark")
    events = EventLog(bench.home.job("j1") / "events.jsonl", bench.clock)
    events.append("state_loaded", model_id="m", name="mark")

    async def delete(name: str, *, expect: int = 200) -> Any:
        return await control.call("DELETE", f"{JOB}/checkpoints/{name}", expect=expect)

    async def names() -> list[str]:
        rows = (await control.call("GET", f"{JOB}/checkpoints"))["checkpoints"]
        return [row["name"].rpartition("/")[2] for row in rows]

    headers = {"fireworks-deployment": "accounts/local/deployments/d1"}
    await control.call(
        "POST", "/hot_load/v1/models/hot_load", {"identity": "step_3"}, headers=headers
    )
    refused = {
        name: (await delete(name, expect=status))["error"]["message"]
        for name, status in (("step_1", 400), ("step_3", 400), ("mark", 400), ("nope", 404))
    }
    assert "parent of 'step_2'" in refused["step_1"]
    assert "deployment 'd1' serves" in refused["step_3"]
    assert "job 'j1'" in refused["mark"]
    assert "'nope'" in refused["nope"]
    assert await names() == ["step_1", "step_2", "step_3", "mark"]

    await delete("step_2")
    await delete("step_1")
    bench.trainer().on_forget = lambda: events.append("recovery_point")
    await delete("mark")
    events.close()
    assert await names() == ["step_3"]


async def test_a_name_that_two_models_of_a_pool_used_is_not_guessed_at(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    bench.save_snapshot("final")
    bench.save_snapshot("final", slot="ts-1:train:0")
    refused = await control.call("DELETE", f"{JOB}/checkpoints/final", expect=400)
    assert "ts-1:train:0/sampler/final" in refused["error"]["hint"] + refused["error"]["message"]
    assert len((await control.call("GET", f"{JOB}/checkpoints"))["checkpoints"]) == 2


async def test_the_prompts_of_an_evaluation_are_kept_once_and_given_back(
    bench: Any, control: Any
) -> None:
    entry = {"name": "e", "deployment": "d1", "identity": "s", "promptTokens": [[1, 2], [3]]}
    path = "/v1/accounts/local/evaluations"
    first = await control.call("POST", path, entry)
    await control.call("POST", path, entry)
    assert (first["numPrompts"], first["promptTokens"]) == (2, [])
    assert await control.call("GET", f"{path}/{first['id']}") == first
    prompts = await control.call("GET", f"{path}/{first['id']}/prompts")
    assert prompts == {"sha256": first["promptTokensSha256"], "promptTokens": [[1, 2], [3]]}
    (kept,) = bench.home.prompt_sets.iterdir()
    kept.write_text("[[1,2],[4]]")
    damaged = await control.call("GET", f"{path}/{first['id']}/prompts", expect=500)
    assert damaged["error"]["code"] == "digest_mismatch"
    kept.unlink()
    gone = await control.call("GET", f"{path}/{first['id']}/prompts", expect=400)
    assert "is gone" in gone["error"]["message"]
    without = await control.call("POST", path, {**entry, "promptTokens": []})
    refused = await control.call("GET", f"{path}/{without['id']}/prompts", expect=400)
    assert "without its prompts" in refused["error"]["message"]
    await control.call("GET", f"{path}/evaluation-none", expect=404)
