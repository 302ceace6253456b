"""`homefire checkpoint pin|unpin|prune|retention` against a scripted control plane."""

from __future__ import annotations

import argparse

import pytest

from homefire.cli.checkpoint_retention import duration_s

JOB = "/v1/accounts/local/rlorTrainerJobs/job-1"
ROW = {"slot": "policy", "kind": "base", "sizeBytes": 2048}


def test_a_dry_run_shows_what_would_go_and_why(homefire, control):
    control.answers[f"POST {JOB}/checkpoints:prune"] = {
        "policy": {"keepLast": 1},
        "dryRun": True,
        "checkpoints": [
            {**ROW, "checkpoint": "s1", "step": 1, "keep": False, "why": ["no rule keeps it"]},
            {**ROW, "checkpoint": "s2", "step": 2, "keep": True, "why": ["the newest", "pinned"]},
        ],
        "freedBytes": 2048,
    }
    outcome = homefire("checkpoint", "prune", "--dry-run", "--job", "job-1", "--keep-last", "1")
    assert outcome.status == 0
    assert "the newest; pinned" in outcome.out
    assert "keepLast 1" in outcome.out
    assert outcome.out.splitlines()[-1] == "1 of 2 would go, 2.0 KiB"


def test_a_policy_is_shown_without_rules_and_set_with_them(homefire, control):
    control.answers[f"GET {JOB}/retention"] = {"keepLast": None, "lowerIsBetter": False}
    shown = homefire("checkpoint", "retention", "--job", "job-1")
    assert shown.out == "job-1: no rules: all stay\n"
    control.answers[f"PUT {JOB}/retention"] = {"keepLast": 3, "ttlSeconds": 7200.0}
    words = ("checkpoint", "retention", "--job", "job-1", "--keep-last", "3", "--ttl", "2h")
    assert homefire(*words).out == "job-1: keepLast 3, ttlSeconds 7200.0\n"


def test_a_checkpoint_is_pinned_by_name(homefire, control):
    control.answers[f"POST {JOB}/checkpoints/s1:pin"] = {"pinned": True}
    outcome = homefire("checkpoint", "pin", f"{JOB[4:]}/checkpoints/s1", "--job", "job-1")
    assert outcome.out == "checkpoint s1 is pinned\n"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("7d", 604800), ("2w", 1209600)]
)
def test_times_are_read_in_units(text, seconds):
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "1y", "1 d"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no time"):
        duration_s(text)
