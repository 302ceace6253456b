from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from homefire.checkpoints import CheckpointKey, PromoteSpec, ensure_tiny
from homefire.checkpoints.progress import read_progress, report_to
from homefire.checkpoints.promote import run_worker
from homefire.control.db import tables

JOB = "accounts/local/rlorTrainerJobs/j1"


@pytest.fixture
async def trained(bench: Any, control: Any) -> Any:
    """A job with a base and a delta; workers run in a thread when they are started."""
    await control.create_job()
    base = bench.save_snapshot("step_1")
    bench.save_snapshot("step_2", parent=base, step=2)
    bench.launcher._on_start = lambda process: work(bench, process)
    return control


def work(bench: Any, process: Any) -> None:
    """The real worker's work, in this process."""
    if process.spec.module != "homefire.checkpoints":
        bench.services.serve(process)
        return
    assert process.spec.arguments == ("promote",)
    spec_file = Path(process.spec.spec_file)
    spec_file.parent.mkdir(parents=True, exist_ok=True)
    spec_file.write_bytes(process.spec.spec)
    process.exit(run_worker(spec_file))


async def promote(
    control: Any, checkpoint: str, model: str = "best", *, expect: int = 200, **body: Any
) -> Any:
    return await control.call(
        "POST",
        f"/v1/accounts/local/checkpoints/{checkpoint}:promote",
        {
            "output_model": f"accounts/local/models/{model}",
            "trainer_job_id": JOB,
            "base_model": "tiny",
            **body,
        },
        expect=expect,
    )


@pytest.mark.parametrize("checkpoint", ["step_1", "step_2"])
async def test_a_base_and_a_delta_become_models_that_can_be_trained_and_deleted(
    bench: Any, trained: Any, checkpoint: str
) -> None:
    model = (await promote(trained, checkpoint))["model"]
    assert (model["name"], model["state"]) == ("accounts/local/models/best", "READY")
    assert model["kind"] == "HF_BASE_MODEL"
    assert model["checkpoint"] == checkpoint
    assert model["baseModelDetails"]["moe"] is False
    directory = bench.home.models / "local" / "best"
    assert (directory / "config.json").is_file()

    await trained.create_job("j2", trainingConfig={"baseModel": model["name"]})
    refused = await trained.call("DELETE", f"/v1/{model['name']}", expect=400)
    assert "job j2" in refused["message"]
    await trained.call("DELETE", "/v1/accounts/local/rlorTrainerJobs/j2")
    await trained.job_becomes("JOB_STATE_DELETED", "j2")
    assert await trained.call("DELETE", f"/v1/{model['name']}") == {}
    assert not directory.exists()
    await trained.call("GET", f"/v1/{model['name']}", expect=404)


async def test_a_snapshot_of_a_deleted_job_can_still_be_promoted(trained: Any) -> None:
    await trained.call("DELETE", "/v1/accounts/local/rlorTrainerJobs/j1")
    await trained.job_becomes("JOB_STATE_DELETED")
    assert (await promote(trained, "step_1"))["model"]["state"] == "READY"


async def test_a_promotion_asked_for_again_gives_the_same_model(bench: Any, trained: Any) -> None:
    first = await promote(trained, "step_1")
    assert await promote(trained, "step_1") == first
    workers = [p for p in bench.launcher.started if p.spec.module == "homefire.checkpoints"]
    assert len(workers) == 1
    refused = await promote(trained, "step_2", expect=409)
    assert "promoted from checkpoint 'step_1'" in refused["message"]


@pytest.fixture
async def impatient(bench: Any) -> Any:
    """A control plane that holds nothing, with a job, and workers that never end by themselves."""
    control = await bench.control(hold_s=0.0)
    await control.create_job()
    bench.save_snapshot("step_1")
    bench.launcher._on_start = None
    return control


async def test_an_asynchronous_promotion_that_is_quick_is_done_in_its_answer(trained: Any) -> None:
    """Its client would sleep for 10 s before it asks again."""
    operation = (await promote(trained, "step_1", async_promotion=True))["operation"]
    assert operation["done"] is True
    assert operation["response"]["name"] == "accounts/local/models/best"


async def test_a_promotion_that_was_asked_about_is_held_until_it_is_done(
    bench: Any, trained: Any
) -> None:
    bench.launcher._on_start = None
    waiting = asyncio.create_task(promote(trained, "step_1", async_promotion=True))
    await _worker_is_started(bench)
    (model,) = await trained.plane.database.transact(tables.models)
    held = asyncio.create_task(trained.call("GET", f"/v1/{model.operation}"))
    await asyncio.sleep(0)
    assert not held.done()
    work(bench, bench.launcher.process("promotion best"))
    assert (await held)["done"] is (await waiting)["operation"]["done"] is True


async def test_an_asynchronous_promotion_is_an_operation_that_can_be_followed(
    bench: Any, impatient: Any
) -> None:
    trained = impatient
    answer = await promote(trained, "step_1", async_promotion=True)
    operation = answer["operation"]
    assert operation.get("done") is False
    found = await trained.call("GET", f"/v1/{operation['name']}")
    assert found["done"] is False
    waiting = asyncio.create_task(promote(trained, "step_1"))
    await _worker_is_started(bench)
    work(bench, bench.launcher.process("promotion best"))
    assert (await waiting)["model"]["state"] == "READY"
    done = await trained.call("GET", f"/v1/{operation['name']}")
    assert done["done"] is True
    assert done["response"]["name"] == "accounts/local/models/best"


async def _worker_is_started(bench: Any) -> None:
    async with asyncio.timeout(20):
        while not bench.launcher.running("promotion best"):
            await asyncio.sleep(0)


async def test_a_worker_that_outlives_control_is_found_and_waited_for_by_the_next(
    bench: Any, impatient: Any
) -> None:
    control = impatient
    answer = await promote(control, "step_1", async_promotion=True)
    await _worker_is_started(bench)
    await control.close()
    control = await bench.control()
    work(bench, bench.launcher.process("promotion best"))
    assert (await promote(control, "step_1"))["model"]["state"] == "READY"
    operation = await control.call("GET", f"/v1/{answer['operation']['name']}")
    assert operation["done"] is True
    assert len([p for p in bench.launcher.started if "promotion" in p.spec.name]) == 1


async def test_a_promotion_that_was_cut_off_by_a_clean_stop_is_done_by_the_next_control(
    bench: Any, impatient: Any
) -> None:
    control = impatient
    await promote(control, "step_1", async_promotion=True)
    await _worker_is_started(bench)
    await control.plane.stop_processes()
    assert not bench.launcher.running()
    await control.close()
    bench.launcher._on_start = lambda process: work(bench, process)
    control = await bench.control()
    assert (await promote(control, "step_1"))["model"]["state"] == "READY"


async def test_a_worker_that_dies_without_a_result_fails_the_operation_and_frees_the_name(
    bench: Any, trained: Any
) -> None:
    bench.launcher._on_start = lambda process: process.exit(-9, log=["Killed"])
    refused = await promote(trained, "step_1", expect=500)
    assert "was killed by signal 9 without a result" in refused["message"]
    bench.launcher._on_start = lambda process: work(bench, process)
    assert (await promote(trained, "step_1"))["model"]["state"] == "READY"


async def test_a_damaged_snapshot_fails_with_the_workers_words(bench: Any, trained: Any) -> None:
    directory = bench.home.store / "local" / "j1" / "policy" / "sampler" / "step_1"
    (weights,) = directory.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    answer = await promote(trained, "step_1", async_promotion=True)
    operation = await _finished(trained, answer["operation"]["name"])
    assert operation["error"]["code"] == "digest_mismatch"
    assert "response" not in operation
    await trained.call("GET", "/v1/accounts/local/models/best", expect=404)


async def _finished(control: Any, name: str) -> Any:
    async with asyncio.timeout(20):
        while True:
            operation = await control.call("GET", f"/v1/{name}")
            if operation["done"]:
                return operation


@pytest.mark.parametrize(
    ("checkpoint", "changes", "status", "code"),
    [
        ("nope", {}, 400, "unknown_snapshot"),
        ("state_1", {}, 400, "wrong_checkpoint_kind"),
        ("step_1", {"trainer_job_id": "accounts/local/rlorTrainerJobs/x"}, 404, "not_found"),
        ("step_1", {"trainer_job_id": "accounts/a/rlorTrainerJobs/j1"}, 404, "not_found"),
        ("step_1", {"output_model": "accounts/local/models/Not_Valid"}, 400, "invalid_argument"),
        ("step_1", {"output_model": "accounts/other/models/m"}, 404, "not_found"),
        ("step_1", {"output_model": "accounts/local/models/-m"}, 400, "invalid_argument"),
        ("step_1", {"base_model": "other"}, 400, "invalid_argument"),
        ("step_1", {"base_model": "nope"}, 400, "unknown_model"),
    ],
)
async def test_what_cannot_be_promoted_is_refused_at_once(
    bench: Any, trained: Any, checkpoint: str, changes: Any, status: int, code: str
) -> None:
    bench.save_state("state_1")
    ensure_tiny(bench.home.models / "other")
    refused = await promote(trained, checkpoint, expect=status, **changes)
    assert refused["error"]["code"] == code


async def test_the_worker_is_told_what_to_make_and_where(bench: Any, trained: Any) -> None:
    await promote(trained, "step_2")
    process = bench.launcher.process("promotion best")
    spec = msgspec.json.decode(process.spec.spec, type=PromoteSpec)
    assert (spec.job, spec.slot, spec.identity) == ("j1", "policy", "step_2")
    assert spec.destination == str(bench.home.models / "local" / "best")
    assert spec.base_model_dir == str(bench.home.models / "tiny")


async def test_models_are_the_built_in_ones_aliases_and_promoted_ones(bench: Any) -> None:
    control = await bench.control(aliases={"accounts/fireworks/models/qwen3-8b": "tiny"})
    listed = await control.call("GET", "/v1/accounts/local/models")
    found = {model["name"]: model["source"] for model in listed["models"]}
    assert found == {
        "accounts/local/models/tiny": "built-in",
        "accounts/fireworks/models/qwen3-8b": "alias of tiny",
    }
    aliased = await control.call("GET", "/v1/accounts/fireworks/models/qwen3-8b")
    assert aliased["baseModelDetails"]["moe"] is False
    await control.call("GET", "/v1/accounts/fireworks/models/other", expect=404)
    refused = await control.call("DELETE", "/v1/accounts/local/models/tiny", expect=400)
    assert "was not promoted here" in refused["message"]


async def test_a_snapshot_that_has_expired_is_not_promoted(bench: Any, control: Any) -> None:
    await control.create_job()
    manifest = bench.save_snapshot("step_1")
    bench.store.expire_at(CheckpointKey.of(manifest), bench.clock.now())
    refused = await promote(control, "step_1", expect=400)
    assert "has expired" in refused["error"]["message"]


async def test_an_operation_says_how_far_its_worker_is(bench: Any, impatient: Any) -> None:
    operation = (await promote(impatient, "step_1", async_promotion=True))["operation"]
    assert "progress" not in operation["metadata"]
    await _worker_is_started(bench)
    process = bench.launcher.process("promotion best")
    spec = msgspec.json.decode(process.spec.spec, type=PromoteSpec)
    Path(spec.progress_file).parent.mkdir(parents=True, exist_ok=True)
    report_to(Path(spec.progress_file))("reading the chain", 3, 7)
    shown = await impatient.call("GET", f"/v1/{operation['name']}")
    assert shown["metadata"]["progress"] == {"stage": "reading the chain", "done": 3, "total": 7}
    work(bench, process)
    finished = read_progress(Path(spec.progress_file))
    assert (finished.stage, finished.done) == ("writing the model", finished.total)
