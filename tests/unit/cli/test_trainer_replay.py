"""`homefire trainer replay` on the command line; what it finds is tested with the trainer's front."""

from __future__ import annotations


def test_a_job_that_never_ran_is_told_with_the_remedy(homefire):
    outcome = homefire("trainer", "replay", "job-7")
    assert outcome.status == 1
    assert "job 'job-7' has never run" in outcome.err
    assert "homefire trainer list" in outcome.err


def test_a_name_that_is_a_path_is_refused(homefire):
    outcome = homefire("trainer", "replay", "..")
    assert outcome.status == 1
    assert "job" in outcome.err
