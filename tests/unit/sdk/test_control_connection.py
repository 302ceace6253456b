from __future__ import annotations

import io

import httpx
import pytest

from homefire.foundation.clock import ManualClock
from homefire.sdk import FireworksClient, settings, validate_output_model_id
from homefire.sdk.progress import Progress

_SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
_VERSION = {
    "name": f"{_SHAPE}/versions/v1",
    "snapshot": {
        "trainerImageTag": "t1",
        "maxSupportedContextLength": 131072,
        "nodeCount": 1,
        "deploymentShapeVersion": "accounts/fireworks/deploymentShapes/ds/versions/v1",
        "deploymentImageTag": "d1",
        "acceleratorType": "NVIDIA_H200_141GB",
        "acceleratorCount": 8,
        "baseModelWeightPrecision": "WEIGHT_PRECISION_BFLOAT16",
        "trainerMode": "POLICY_TRAINER",
        "trainerShardingScheme": {"pipelineParallelism": 2},
    },
}
_PROMOTE = "POST /v1/accounts/local/checkpoints/step_00000-abc:promote"


@pytest.fixture
def client(control, manual_time) -> FireworksClient:
    return FireworksClient(
        "fw_test", "http://server/", waiter=manual_time.waiter, transport=control.transport
    )


def test_the_account_is_asked_once(control, client):
    assert (client.account_id, client.account_id) == ("local", "local")
    assert [(seen.line, seen.query) for seen in control.seen] == [
        ("GET /v1/accounts", {"pageSize": "2"})
    ]


@pytest.mark.parametrize(
    ("accounts", "found"), [([], "no account"), ([{"name": "a"}] * 2, "multiple accounts")]
)
def test_a_key_needs_exactly_one_account(control, client, accounts, found):
    control.on("GET /v1/accounts", {"accounts": accounts})
    with pytest.raises(ValueError, match=found):
        _ = client.account_id


def test_transient_statuses_are_tried_again_until_an_answer_comes(control, client, manual_time):
    control.on(
        "GET /v1/accounts",
        (503, {}),
        httpx.ReadError("cut"),
        (429, {}),
        {"accounts": [{"name": "accounts/a"}]},
    )
    assert client.account_id == "a"
    assert manual_time.slept == [0.25, 0.5, 1.0]


def test_a_server_that_stays_broken_is_given_five_minutes(control, client, manual_time):
    control.on("GET /v1/accounts", (500, {"error": {"message": "the disk is full"}}))
    with pytest.raises(httpx.HTTPStatusError, match="HTTP 500: the disk is full"):
        _ = client.account_id
    assert 240 < sum(manual_time.slept) <= 300


def test_a_server_that_never_answered_is_given_up_soon_with_a_remedy(control, client, manual_time):
    control.on("GET /v1/accounts", httpx.ConnectError("connection refused"))
    with pytest.raises(httpx.ConnectError, match="homefire up"):
        _ = client.account_id
    assert sum(manual_time.slept) <= 10


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 422])
def test_a_permanent_refusal_is_raised_at_once(control, client, manual_time, status):
    control.on("GET /v1/accounts", (status, {"detail": "no"}))
    with pytest.raises(httpx.HTTPStatusError, match=f"HTTP {status}: no"):
        _ = client.account_id
    assert manual_time.slept == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": "b"}, "b"),
        ({"code": 5, "message": "c"}, "c"),
        ({"detail": "d"}, "d"),
        (["e"], "e"),
    ],
)
def test_the_server_s_message_is_found_in_every_dialect(control, client, body, text):
    control.on("GET /v1/accounts", (400, body))
    with pytest.raises(httpx.HTTPStatusError, match=f"HTTP 400: .*{text}"):
        _ = client.account_id


def test_a_shape_resolves_to_its_latest_validated_version(control, client):
    control.on(f"GET /v1/{_SHAPE}/versions", {"trainingShapeVersions": [_VERSION]})
    profile = client.resolve_training_profile(_SHAPE)
    assert control.seen[0].query == {"filter": "latest_validated=true", "pageSize": "1"}
    assert profile.training_shape_version == f"{_SHAPE}/versions/v1"
    assert profile.training_shape == _SHAPE
    assert profile.deployment_shape == "accounts/fireworks/deploymentShapes/ds/versions/v1"
    assert profile.max_supported_context_length == 131072
    assert profile.pipeline_parallelism == 2
    assert not profile.supports_lora


def test_a_named_version_is_asked_for_itself(control, client):
    control.on(f"GET /v1/{_SHAPE}/versions/v1", _VERSION)
    assert client.resolve_training_profile(f"{_SHAPE}/versions/v1").trainer_image_tag == "t1"


def test_a_malformed_shape_is_refused_without_a_request(control, client):
    with pytest.raises(ValueError, match="training_shape_id 'qwen3-8b'"):
        client.resolve_training_profile("qwen3-8b")
    assert control.seen == []


@pytest.mark.parametrize("answer", [{"trainingShapeVersions": []}, (404, {"message": "no such"})])
def test_a_shape_without_a_version_is_a_runtime_error(control, client, answer):
    control.on(f"GET /v1/{_SHAPE}/versions", answer)
    with pytest.raises(RuntimeError, match="shape"):
        client.resolve_training_profile(_SHAPE)


def test_checkpoints_are_listed_over_all_pages(control, client):
    line = "GET /v1/accounts/local/rlorTrainerJobs/job-1/checkpoints"
    control.on(
        line,
        {"checkpoints": [{"name": "a"}], "nextPageToken": "t"},
        {"checkpoints": [{"name": "b"}], "nextPageToken": ""},
    )
    assert [row["name"] for row in client.list_checkpoints("job-1")] == ["a", "b"]
    assert [seen.query for seen in control.calls(line)] == [
        {"pageSize": "200"},
        {"pageSize": "200", "pageToken": "t"},
    ]


def test_promotion_by_job_and_checkpoint_sends_the_protocol_s_body(control, client):
    control.on(_PROMOTE, {"model": {"name": "accounts/local/models/my-model", "state": "READY"}})
    model = client.promote_checkpoint(
        "job-1", "step_00000-abc", "my-model", "accounts/fireworks/models/qwen3-8b"
    )
    assert model["state"] == "READY"
    assert control.seen[-1].body == {
        "output_model": "accounts/local/models/my-model",
        "trainer_job_id": "accounts/local/rlorTrainerJobs/job-1",
        "base_model": "accounts/fireworks/models/qwen3-8b",
        "async_promotion": True,
    }


def test_promotion_by_name_waits_for_its_operation(control, client):
    operation = {"name": "accounts/local/operations/op1", "done": False}
    done = {**operation, "done": True, "response": {"@type": "x", "name": "m", "state": "READY"}}
    control.on(_PROMOTE, {"operation": operation})
    control.on("GET /v1/accounts/local/operations/op1", operation, (503, {}), done)
    name = "accounts/local/rlorTrainerJobs/job-1/checkpoints/step_00000-abc"
    assert client.promote_checkpoint(name=name, output_model_id="m") == {
        "name": "m",
        "state": "READY",
    }


def test_a_failed_promotion_says_why(control, client):
    operation = {"name": "op", "done": True, "error": {"message": "its parent is missing"}}
    control.on(_PROMOTE, {"operation": operation}, (400, {"message": "not promotable"}))
    for reason in ("its parent is missing", "not promotable"):
        with pytest.raises(RuntimeError, match=reason):
            client.promote_checkpoint("job-1", "step_00000-abc", "m")


@pytest.mark.parametrize(
    ("model_id", "problems"),
    [("my-model", 0), ("", 1), (None, 1), ("My", 1), ("a" * 64, 1), ("A" * 64, 2), ("a_b", 1)],
)
def test_output_model_ids_are_checked(model_id, problems):
    assert len(validate_output_model_id(model_id)) == problems


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_model_id": "m"},
        {"job_id": "job-1", "output_model_id": "m"},
        {"name": "step_00000-abc", "output_model_id": "m"},
        {"job_id": "job-1", "checkpoint_id": "c", "output_model_id": "Bad_Id"},
    ],
)
def test_a_promotion_with_bad_names_is_refused_without_a_promote(control, client, arguments):
    with pytest.raises(ValueError, match=r"name|output_model_id"):
        client.promote_checkpoint(**arguments)
    assert [line for line in control.lines if "promote" in line] == []


def test_an_evaluation_is_recorded_with_the_weights_it_measured(control, client):
    control.on("POST /v1/accounts/local/evaluations", {"id": "eval-1"})
    record = client.record_evaluation(
        "held-out",
        deployment="d",
        identity="step_0-ab",
        digest="9f",
        scores={"reward": 0.5},
        prompts_sha256="aa",
        num_prompts=200,
        step=3,
        job="job-1",
        sampling={"temperature": 0.0},
    )
    assert record == {"id": "eval-1"}
    assert control.seen[-1].body == {
        "name": "held-out",
        "deployment": "d",
        "identity": "step_0-ab",
        "digest": "9f",
        "step": 3,
        "promptsSha256": "aa",
        "numPrompts": 200,
        "sampling": {"temperature": 0.0},
        "scores": {"reward": 0.5},
        "job": "job-1",
    }


def test_settings_prefer_the_argument_then_the_environment(monkeypatch):
    monkeypatch.delenv("FIREWORKS_BASE_URL", raising=False)
    monkeypatch.setenv("FIREWORKS_API_KEY", "from-env")
    assert settings.resolve_base_url(None) == "http://127.0.0.1:8700"
    monkeypatch.setenv("FIREWORKS_BASE_URL", "http://env:1/")
    assert settings.resolve_base_url(None) == "http://env:1"
    assert settings.resolve_base_url("https://given:2") == "https://given:2"
    assert settings.resolve_api_key(None) == "from-env"
    assert settings.resolve_api_key("given") == "given"


def test_missing_or_malformed_settings_are_refused_with_a_remedy(monkeypatch):
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    with pytest.raises(ValueError, match="homefire env"):
        settings.resolve_api_key(None)
    with pytest.raises(ValueError, match="not an http"):
        settings.resolve_base_url("localhost:8700")


def test_a_key_gets_tinker_s_prefix_once():
    assert settings.tinker_key("fw_abc") == "tml-fw_abc"
    assert settings.tinker_key("tml-abc") == "tml-abc"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_goes_away():
    clock, terminal = ManualClock(), _Terminal()
    with Progress("trainer job-1", stream=terminal, clock=clock) as progress:
        progress.update("CREATING")
        assert terminal.getvalue() == ""
        clock.advance(12)
        progress.update("CREATING")
    assert terminal.getvalue().startswith("\rtrainer job-1: CREATING (12 s)")
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith(" \r")


def test_progress_elsewhere_is_one_record_per_change(caplog):
    caplog.set_level("INFO", logger="homefire.sdk.progress")
    with Progress("trainer job-1", stream=io.StringIO()) as progress:
        for state in ["PENDING", "PENDING", "CREATING", "CREATING", "CREATING"]:
            progress.update(state)
    assert [record.getMessage() for record in caplog.records] == [
        "trainer job-1: PENDING",
        "trainer job-1: CREATING",
    ]
