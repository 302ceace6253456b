"""Recipes of tinker-cookbook, unchanged, on a model that is a local directory below the model root."""

from __future__ import annotations

import numpy as np
import pytest

from contract.clients import run_client
from contract.environments import ENVIRONMENTS
from contract.references import checkpoint_tensors, difference
from homefire.checkpoints.tiny import ensure_tiny

VERSION = "0.6.1"
pytestmark = pytest.mark.clients


def cell(method: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker-cookbook", version=VERSION, method=method, **more)


@pytest.fixture(scope="module")
def found(tinker_root, tmp_path_factory):
    model = ensure_tiny(tinker_root.home / "models/tiny")
    logs = tmp_path_factory.mktemp("cookbook")
    environment = ENVIRONMENTS["tinker-cookbook", VERSION]
    return run_client(environment, "cookbook.py", tinker_root, model, logs, timeout_s=290.0)


@cell("supervised.train: packaged conversations")
def test_supervised_training_lowers_the_loss_of_packaged_conversations(found):
    steps = [step for step in found["supervised"]["metrics"] if "train_mean_nll" in step]
    losses = [step["train_mean_nll"] for step in steps]
    assert losses[0] == pytest.approx(np.log(320), rel=0.1)
    assert losses[-1] < losses[0] - 1.0
    assert [c["name"] for c in found["supervised"]["checkpoints"]][-1] == "final"


@cell("math_rl: arithmetic, importance_sampling")
def test_arithmetic_is_sampled_and_trained_with_the_same_numbers(found):
    """The recipe's own estimate of the divergence between sampler and trainer."""
    steps = [step for step in found["arithmetic"]["metrics"] if "env/all/reward/total" in step]
    assert [step["step"] for step in steps] == [0, 1]
    for step in steps:
        assert abs(step["optim/kl_sample_train_v1"]) < 1e-5
        assert step["env/all/total_episodes"] == 32


@cell("math_rl: arithmetic, importance_sampling")
def test_groups_of_mixed_reward_move_the_weights(found, tinker_root):
    result = found["arithmetic"]
    (first, *_) = result["metrics"]
    assert first["env/all/by_group/frac_mixed"] > 0
    assert first["grad_norm"] > 1e-2
    final = result["checkpoints"][-1]
    assert final["name"] == "final"
    taught, trained = (
        checkpoint_tensors(tinker_root.home, path)
        for path in (result["taught"], final["state_path"])
    )
    weights = [name for name in taught if name.startswith("weights/")]
    moved = difference({n: trained[n] for n in weights}, {n: taught[n] for n in weights})
    assert np.abs(moved).max() > 1e-4


@cell("math_rl: arithmetic, stable_reinforce", outcome="refused: unsupported")
def test_the_recipes_default_loss_is_refused_by_name(found):
    assert found.refusal("stable_reinforce") == "unsupported"
    assert "record_stability_info" in found.error("stable_reinforce")["message"]


@cell("multiplayer_rl.guess_number")
def test_guesses_over_several_turns_are_sampled_and_trained_with_the_same_numbers(found):
    (step, *_) = found["guess_the_number"]["metrics"]
    assert step["env/all/turns_per_episode"] > 1
    assert step["optim/kl_sample_train_v1"] == pytest.approx(0.0, abs=1e-5)
    assert found["guess_the_number"]["checkpoints"][-1]["name"] == "final"
