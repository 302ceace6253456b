"""Training runs, sessions and the key over `/api/v1`."""

from __future__ import annotations

import pytest

from homefire.checkpoints import CheckpointFamily
from homefire.foundation.clock import rfc3339
from homefire.foundation.events import EventLog

from .root_plane import JOB, LORA, RUN, SESSION

SAMPLER, STATE, EXTERNAL = CheckpointFamily
OTHERS = {"x-homefire-account": "other"}
SECOND = "ts-00000000000000bb"


async def test_a_run_is_described_with_its_latest_checkpoints(root):
    root.save("one")
    state = root.save("two")
    snapshot = root.save("one", SAMPLER)
    root.save("three", EXTERNAL)
    run = f"{SESSION}:train:1"
    row = await root.run(run, user_metadata={"renderer_name": "role_colon"}, base_model="qwen3")
    described = await root.call("GET", f"training_runs/{RUN}")
    assert described["last_checkpoint"]["tinker_path"] == f"tinker://{RUN}/weights/two"
    assert described["last_checkpoint"]["time"] == rfc3339(state.created_at)
    assert described["last_sampler_checkpoint"]["time"] == rfc3339(snapshot.created_at)
    assert described["user_metadata"] is None
    assert await root.call("GET", f"training_runs/{run}") == {
        "training_run_id": run,
        "base_model": "qwen3",
        "model_owner": "local",
        "is_lora": True,
        "lora_rank": LORA.rank,
        "corrupted": False,
        "last_request_time": rfc3339(row.created_at),
        "last_checkpoint": None,
        "last_sampler_checkpoint": None,
        "user_metadata": {"renderer_name": "role_colon"},
    }


async def test_the_last_request_is_the_trainers_last_operation_of_that_run(root):
    """The gateway sends operations past control: the trainer's events know."""
    other = f"{SESSION}:train:1"
    made = await root.run(other)
    events = EventLog(root.bench.home.job(JOB) / "events.jsonl", root.clock)
    root.clock.advance(100.0)
    events.append("optim_step", model_id=RUN)
    events.close()
    runs = (await root.call("GET", "training_runs"))["training_runs"]
    assert {run["training_run_id"]: run["last_request_time"] for run in runs} == {
        RUN: rfc3339(root.clock.now()),
        other: rfc3339(made.created_at),
    }


async def test_runs_come_newest_first_in_pages(root):
    for number in range(1, 5):
        await root.run(f"{SESSION}:train:{number}")
    pages = [await root.call("GET", f"training_runs?limit=2&offset={o}") for o in (0, 2, 4)]
    numbers = [[r["training_run_id"][-1] for r in page["training_runs"]] for page in pages]
    assert numbers == [["4", "3"], ["2", "1"], ["0"]]
    assert pages[0]["cursor"] == {"offset": 0, "limit": 2, "total_count": 5}
    assert (await root.call("GET", "training_runs"))["cursor"]["limit"] == 20


async def test_a_run_of_all_parameters_has_no_rank(root):
    await root.run(f"{SESSION}:train:1", lora_rank=0)
    described = await root.call("GET", f"training_runs/{SESSION}:train:1")
    assert (described["is_lora"], described["lora_rank"]) == (False, None)


async def test_a_run_whose_trainer_failed_for_good_is_corrupted(root, bench):
    bench.services.die_at_once = ["Traceback", "MemoryError"]
    bench.trainer(JOB).process.exit(1)

    async def failed():
        return (await root.call("GET", f"training_runs/{RUN}"))["corrupted"]

    async def check():
        bench.clock.advance(20.0)
        return await failed()

    await root.control.eventually(check)


async def test_another_accounts_runs_and_sessions_do_not_exist(root):
    missing = "ts-00000000000000ff"
    for path, unknown in (
        (f"training_runs/{RUN}", f"training_runs/{missing}:train:0"),
        (f"sessions/{SESSION}", f"sessions/{missing}"),
        (f"sessions/{SESSION}/trace_export", f"sessions/{missing}/trace_export"),
    ):
        foreign = await root.call("GET", path, expect=404, headers=OTHERS)
        nothing = await root.call("GET", unknown, expect=404, headers=OTHERS)
        words = foreign["error"]["message"].replace(SESSION, missing)
        assert words == nothing["error"]["message"]
    project = {"project_id": "p"}
    await root.call("PUT", f"sessions/{SESSION}/project", project, expect=404, headers=OTHERS)
    assert (await root.call("GET", "training_runs", headers=OTHERS))["training_runs"] == []
    assert (await root.call("GET", "sessions", headers=OTHERS))["sessions"] == []
    found = await root.call("POST", "sessions/search", {}, headers=OTHERS)
    assert found["sessions"] == []


@pytest.mark.parametrize("path", ["training_runs", f"training_runs/{RUN}", "sessions"])
async def test_both_scopes_are_known_and_no_other(root, path):
    for scope in ("owned", "accessible"):
        await root.call("GET", f"{path}?access_scope={scope}")
    refused = await root.call("GET", f"{path}?access_scope=all", expect=400)
    assert refused["error"]["param"] == "access_scope"


async def test_sessions_newest_first_and_what_belongs_to_one(root):
    await root.session(SECOND, user_metadata={"seed": 3}, display_name="nightly")
    await root.run(f"{SECOND}:train:0")
    await root.run(f"{SECOND}:train:1")
    await root.sampling_session(f"{JOB}-sampler.12345678", session=SECOND)
    assert (await root.call("GET", "sessions"))["sessions"] == [SECOND, SESSION]
    assert (await root.call("GET", "sessions?limit=1&offset=1"))["sessions"] == [SESSION]
    assert await root.call("GET", f"sessions/{SECOND}") == {
        "training_run_ids": [f"{SECOND}:train:0", f"{SECOND}:train:1"],
        "sampler_ids": [f"{JOB}-sampler.12345678"],
        "user_metadata": {"seed": "3"},
        "display_name": "nightly",
    }


async def test_a_session_moves_into_a_project_with_its_runs(root):
    path = f"sessions/{SESSION}/project"
    for body in ({}, {"project_id": ""}, {"project_id": "p" * 129}):
        refused = await root.call("PUT", path, body, expect=400)
        assert refused["error"]["param"] == "project_id"
    await root.call("PUT", path, {"project_id": "first"})
    await root.call("PUT", path, {"project_id": "second"})
    for project, count in (("first", 0), ("second", 1)):
        listed = await root.call("GET", f"training_runs?project_id={project}")
        assert listed["cursor"]["total_count"] == count


async def test_a_search_counts_what_the_session_saved(root):
    manifests = [root.save("one"), root.save("one", SAMPLER)]
    await root.call("PUT", f"sessions/{SESSION}/project", {"project_id": "p"})
    (found,) = (await root.call("POST", "sessions/search", {"project_ids": ["p"]}))["sessions"]
    assert found["session_id"] == SESSION
    assert (found["owner"], found["project_id"]) == ("local", "p")
    assert found["status"] == {"type": "active"}
    assert found["checkpoints_count"] == 2
    assert found["checkpoint_storage_bytes"] == sum(m.size_bytes for m in manifests)


async def test_what_only_the_hosted_service_has_is_refused_by_name(root):
    for path, word in (
        ("audit", "audit"),
        ("billing/usage/events", "billing"),
        ("billing/usage/checkpoints/current", "billing"),
    ):
        refused = await root.call("GET", path, expect=404)
        assert word in refused["error"]["message"]
    refused = await root.call("GET", f"sessions/{SESSION}/trace_export", expect=400)
    assert refused["error"]["code"] == "unsupported"
    assert "trace_export" in refused["error"]["message"]
    assert JOB in refused["error"]["hint"]


async def test_the_key_is_described_and_not_deleted(root):
    described = await root.call("GET", "auth/apikey/me")
    assert described["key_id"] > 0
    assert described["name"] == "local"
    assert described["details"]["org_details"] == {"name": "local"}
    assert "@" in described["details"]["user_details"]["email"]
    refused = await root.call("DELETE", "auth/apikey/me", expect=403)
    assert "api_key" in refused["error"]["hint"]
    await root.call("GET", "auth/apikey/me", expect=404, headers=OTHERS)
