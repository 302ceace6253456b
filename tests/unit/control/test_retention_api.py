"""Retention over HTTP: a job's policy, pins, and pruning by a launched worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints.removal import run_removal
from homefire.foundation.events import EventLog

JOB = "/v1/accounts/local/rlorTrainerJobs/j1"


@pytest.fixture
async def trained(bench: Any, control: Any) -> Any:
    """Six snapshots, the third a delta of the second; workers do their work when they are started."""
    await control.create_job()
    bench.save_snapshot("s1", step=1)
    parent = bench.save_snapshot("s2", step=2)
    bench.save_snapshot("s3", step=3, parent=parent)
    for step in (4, 5, 6):
        bench.save_snapshot(f"s{step}", step=step)
    bench.launcher._on_start = lambda process: work(bench, process)
    return control


def work(bench: Any, process: Any) -> None:
    if process.spec.module != "homefire.checkpoints":
        bench.services.serve(process)
        return
    assert process.spec.arguments == ("remove",)
    spec_file = Path(process.spec.spec_file)
    spec_file.parent.mkdir(parents=True, exist_ok=True)
    spec_file.write_bytes(process.spec.spec)
    process.exit(run_removal(spec_file))


async def names(control: Any) -> list[str]:
    rows = (await control.call("GET", f"{JOB}/checkpoints"))["checkpoints"]
    return [row["name"].rpartition("/")[2] for row in rows]


async def test_a_dry_run_says_what_would_go_and_why_and_touches_nothing(trained: Any) -> None:
    report = await trained.call(
        "POST", f"{JOB}/checkpoints:prune", {"dryRun": True, "policy": {"keepLast": 2}}
    )
    assert [r["checkpoint"] for r in report["checkpoints"] if not r["keep"]] == [
        "s1", "s2", "s3", "s4",
    ]  # fmt: skip
    rows = {r["checkpoint"]: r["why"] for r in report["checkpoints"]}
    assert rows["s1"] == ["no rule keeps it and nothing rests on it"]
    assert rows["s6"] == ["one of the last 2", "the newest"]
    assert report["freedBytes"] > 0
    assert await names(trained) == ["s1", "s2", "s3", "s4", "s5", "s6"]


async def test_the_policy_of_a_job_is_kept_shown_and_applied(bench: Any, trained: Any) -> None:
    assert (await trained.call("GET", f"{JOB}/retention"))["keepLast"] is None
    await trained.call("PUT", f"{JOB}/retention", {"keepLast": 1, "keepEvery": 3})
    assert (await trained.call("GET", JOB))["retention"]["keepEvery"] == 3
    await trained.call("POST", f"{JOB}/checkpoints/s1:pin")
    assert (await trained.call("GET", f"{JOB}/checkpoints"))["checkpoints"][0]["pinned"] is True
    await trained.plane.retention.apply_policies()
    assert await names(trained) == ["s1", "s2", "s3", "s6"]
    assert len(bench.launcher.started) == 2  # the trainer and one worker


async def test_what_is_served_evaluated_or_recovered_from_stays(bench: Any, trained: Any) -> None:
    await trained.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    headers = {"fireworks-deployment": "accounts/local/deployments/d1"}
    await trained.call("POST", "/hot_load/v1/models/hot_load", {"identity": "s1"}, headers=headers)
    entry = {"name": "held-out", "deployment": "d1", "identity": "s4", "job": "j1"}
    await trained.call("POST", "/v1/accounts/local/evaluations", entry)
    bench.save_state("mark")
    bench.save_state("later")
    events = EventLog(bench.home.job("j1") / "events.jsonl", bench.clock)
    events.append("state_loaded", model_id="m", name="mark")
    events.close()
    report = await trained.call("POST", f"{JOB}/checkpoints:prune", {"policy": {"keepLast": 1}})
    rows = {r["checkpoint"]: r["why"][-1] for r in report["checkpoints"] if r["keep"]}
    assert "deployment 'd1' serves" in rows["s1"]
    assert rows["s4"] == "it was evaluated"
    assert "needed by job 'j1'" in rows["mark"]
    assert await names(trained) == ["s1", "s4", "s6", "mark", "later"]


async def test_a_pinned_checkpoint_is_deleted_only_after_it_is_unpinned(trained: Any) -> None:
    await trained.call("POST", f"{JOB}/checkpoints/s4:pin")
    refused = await trained.call("DELETE", f"{JOB}/checkpoints/s4", expect=400)
    assert "is pinned" in refused["message"]
    await trained.call("POST", f"{JOB}/checkpoints/s4:unpin")
    await trained.call("DELETE", f"{JOB}/checkpoints/s4")
    await trained.call("POST", f"{JOB}/checkpoints/nope:pin", expect=404)


async def test_a_deleted_jobs_checkpoints_stay_for_a_retention_time(
    bench: Any, trained: Any
) -> None:
    await trained.call("POST", f"{JOB}/checkpoints/s5:pin")
    await trained.call("DELETE", JOB)
    await trained.job_becomes("JOB_STATE_DELETED")
    bench.clock.advance(29 * 86400.0)
    await trained.plane.retention.apply_policies()
    assert len(await names(trained)) == 6
    bench.clock.advance(2 * 86400.0)
    await trained.plane.retention.apply_policies()
    assert await names(trained) == ["s5"]


async def test_a_worker_that_dies_is_reported_with_its_log(bench: Any, trained: Any) -> None:
    bench.launcher._on_start = lambda process: process.exit(1, log=["no space"])
    body = {"policy": {"keepLast": 1}}
    failed = await trained.call("POST", f"{JOB}/checkpoints:prune", body, expect=500)
    assert "no space" in failed["error"]["hint"]
    assert len(await names(trained)) == 6


@pytest.mark.parametrize(
    ("policy", "named"),
    [({"keepLast": 0}, "retention.keepLast"), ({"keepLats": 3}, "keepLats")],
)
async def test_a_policy_that_makes_no_sense_is_refused(
    control: Any, policy: Any, named: str
) -> None:
    refused = await control.create_job(expect=400, retention=policy)
    assert named in refused["error"]["message"]
    await control.create_job()
    await control.call("PUT", f"{JOB}/retention", policy, expect=400)


async def test_a_job_is_created_with_a_policy(control: Any) -> None:
    job = await control.create_job(retention={"keepBest": "reward", "ttlSeconds": 3600})
    assert job["retention"]["keepBest"] == "reward"


async def test_what_begins_to_be_served_meanwhile_stays_and_what_goes_cannot_be_served(
    bench: Any, trained: Any
) -> None:
    """s1 is asked for between the decision and its barrier, s4 while the worker deletes it."""
    await trained.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    headers = {"fireworks-deployment": "accounts/local/deployments/d1"}

    async def load(identity: str) -> Any:
        body = {"identity": identity}
        path = "/hot_load/v1/models/hot_load"
        return await trained.client.post(path, json=body, headers=headers)

    retention = trained.plane.retention
    decided = 0
    decide = type(retention)._decide

    async def decide_slowly(*arguments: Any) -> Any:
        nonlocal decided
        decided += 1
        verdicts = await decide(retention, *arguments)
        if decided == 1:
            assert (await load("s1")).status_code == 200
        return verdicts

    object.__setattr__(retention, "_decide", decide_slowly)
    bench.launcher._on_start = None
    pruning = asyncio.create_task(
        trained.call("POST", f"{JOB}/checkpoints:prune", {"policy": {"keepLast": 1}})
    )
    while not bench.launcher.running("retention j1"):
        await asyncio.sleep(0)
    refused = await load("s4")
    assert refused.status_code >= 400
    assert "is being pruned" in refused.text
    work(bench, bench.launcher.process("retention j1"))
    report = await pruning
    assert [r["checkpoint"] for r in report["checkpoints"] if r["keep"]] == ["s1", "s6"]
    assert (await load("s6")).status_code == 200
    assert await names(trained) == ["s1", "s6"]


async def test_what_is_being_promoted_stays(bench: Any, trained: Any) -> None:
    bench.launcher._on_start = None
    promoting = asyncio.create_task(
        trained.call(
            "POST",
            "/v1/accounts/local/checkpoints/s1:promote",
            {"output_model": "best", "trainer_job_id": "j1"},
        )
    )
    while not bench.launcher.running("promotion best"):
        await asyncio.sleep(0)
    body = {"policy": {"keepLast": 1}, "dryRun": True}
    report = await trained.call("POST", f"{JOB}/checkpoints:prune", body)
    why = {r["checkpoint"]: r["why"] for r in report["checkpoints"]}
    assert why["s1"] == ["snapshot 's1' is being promoted to model 'best'"]
    promoting.cancel()
    await asyncio.gather(promoting, return_exceptions=True)
