"""The forms that a request's `model` may take."""

from __future__ import annotations

import pytest

from homefire.gateway.addressing import deployment_key
from homefire.wire.errors import InvalidArgument, UnknownDeployment
from homefire.wire.internal import DeploymentRoute, RouteTable

MODEL = "accounts/fireworks/models/qwen3-8b"
TABLE = RouteTable(
    version=1,
    deployments={
        "local/serving": DeploymentRoute("READY", []),
        "local/second": DeploymentRoute("READY", []),
        "other/theirs": DeploymentRoute("READY", []),
    },
    models={
        f"local/{MODEL}": "local/serving",
        "local/Qwen/Qwen3-8B": "local/serving",
        "local/second": "local/serving",
        "other/accounts/other/models/m": "other/theirs",
    },
)


def key_of(model: str, header: str = "") -> str:
    return deployment_key(TABLE, account="local", model=model, header=header)


@pytest.mark.parametrize(
    "model",
    [
        "accounts/local/deployments/serving",
        "accounts/local/deployments/serving@step_00010-4b50536f",
        f"{MODEL}#accounts/local/deployments/serving",
        f"{MODEL}@step_00010-4b50536f#serving",
        MODEL,
        f"{MODEL}@step_00010-4b50536f",
        "serving",
        "serving@base",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-8B@base",
    ],
)
def test_every_form_names_its_deployment(model):
    assert key_of(model) == "local/serving"


def test_the_header_decides_between_deployments_of_a_model():
    assert key_of(MODEL, "accounts/local/deployments/second") == "local/second"
    assert key_of(MODEL, "second") == "local/second"
    assert key_of("", "second") == "local/second"


def test_a_named_deployment_wins_over_the_header():
    assert key_of("accounts/local/deployments/serving", "second") == "local/serving"
    assert key_of(f"{MODEL}#serving", "second") == "local/serving"


@pytest.mark.parametrize(
    ("model", "header"),
    [
        ("accounts/local/deployments/nope", ""),
        ("nope", ""),
        ("accounts/fireworks/models/other", ""),
        (MODEL, "nope"),
        ("theirs", ""),
        ("accounts/other/deployments/theirs", ""),
        ("accounts/other/models/m", ""),
        ("a/b/c/d/e", ""),
        ("#", ""),
        ("../other/theirs", ""),
    ],
)
def test_what_never_existed_is_refused_naming_what_does(model, header):
    with pytest.raises(UnknownDeployment) as caught:
        key_of(model, header)
    assert "second, serving" in caught.value.hint
    assert "theirs" not in caught.value.hint


def test_a_deployment_wins_over_a_base_model_of_its_name():
    assert key_of("second") == "local/second"


def test_a_request_without_a_model_says_how_to_name_one():
    with pytest.raises(InvalidArgument, match="accounts/<account>/deployments"):
        key_of("")
