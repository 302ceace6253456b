"""What homefire does not have, asked for with the newest SDK: a typed answer that names it."""

from __future__ import annotations

import pytest

from contract.fireworks import findings_of, shows, since

newest = since("1.2.30")


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_refusals.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


REFUSED = [
    ("rdma_weight_sync", "RDMA weight sync"),
    ("router_replay_in_training", "routing matrices in training (R3)"),
    ("router_replay_in_sampling", "routing matrices in sampling (R3)"),
    ("sampling_mask", "sampling masks"),
    ("images_in_training", "images in training"),
    ("images_in_sampling", "images in sampling"),
    ("export_precision", "export_precision other than bf16"),
    ("loss_dppo", "loss dppo"),
    ("projection_head", "projection heads"),
    ("projection_head_of_a_job", "TrainerJobConfig.projection_head_dim"),
    ("trainer_arguments", "TrainerJobConfig.extra_args"),
    ("deployment_arguments", "DeploymentConfig.extra_args"),
]


@newest
@pytest.mark.parametrize(
    "step", [pytest.param(s, marks=shows(m, refused="unsupported"), id=s) for s, m in REFUSED]
)
def test_what_is_not_supported_is_refused_by_its_name(found, step):
    assert found.refusal(step) == "unsupported"


@newest
@pytest.mark.parametrize(
    ("step", "named"),
    [
        pytest.param(
            "managed_fine_tuning",
            "supervisedFineTuningJobs belong to the hosted service",
            marks=shows("list_training_job_checkpoints", refused="unsupported"),
        ),
        pytest.param(
            "serverless_sessions",
            "trainingSessions belong to the hosted service",
            marks=shows("list_training_session_checkpoints", refused="unsupported"),
        ),
    ],
)
def test_a_collection_of_the_hosted_service_is_refused_by_its_name(found, step, named):
    """The SDK raises the message alone."""
    assert named in found.error(step)["message"]


@newest
def test_a_loss_that_the_trainer_does_not_offer_is_not_even_sent(found):
    assert "REINFORCE" in found.error("loss_reinforce")["message"]


@newest
def test_nothing_is_lost_by_a_refusal(found):
    assert found.refusal("step_behind_refused_passes") == "incomplete_gradient"
    after = found["after_all_that"]
    assert after["norm"] > 0.1
    assert after["warm"] is True
