"""The suite's own checks find the bugs that they are for: each is planted, and its check is red.

On the fake engine, with the newest release; `planted/sitecustomize.py` says what the bugs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import contract.test_tinker_delivery as delivery
import contract.test_tinker_sampling as sampling
import contract.test_tinker_training as training
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS
from contract.lossy_proxy import lossy_proxy

VERSION = "0.38.0"
PLANTED = Path(__file__).parent / "planted"


@dataclass
class Suite:
    """What the checks ask for, at one server."""

    server: Any
    steps: dict[str, str] = field(default_factory=dict)
    """By script, what one run of it does at once; any other script runs the step that is asked for."""
    findings: dict[tuple[str, str], ClientFindings] = field(default_factory=dict)

    def run(self, script: str, step: str) -> ClientFindings:
        key = (script, self.steps.get(script, step))
        if key not in self.findings:
            environment = ENVIRONMENTS["tinker", VERSION]
            only = {"FINDINGS_ONLY": key[1]}
            self.findings[key] = run_client(environment, script, self.server, env=only)
        return self.findings[key]

    def lossy_run(self, version: str) -> tuple[Any, Any]:
        with lossy_proxy(self.server, loses=delivery.LOSES) as proxy:
            found = run_client(ENVIRONMENTS["tinker", version], delivery.SCRIPT, proxy)
        return found["run"], proxy


def forward_only(suite: Suite) -> None:
    found = suite.run("tinker_training.py", "forward_leaves_no_gradient")
    training.test_a_forward_leaves_no_gradient_behind(found)


def sums(suite: Suite) -> None:
    found = suite.run("tinker_training.py", "gradient_of_a_batch")
    training.test_a_gradient_is_a_sum_over_tokens_and_datums(found)


def clipping(suite: Suite) -> None:
    found = suite.run("tinker_training.py", "clipping")
    training.test_clipping_scales_the_whole_gradient_and_only_where_it_is_too_long(
        found, suite.server
    )


def named_samplers(suite: Suite) -> None:
    found = suite.run("tinker_sampling.py", "snapshots_stay")
    sampling.test_a_sampler_of_a_checkpoint_stays_with_it(found)


def retries(suite: Suite) -> None:
    delivery.test_a_run_whose_first_answers_are_all_lost_ends_as_one_that_lost_none(
        lambda version, script: suite.run(script, "run"), suite.lossy_run, suite.server, VERSION
    )


CHECKS: dict[str, Callable[[Suite], None]] = {
    "forward_only_is_ignored": forward_only,
    "losses_are_means": sums,
    "gradients_are_not_clipped": clipping,
    "named_samplers_follow_the_run": named_samplers,
    "retries_are_applied_again": retries,
}


@pytest.mark.parametrize("bug", CHECKS)
def test_a_planted_bug_turns_its_check_red(homefire_up, bug):
    planted = {"PYTHONPATH": str(PLANTED), "HOMEFIRE_PLANTED_BUG": bug}
    suite = Suite(homefire_up(engine="fake", env=planted))
    with pytest.raises(AssertionError):
        CHECKS[bug](suite)


@pytest.fixture(scope="module")
def sound(homefire_up) -> Suite:
    steps = "forward_leaves_no_gradient,gradient_of_a_batch,clipping"
    return Suite(homefire_up(engine="fake"), {"tinker_training.py": steps})


@pytest.mark.parametrize("bug", CHECKS)
def test_the_check_is_green_where_no_bug_is_planted(sound, bug):
    CHECKS[bug](sound)
