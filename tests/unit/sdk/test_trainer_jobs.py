from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from homefire.sdk import TrainerJobConfig, TrainerJobManager

_JOB = "/v1/accounts/local/rlorTrainerJobs/job-1"
_GET = f"GET {_JOB}"
_RESUME = f"POST {_JOB}:resume"
_HEALTH = "GET /training/v1/rlorTrainerJobs/local/job-1/api/v1/healthz"
_CREATE = "POST /v1/accounts/local/rlorTrainerJobs"
_SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"

MakeManager = Callable[[], TrainerJobManager]


def job(state: str, message: str = "") -> dict:
    return {
        "name": "accounts/local/rlorTrainerJobs/job-1",
        "state": f"JOB_STATE_{state}",
        "status": {"code": "OK", "message": message},
    }


@pytest.fixture
def manager(control, manual_time) -> TrainerJobManager:
    control.on(_HEALTH, {"status": "ok"})
    return TrainerJobManager(
        "fw_test", "http://server", waiter=manual_time.waiter, transport=control.transport
    )


def test_create_sends_the_body_that_the_fireworks_sdk_sends(control, manager):
    control.on(_CREATE, job("CREATING"))
    created = manager.create(
        TrainerJobConfig(
            base_model="accounts/fireworks/models/qwen3-8b",
            training_shape_ref=f"{_SHAPE}/versions/v1",
            lora_rank=0,
            learning_rate=1e-5,
            gradient_accumulation_steps=4,
        )
    )
    (seen,) = control.calls(_CREATE)
    assert (created.job_id, created.job_name) == ("job-1", "accounts/local/rlorTrainerJobs/job-1")
    assert seen.query["trainingShape"] == f"{_SHAPE}/versions/v1"
    assert "skipValidations" not in seen.query
    assert seen.headers["x-api-key"] == "fw_test"
    assert seen.body == {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "trainingConfig": {
            "baseModel": "accounts/fireworks/models/qwen3-8b",
            "loraRank": 0,
            "learningRate": 1e-05,
            "gradientAccumulationSteps": 4,
        },
    }


def test_create_without_a_shape_sends_the_hardware_and_skips_validation(control, manager):
    control.on(_CREATE, job("CREATING"))
    manager.create(
        TrainerJobConfig(
            base_model="accounts/fireworks/models/qwen3-8b",
            accelerator_type="NVIDIA_H200_141GB",
            accelerator_count=8,
            region="US_OHIO_1",
            forward_only=True,
        )
    )
    (seen,) = control.calls(_CREATE)
    assert seen.query["skipValidations"] == "true"
    assert seen.body == {
        "serviceMode": True,
        "keepAlive": False,
        "dataset": "",
        "trainingConfig": {
            "baseModel": "accounts/fireworks/models/qwen3-8b",
            "loraRank": 0,
            "learningRate": 1e-05,
            "gradientAccumulationSteps": 1,
            "acceleratorType": "NVIDIA_H200_141GB",
            "acceleratorCount": 8,
            "region": "US_OHIO_1",
        },
        "nodeCount": 1,
        "forwardOnly": True,
    }


def test_a_create_that_is_tried_twice_makes_one_job(control, manager):
    ids = []

    def conflict(seen):
        ids.append(seen.query["rlorTrainerJobId"])
        control.on(f"GET /v1/accounts/local/rlorTrainerJobs/{ids[0]}", job("CREATING"))
        return (409, {"code": 6, "message": "exists"})

    control.on(_CREATE, httpx.ReadTimeout("lost"), conflict)
    created = manager.create(TrainerJobConfig(base_model="tiny"))
    assert created.job_id == "job-1"
    assert {seen.query["rlorTrainerJobId"] for seen in control.calls(_CREATE)} == set(ids)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"base_model": ""}, "base_model"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"max_context_length": 0}, "max_context_length"),
        ({"training_shape_ref": _SHAPE, "accelerator_count": 8}, "accelerator_count"),
    ],
)
def test_a_bad_config_is_refused_by_field_before_any_request(control, manager, fields, named):
    with pytest.raises(ValueError, match=named):
        manager.create(TrainerJobConfig(**{"base_model": "tiny", **fields}))
    assert control.seen == []


def test_a_refused_create_shows_the_server_s_words(control, manager):
    control.on(_CREATE, (400, {"error": {"message": "unknown model 'x' (there is: tiny)"}}))
    with pytest.raises(httpx.HTTPStatusError, match=r"unknown model 'x' \(there is: tiny\)"):
        manager.create(TrainerJobConfig(base_model="x"))


def test_waiting_looks_at_once_and_then_ever_more_rarely(control, manager, manual_time):
    control.on(_GET, *[job("CREATING")] * 12, job("RUNNING"))
    endpoint = manager.wait_for_ready("job-1", poll_interval_s=1.0)
    assert endpoint.base_url == "http://server/training/v1/rlorTrainerJobs/local/job-1"
    assert manual_time.slept[:3] == pytest.approx([0.05, 0.075, 0.1125])
    assert manual_time.slept == sorted(manual_time.slept)
    assert manual_time.slept[-1] == 1.0


def test_a_running_job_is_ready_only_when_its_trainer_answers(control, manager, manual_time):
    control.on(_GET, job("RUNNING"))
    control.on(_HEALTH, (503, {}), httpx.ConnectError("refused"), {"status": "ok"})
    manager.wait_for_ready("job-1")
    assert len(control.calls(_HEALTH)) == 3
    assert len(manual_time.slept) == 2


def test_a_broken_connection_while_waiting_is_not_the_end(control, manager):
    control.on(_GET, httpx.ConnectError("refused"), (502, {}), job("RUNNING"))
    assert manager.wait_for_ready("job-1").job_id == "job-1"


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "COMPLETED", "DELETED", "EXPIRED"])
def test_waiting_for_a_job_that_ended_raises_its_reason_at_once(
    control, manager, manual_time, state
):
    control.on(_GET, job(state, "the disk is full"))
    with pytest.raises(RuntimeError, match=f"{state}: the disk is full"):
        manager.wait_for_ready("job-1")
    assert manual_time.slept == []


def test_waiting_gives_up_after_its_timeout_and_says_what_it_saw(control, manager, manual_time):
    control.on(_GET, job("PENDING", "waits for 2 threads"))
    with pytest.raises(TimeoutError, match="PENDING: waits for 2 threads"):
        manager.wait_for_ready("job-1", timeout_s=30)
    assert sum(manual_time.slept) == pytest.approx(30)


def test_a_job_that_does_not_exist_is_not_waited_for(control, manager, manual_time):
    with pytest.raises(RuntimeError, match=r"'job-1' does not exist"):
        manager.wait_for_ready("job-1")
    assert manual_time.slept == []


@pytest.mark.parametrize("state", ["RUNNING", "CREATING", "PENDING", "RE_QUEUEING"])
def test_reconnect_waits_for_a_job_that_runs_or_starts(control, manager, state):
    control.on(_GET, job(state), job("RUNNING"))
    assert manager.reconnect_and_wait("job-1").job_id == "job-1"
    assert control.calls(_RESUME) == []


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "PAUSED", "COMPLETED", "EARLY_STOPPED"])
def test_reconnect_resumes_a_job_that_stopped(control, manager, state):
    control.on(_GET, job(state), job("CREATING"), job("RUNNING"))
    control.on(_RESUME, job("CREATING"))
    assert manager.reconnect_and_wait("job-1").job_id == "job-1"
    assert len(control.calls(_RESUME)) == 1


def test_a_paused_job_is_answered_as_it_is(control, manager):
    control.on(f"POST {_JOB}:pause", job("PAUSED", "paused"))
    assert manager.pause("job-1")["state"] == "JOB_STATE_PAUSED"


def test_reconnect_gives_a_job_that_is_stopping_time_and_then_resumes_it(control, manager):
    control.on(_GET, job("CANCELLING"), job("CANCELLING"), job("CANCELLED"), job("RUNNING"))
    control.on(_RESUME, job("CREATING"))
    assert manager.reconnect_and_wait("job-1").job_id == "job-1"


def test_reconnect_gives_up_on_a_job_that_never_becomes_resumable(control, manager, manual_time):
    control.on(_GET, job("CANCELLING"))
    with pytest.raises(RuntimeError, match="did not become resumable"):
        manager.reconnect_and_wait("job-1", max_wait_for_resumable_s=20)
    assert sum(manual_time.slept) == pytest.approx(20)


@pytest.mark.parametrize("state", ["DELETED", "ARCHIVED", "DELETING"])
def test_reconnect_to_a_deleted_job_says_what_is_left_of_it(control, manager, state):
    control.on(_GET, job(state))
    with pytest.raises(RuntimeError, match="can still be listed and promoted"):
        manager.reconnect_and_wait("job-1")


def test_reconnect_goes_on_when_another_client_resumed_first(control, manager):
    control.on(_GET, job("CANCELLED"), job("RUNNING"))
    control.on(_RESUME, (400, {"message": "the job is running"}))
    assert manager.reconnect_and_wait("job-1").job_id == "job-1"


def test_reconnect_shows_why_a_job_cannot_be_resumed(control, manager):
    control.on(_GET, job("FAILED"))
    control.on(_RESUME, (400, {"message": "its home was removed"}))
    with pytest.raises(httpx.HTTPStatusError, match="its home was removed"):
        manager.reconnect_and_wait("job-1")


def test_a_failed_delete_is_logged_and_not_raised(control, manager, caplog):
    manager.delete("job-1")
    assert "job-1 was not deleted" in caplog.text


def test_try_get_tells_a_missing_job_from_a_broken_server(control, manager):
    assert manager.try_get("job-1") is None
    control.on(_GET, (401, {"message": "wrong key"}))
    with pytest.raises(httpx.HTTPStatusError, match="wrong key"):
        manager.try_get("job-1")


def test_metrics_of_the_client_go_into_the_job_s_record(control, manager):
    control.on(f"POST {_JOB}/metrics", {})
    control.on(f"GET {_JOB}/metrics", {"rows": [{"step": 3, "metrics": {"reward": 0.5}}]})
    manager.log_metrics("job-1", 3, {"reward": 0.5})
    assert control.seen[-1].body == {"step": 3, "metrics": {"reward": 0.5}}
    assert manager.get_metrics("job-1") == [{"step": 3, "metrics": {"reward": 0.5}}]


def test_a_metric_that_is_not_a_finite_number_is_refused_by_name(control, manager):
    with pytest.raises(ValueError, match=r"metrics\['reward'\]"):
        manager.log_metrics("job-1", 3, {"reward": float("nan")})
    assert control.seen == []
