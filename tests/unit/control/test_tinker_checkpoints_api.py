"""Checkpoints of training runs over `/api/v1`: listed, changed, copied and deleted by their owner."""

from __future__ import annotations

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey
from homefire.checkpoints.expiry import GRACE_S
from homefire.foundation.clock import rfc3339
from homefire.foundation.events import EventLog

from .root_plane import JOB, LORA, RUN, SESSION

SAMPLER, STATE, EXTERNAL = CheckpointFamily
CHECKPOINTS = f"training_runs/{RUN}/checkpoints"
OTHERS = {"x-homefire-account": "other"}


async def test_a_runs_checkpoints_of_all_kinds_newest_first(root):
    state = root.save("step-1", metadata={"note": "first"})
    root.save("step-1", SAMPLER)
    root.save("step-1", EXTERNAL, expires_at=root.clock.now() + 7200.0)
    found = await root.call("GET", CHECKPOINTS)
    assert [c["checkpoint_id"] for c in found["checkpoints"]] == [
        "external_weights/step-1",
        "sampler_weights/step-1",
        "weights/step-1",
    ]
    assert [c["checkpoint_type"] for c in found["checkpoints"]] == [
        "external",
        "sampler",
        "training",
    ]
    assert found["checkpoints"][-1] == {
        "checkpoint_id": "weights/step-1",
        "checkpoint_type": "training",
        "time": rfc3339(state.created_at),
        "tinker_path": f"tinker://{RUN}/weights/step-1",
        "size_bytes": state.size_bytes,
        "public": False,
        "user_metadata": {"note": "first"},
        "expires_at": None,
    }
    assert found["checkpoints"][0]["expires_at"] == rfc3339(root.clock.now() + 7200.0 - 1.0)


async def test_checkpoints_of_all_runs_come_in_pages_that_fit_together(root):
    other = f"{SESSION}:train:1"
    await root.run(other)
    for number in range(5):
        root.save(f"s{number}", run=(RUN, other)[number % 2])
    pages = [await root.call("GET", f"checkpoints?limit=2&offset={o}") for o in (0, 2, 4, 6)]
    names = [[c["checkpoint_id"].rpartition("/")[2] for c in p["checkpoints"]] for p in pages]
    assert names == [["s4", "s3"], ["s2", "s1"], ["s0"], []]
    assert pages[1]["cursor"] == {"offset": 2, "limit": 2, "total_count": 5}
    assert (await root.call("GET", "checkpoints"))["cursor"]["limit"] == 100


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=1001", "limit"),
        ("limit=many", "limit"),
        ("offset=-1", "offset"),
        ("offset=1.5", "offset"),
    ],
)
@pytest.mark.parametrize("path", ["checkpoints", "training_runs", "sessions"])
async def test_a_window_that_makes_no_sense_is_refused_by_its_field(root, path, query, field):
    refused = await root.call("GET", f"{path}?{query}", expect=400)
    assert refused["error"]["param"] == field


async def test_a_snapshot_that_only_its_sampling_session_knows_is_in_no_list(root):
    root.save("step-1", SAMPLER)
    root.save("ephemeral-000007-0123abcd", SAMPLER)
    assert await root.names() == ["sampler_weights/step-1"]
    assert (await root.call("GET", "checkpoints"))["cursor"]["total_count"] == 1
    described = await root.call("GET", f"training_runs/{RUN}")
    assert described["last_sampler_checkpoint"]["checkpoint_id"] == "sampler_weights/step-1"


@pytest.mark.parametrize(
    ("release", "count"),
    [("0.15.0", 2), ("0.27.3", 2), ("0.28.0", 3), ("0.38.0", 3), ("1.0", 3), ("", 3), ("x", 3)],
)
async def test_external_weights_are_listed_for_clients_that_know_them(root, release, count):
    """Older ones validate the type and would lose the whole list."""
    for family in CheckpointFamily:
        root.save("mark", family)
    headers = {"x-stainless-package-version": release}
    of_run = await root.call("GET", CHECKPOINTS, headers=headers)
    of_all = await root.call("GET", "checkpoints?limit=1", headers=headers)
    assert len(of_run["checkpoints"]) == count
    assert of_all["cursor"]["total_count"] == count


async def test_an_expired_checkpoint_is_gone_for_every_call(root):
    root.save("mark", expires_at=root.clock.now() + 3601.0)
    assert await root.names() == ["weights/mark"]
    root.clock.advance(3600.0)
    assert await root.names() == []
    for method, tail in (("DELETE", ""), ("POST", "/publish"), ("GET", "/archive")):
        await root.call(method, f"{CHECKPOINTS}/weights/mark{tail}", expect=404)
    body = {"tinker_path": f"tinker://{RUN}/weights/mark"}
    await root.call("POST", "weights_info", body, expect=404)
    root.clock.advance(GRACE_S)
    (pruned,) = await root.control.plane.deletion.prune()
    assert pruned.name == "mark"


async def test_a_ttl_counts_from_now_and_is_taken_back_by_null(root):
    root.save("mark")
    path = f"{CHECKPOINTS}/weights/mark/ttl"

    async def expires_at():
        return (await root.call("GET", CHECKPOINTS))["checkpoints"][0]["expires_at"]

    await root.call("PUT", path, {"ttl_seconds": 3600})
    assert await expires_at() == rfc3339(root.clock.now() + 3600.0)
    root.clock.advance(1800.0)
    await root.call("PUT", path, {"ttl_seconds": 7200})
    assert await expires_at() == rfc3339(root.clock.now() + 7200.0)
    await root.call("PUT", path, {"ttl_seconds": None})
    assert await expires_at() is None


@pytest.mark.parametrize("body", [{"ttl_seconds": 3599}, {"ttl_seconds": 315360001}, {}])
async def test_a_ttl_out_of_range_or_missing_names_the_field_and_changes_nothing(root, body):
    root.save("mark")
    refused = await root.call("PUT", f"{CHECKPOINTS}/weights/mark/ttl", body, expect=400)
    assert refused["error"]["param"] == "ttl_seconds"
    assert (await root.call("GET", CHECKPOINTS))["checkpoints"][0]["expires_at"] is None


async def test_publishing_twice_is_once_and_is_undone(root):
    root.save("mark")
    for method, public in (("POST", True), ("POST", True), ("DELETE", False), ("DELETE", False)):
        await root.call(method, f"{CHECKPOINTS}/weights/mark/publish")
        (found,) = (await root.call("GET", CHECKPOINTS))["checkpoints"]
        assert found["public"] is public


async def test_deleting_takes_exactly_one(root):
    root.save("mark")
    root.save("mark", SAMPLER)
    await root.call("DELETE", f"{CHECKPOINTS}/weights/mark")
    assert await root.names() == ["sampler_weights/mark"]
    await root.call("DELETE", f"{CHECKPOINTS}/weights/mark", expect=404)


@pytest.mark.parametrize("name", ["mark", "checkpoints/mark", "Weights/mark"])
async def test_a_name_without_its_kind_is_refused_and_nothing_is_deleted(root, name):
    root.save("mark")
    refused = await root.call("DELETE", f"{CHECKPOINTS}/{name}", expect=400)
    assert refused["error"]["param"] == "checkpoint_id"
    assert "weights/<name>" in refused["error"]["hint"]
    assert await root.names() == ["weights/mark"]


async def test_a_state_that_the_pool_may_load_again_stays(root):
    """Its trainer's journal leads to it, from behind the recovery points."""
    root.save("mark")
    events = EventLog(root.bench.home.job(JOB) / "events.jsonl", root.clock)
    events.append("state_loaded", model_id=RUN, name=f"tinker://{RUN}/weights/mark")
    events.close()
    refused = await root.call("DELETE", f"{CHECKPOINTS}/weights/mark", expect=400)
    assert refused["error"]["code"] == "failed_precondition"
    assert JOB in refused["error"]["message"]
    assert await root.names() == ["weights/mark"]


async def test_another_account_sees_and_changes_nothing(root):
    """In the same words as for what never was, so that nothing leaks."""
    root.save("mark")
    calls = [
        ("GET", "", None),
        ("DELETE", "/weights/mark", None),
        ("POST", "/weights/mark/publish", None),
        ("DELETE", "/weights/mark/publish", None),
        ("PUT", "/weights/mark/ttl", {"ttl_seconds": 3600}),
        ("GET", "/weights/mark/archive", None),
    ]
    missing = "ts-00000000000000ff:train:0"
    for method, tail, body in calls:
        path = f"training_runs/{RUN}/checkpoints{tail}"
        foreign = await root.call(method, path, body, expect=404, headers=OTHERS)
        unknown = await root.call(
            method, path.replace(RUN, missing), body, expect=404, headers=OTHERS
        )
        words = foreign["error"]["message"], unknown["error"]["message"]
        assert words[0].replace(RUN, missing) == words[1]
    everything = await root.call("GET", "checkpoints", headers=OTHERS)
    assert everything["checkpoints"] == []
    assert await root.names() == ["weights/mark"]


async def test_weights_info_tells_how_to_make_a_model_for_the_checkpoint(root):
    root.save("mark")
    root.save("mark", SAMPLER)
    for kind in ("weights", "sampler_weights"):
        body = {"tinker_path": f"tinker://{RUN}/{kind}/mark"}
        assert await root.call("POST", "weights_info", body) == {
            "base_model": "tiny",
            "is_lora": True,
            "lora_rank": LORA.rank,
            "train_unembed": False,
            "train_mlp": True,
            "train_attn": True,
        }
    refused = await root.call("POST", "weights_info", {"tinker_path": "mark"}, expect=400)
    assert refused["error"]["param"] == "tinker_path"


async def test_weights_info_of_all_parameters_says_rank_0(root, bench):
    run = f"{SESSION}:train:1"
    await root.run(run, lora_rank=0, base_model="accounts/fireworks/models/qwen3-8b")
    bench.save_state("mark", job=JOB, slot=run)
    body = {"tinker_path": f"tinker://{run}/weights/mark"}
    described = await root.call("POST", "weights_info", body)
    assert described["base_model"] == "accounts/fireworks/models/qwen3-8b"
    assert (described["is_lora"], described["lora_rank"]) == (False, 0)


async def test_weights_info_of_a_dedicated_jobs_state(root, bench):
    """Clients before 0.25 ask for it before they resume at the root from a job's checkpoint."""
    await root.control.create_job("j2")
    bench.save_state("mark", job="j2")
    body = {"tinker_path": "tinker://j2-s0123abcd:train:0/weights/mark"}
    assert (await root.call("POST", "weights_info", body))["base_model"].endswith("tiny")
    await root.call("POST", "weights_info", body, expect=404, headers=OTHERS)
    missing = {"tinker_path": body["tinker_path"].replace("mark", "nope")}
    await root.call("POST", "weights_info", missing, expect=404)


async def test_a_published_checkpoint_can_be_described_by_others(root):
    root.save("mark")
    body = {"tinker_path": f"tinker://{RUN}/weights/mark"}
    hidden = await root.call("POST", "weights_info", body, expect=404, headers=OTHERS)
    gone = {"tinker_path": f"tinker://{RUN}/weights/nope"}
    unknown = await root.call("POST", "weights_info", gone, expect=404, headers=OTHERS)
    assert hidden["error"]["message"] == unknown["error"]["message"]
    await root.call("POST", f"{CHECKPOINTS}/weights/mark/publish")
    described = await root.call("POST", "weights_info", body, headers=OTHERS)
    assert described["lora_rank"] == LORA.rank


# Copies -----------------------------------------------------------------------------------------


async def copy(root, *, expect=200, key="", **body):
    request = {"source_path": f"tinker://{RUN}/weights/mark", **body}
    return await root.call(
        "POST", "copy_weights", request, expect=expect, headers={"x-idempotency-key": key}
    )


async def test_a_copy_into_a_project_is_a_run_of_its_own(root):
    root.save("mark", metadata={"note": "kept"})
    copied = (await copy(root, destination_project_id="archive", ttl_seconds=3600))["tinker_path"]
    run = copied.removeprefix("tinker://").partition("/")[0]
    assert run != RUN
    (found,) = (await root.call("GET", f"training_runs/{run}/checkpoints"))["checkpoints"]
    assert (found["tinker_path"], found["user_metadata"]) == (copied, {"note": "kept"})
    assert found["expires_at"] == rfc3339(root.clock.now() + 3600.0)
    listed = await root.call("GET", "training_runs?project_id=archive")
    assert [r["training_run_id"] for r in listed["training_runs"]] == [run]
    await root.call("DELETE", f"{CHECKPOINTS}/weights/mark")
    key = CheckpointKey("local", JOB, run, STATE, "mark")
    assert root.store.manifest(key).files.keys() == {"weights.safetensors", "optimizer.safetensors"}
    assert (await root.call("POST", "weights_info", {"tinker_path": copied}))["lora_rank"] == 2


async def test_a_copy_that_is_asked_for_again_is_the_same_copy(root):
    root.save("mark")
    first = await copy(root, destination_project_id="archive", key="k1")
    assert await copy(root, destination_project_id="archive", key="k1") == first
    assert await copy(root, destination_project_id="archive", key="k2") != first
    assert (await root.call("GET", "training_runs?project_id=archive"))["cursor"][
        "total_count"
    ] == 2


async def test_a_copy_into_a_session_takes_the_models_place(root):
    root.save("mark")
    copied = await copy(root, session_id=SESSION, model_seq_id=7)
    assert copied == {"tinker_path": f"tinker://{SESSION}:train:7/weights/mark"}
    assert await copy(root, session_id=SESSION, model_seq_id=7) == copied
    refused = await copy(root, session_id=SESSION, model_seq_id=0, expect=400)
    assert refused["error"]["param"] == "model_seq_id"
    assert await root.names() == ["weights/mark"]


@pytest.mark.parametrize(
    ("body", "field", "status"),
    [
        ({}, "destination_project_id", 400),
        ({"session_id": SESSION}, "destination_project_id", 400),
        ({"model_seq_id": 1}, "destination_project_id", 400),
        (
            {"session_id": SESSION, "model_seq_id": 1, "destination_project_id": "p"},
            "destination_project_id",
            400,
        ),
        ({"session_id": SESSION, "model_seq_id": -1}, "model_seq_id", 400),
        ({"session_id": "ts-00000000000000ff", "model_seq_id": 1}, "session_id", 404),
        ({"destination_project_id": "p", "ttl_seconds": 5}, "ttl_seconds", 400),
        (
            {"destination_project_id": "p", "weights_access_token": "t"},
            "weights_access_token",
            400,
        ),
        (
            {"destination_project_id": "p", "source_path": f"tinker://{RUN}/weights/nope"},
            "checkpoint_id",
            404,
        ),
        (
            {"destination_project_id": "p", "source_path": f"tinker://{RUN}/external_weights/mark"},
            "source_path",
            400,
        ),
        ({"destination_project_id": "p", "source_path": "mark"}, "source_path", 400),
    ],
)
async def test_a_copy_that_cannot_be_made_names_the_field_and_leaves_no_run(
    root, body, field, status
):
    root.save("mark")
    root.save("mark", EXTERNAL)
    refused = await copy(root, expect=status, **body)
    assert refused["error"]["param"] == field
    assert (await root.call("GET", "training_runs"))["cursor"]["total_count"] == 1


async def test_a_delta_is_not_copied(root, bench):
    base = bench.save_snapshot("a", job=JOB, slot=RUN)
    bench.save_snapshot("b", job=JOB, slot=RUN, parent=base)
    path = f"tinker://{RUN}/sampler_weights/b"
    refused = await copy(root, expect=400, source_path=path, destination_project_id="p")
    assert "delta of 'a'" in refused["error"]["message"]
    assert (await root.call("GET", "training_runs"))["cursor"]["total_count"] == 1
