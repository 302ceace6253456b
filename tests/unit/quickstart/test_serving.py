from types import SimpleNamespace

import pytest

from homefire.quickstart.policy import Policy
from homefire.quickstart.promises import PromiseBroken
from homefire.quickstart.records import Snapshot
from homefire.quickstart.serving import Serving


class Syncer:
    """Saves and loads at once; remembers the names."""

    def __init__(self):
        self.policy_client = "first client"
        self.names = []

    def save_and_hotload(self, name):
        self.names.append(name)
        return f"{name}-4b50536f"


class Jobs:
    """Lists one checkpoint for each save, at the step that the server believes in."""

    def __init__(self, syncer, step):
        self.syncer, self.step = syncer, step

    def list_checkpoints(self, job_id):
        return [
            {
                "name": f"accounts/local/rlorTrainerJobs/{job_id}/checkpoints/{name}-4b50536f",
                "kind": "delta" if i else "base",
                "step": self.step,
                "sizeBytes": 100 - i,
                "digest": f"digest {i}",
            }
            for i, name in enumerate(self.syncer.names)
        ]


@pytest.fixture
def serving():
    def make(our_step=4, server_step=4):
        syncer = Syncer()
        policy = Policy(None, None, num_steps=our_step)
        jobs = Jobs(syncer, server_step)
        return SimpleNamespace(
            serving=Serving(policy, syncer, jobs, "job-1"), syncer=syncer, jobs=jobs, policy=policy
        )

    return make


def test_a_sync_names_the_step_and_finds_what_the_server_stored(serving):
    run = serving()

    assert run.serving.sync() == Snapshot("step_00004-4b50536f", "base", 4, 100, "digest 0")


def test_weights_that_did_not_move_are_not_synced_again(serving):
    run = serving()

    first, second = run.serving.sync(), run.serving.sync()
    run.policy.num_steps += 1
    run.jobs.step += 1
    third = run.serving.sync()

    assert first == second
    assert third.identity == "step_00005-4b50536f"
    assert run.syncer.names == ["step_00004", "step_00005"]


def test_a_server_that_lost_a_step_ends_the_run(serving):
    run = serving(our_step=4, server_step=3)

    with pytest.raises(PromiseBroken, match="is of step 3, but 4 optimizer steps"):
        run.serving.sync()


def test_a_snapshot_that_the_job_does_not_list_ends_the_run(serving):
    run = serving()
    run.jobs.syncer = Syncer()

    with pytest.raises(PromiseBroken, match="0 checkpoints named step_00004-4b50536f"):
        run.serving.sync()


def test_a_new_client_takes_over_the_chain(serving):
    run = serving()

    run.serving.follow("second client")

    assert run.syncer.policy_client == "second client"
