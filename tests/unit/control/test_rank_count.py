"""How many ranks a job gets: of its shape, of its request, and what is refused by field."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from homefire.control.capacity import threads_per_engine
from homefire.control.catalog import CatalogEntry
from homefire.control.rank_count import rank_count
from homefire.control.shapes import Shape, find_shape
from homefire.wire.errors import HomefireError, InvalidArgument, Unsupported
from homefire.wire.resources import TrainerJobRequest, TrainingConfig
from homefire.wire.specs import TrainerSpec

ENTRIES = [CatalogEntry("accounts/local/models/tiny", "built-in")]
JOBS = "/v1/accounts/local/rlorTrainerJobs"
H200 = "NVIDIA_H200_141GB"


def request(count: int | None = None, kind: str | None = None, **more: Any) -> TrainerJobRequest:
    training = TrainingConfig(accelerator_count=count, accelerator_type=kind)
    return TrainerJobRequest(training_config=training, **more)


def shape(name: str) -> Shape:
    return find_shape(f"accounts/local/trainingShapes/{name}", "local", ENTRIES)


@pytest.mark.parametrize(
    ("asked", "named", "ranks"),
    [
        (request(), None, 1),
        (request(2), None, 2),
        (request(2, "CPU", node_count=1), None, 2),
        (request(8, H200), None, 1),
        (request(8, H200, node_count=4), None, 1),
        (request(), "tiny-full-x2", 2),
        (request(2), "tiny-full-x2", 2),
        (request(8, H200), "tiny-full-x2", 2),
    ],
)
def test_a_count_of_what_the_machine_has_is_the_number_of_ranks(
    asked: TrainerJobRequest, named: str | None, ranks: int
) -> None:
    assert rank_count(asked, shape(named) if named else None) == ranks


@pytest.mark.parametrize(
    ("asked", "named", "error", "field"),
    [
        (request(0), None, InvalidArgument, "trainingConfig.acceleratorCount"),
        (request(65), None, InvalidArgument, "trainingConfig.acceleratorCount"),
        (request(2, node_count=2), None, Unsupported, "nodeCount"),
        (request(4), "tiny-full-x2", InvalidArgument, "trainingConfig.acceleratorCount"),
        (request(), "tiny-full-x0", InvalidArgument, "trainingShape"),
        (request(), "tiny-full-x65", InvalidArgument, "trainingShape"),
    ],
)
def test_what_cannot_be_is_refused_by_field_with_a_remedy(
    asked: TrainerJobRequest, named: str | None, error: type[HomefireError], field: str
) -> None:
    with pytest.raises(error) as refused:
        rank_count(asked, shape(named) if named else None)
    assert refused.value.field == field
    assert refused.value.hint


def spec_of(bench: Any, job: str) -> TrainerSpec:
    return msgspec.json.decode(bench.launcher.process(f"trainer {job}").spec.spec, type=TrainerSpec)


async def test_a_job_of_two_ranks_takes_the_threads_of_two_and_says_so(
    bench: Any, control: Any
) -> None:
    job = await control.create_job(trainingConfig={"acceleratorCount": 2})
    assert (job["engineRanks"], job["status"]["message"]) == (2, "")
    await control.job_becomes("JOB_STATE_RUNNING")
    spec = spec_of(bench, "j1")
    assert (spec.ranks, spec.threads) == (2, max(1, threads_per_engine() // 2))
    report = await control.call("GET", "/v1/homefire/status")
    assert report["jobs"][0]["ranks"] == 2
    assert report["capacity"]["threadsUsed"] == 2 * spec.threads


async def test_a_shape_asks_for_ranks(bench: Any, control: Any) -> None:
    name = "accounts/local/trainingShapes/tiny-full-x2"
    profile = await control.call("GET", f"/v1/{name}/versions?pageSize=1")
    assert profile["trainingShapeVersions"][0]["snapshot"]["acceleratorCount"] == 2
    path = f"{JOBS}?rlorTrainerJobId=j2&trainingShape={name}/versions/v1"
    await control.call("POST", path, {})
    await control.job_becomes("JOB_STATE_RUNNING", "j2")
    assert spec_of(bench, "j2").ranks == 2


async def test_more_ranks_need_more_memory_and_share_it_among_smaller_batches(control: Any) -> None:
    for job, ranks in (("one", 1), ("four", 4)):
        await control.create_job(job, trainingConfig={"acceleratorCount": ranks})
    one, four = [(await control.plane.jobs.get("local", job)).config for job in ("one", "four")]
    assert four.need.memory_bytes > 3 * (400 << 20) > one.need.memory_bytes
    assert four.micro_batch_tokens <= one.micro_batch_tokens


async def test_ranks_that_do_not_fit_now_wait_and_say_for_what(bench: Any) -> None:
    each = max(1, threads_per_engine() // 2)
    control = await bench.control(threads=3 * each)
    await control.create_job("first", trainingConfig={"acceleratorCount": 2})
    waiting = await control.create_job("second", trainingConfig={"acceleratorCount": 2})
    assert waiting["state"] == "JOB_STATE_PENDING"
    assert waiting["status"]["message"] == (
        f"waiting for {2 * each} engine threads: {each} of {3 * each} are free"
    )
    await control.call("DELETE", f"{JOBS}/first")
    await control.job_becomes("JOB_STATE_RUNNING", "second")


@pytest.mark.parametrize("shape_name", [None, "accounts/local/trainingShapes/tiny-full-x64"])
async def test_ranks_that_never_fit_are_refused_by_field(control: Any, shape_name: str) -> None:
    count = None if shape_name else 64
    path = f"{JOBS}?trainingShape={shape_name}" if shape_name else JOBS
    body = {"trainingConfig": {"baseModel": "tiny", "acceleratorCount": count}}
    refused = (await control.call("POST", path, body, expect=400))["error"]
    assert refused["code"] == "failed_precondition"
    assert refused["param"] == (
        "trainingShape" if shape_name else "trainingConfig.acceleratorCount"
    )
    assert "fewer ranks" in refused["hint"]


async def test_a_hosted_shape_that_counts_accelerators_says_that_they_are_not_here(
    bench: Any,
) -> None:
    alias = {"accounts/fireworks/models/qwen3-8b": "tiny"}
    control = await bench.control(aliases=alias)
    shape_name = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200-x8"
    job = await control.call("POST", f"{JOBS}?trainingShape={shape_name}", {})
    assert job["engineRanks"] == 1
    assert "counts 8 accelerators of the hosted service" in job["status"]["message"]
