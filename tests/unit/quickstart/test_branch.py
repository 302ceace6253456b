from types import SimpleNamespace

import numpy as np
import pytest
import tinker

from homefire.quickstart import branch as branching
from homefire.quickstart.policy import Policy
from homefire.quickstart.promises import PromiseBroken
from homefire.quickstart.settings import QuickstartSettings
from homefire.sdk import CreatedTrainerJob


class Done:
    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value


class Client:
    """Its logprobs are the given ones until a step, and one more for each step."""

    def __init__(self, logprobs, loaded=None):
        self.logprobs = np.asarray(logprobs, np.float32)
        self.loaded = loaded

    def save_state(self, name):
        return Done(None)

    def resolve_checkpoint_path(self, name, source_job_id):
        return f"cross_job://{source_job_id}/{name}"

    def load_state_with_optimizer(self, path):
        self.loaded = path
        return Done(None)

    def forward(self, data, loss_fn):
        output = {"logprobs": tinker.TensorData.from_numpy(self.logprobs)}
        return Done(SimpleNamespace(loss_fn_outputs=[output]))

    def forward_backward(self, data, loss_fn):
        return Done(SimpleNamespace(metrics={"loss:sum": 0.0}))

    def optim_step(self, params):
        self.logprobs = self.logprobs + self.step
        return Done(None)

    step = np.float32(1)


class Tokenizer:
    eos_token_id = 256

    def apply_chat_template(self, conversation, **options):
        return [*conversation[0]["content"].encode(), 257]

    def encode(self, text, *, add_special_tokens):
        return list(text.encode())


class Jobs:
    def __init__(self):
        self.deleted = []

    def create(self, config):
        return CreatedTrainerJob("accounts/local/rlorTrainerJobs/job-2", "job-2")

    def wait_for_ready(self, job_id):
        return None

    def delete(self, job_id):
        self.deleted.append(job_id)


@pytest.fixture
def branch(monkeypatch):
    def run(ours, theirs):
        jobs = Jobs()
        lab = SimpleNamespace(
            jobs=jobs,
            job=CreatedTrainerJob("accounts/local/rlorTrainerJobs/job-1", "job-1"),
            base_model="m",
            address=None,
        )
        monkeypatch.setattr(branching, "connect", lambda *_: theirs)
        return jobs, lambda: branching.branch(lab, Policy(ours, Tokenizer()), QuickstartSettings())

    return run


def test_a_branch_that_agrees_bit_for_bit_is_proven_and_deleted(branch):
    theirs = Client([-0.5, -0.25])
    jobs, run = branch(Client([-0.5, -0.25]), theirs)

    proof = run()

    assert theirs.loaded == "cross_job://job-1/branch_point"
    assert (proof.branch_job, proof.num_logprobs) == ("job-2", 2)
    assert jobs.deleted == ["job-2"]


def test_a_branch_whose_last_bit_differs_is_refused_and_deleted_too(branch):
    jobs, run = branch(Client([-0.5]), Client([np.nextafter(np.float32(-0.5), np.float32(0))]))

    with pytest.raises(PromiseBroken, match="after the load"):
        run()
    assert jobs.deleted == ["job-2"]


def test_a_branch_without_the_optimizer_shows_after_a_step(branch):
    theirs = Client([-0.5])
    theirs.step = np.float32(2)
    _, run = branch(Client([-0.5]), theirs)

    with pytest.raises(PromiseBroken, match="after one identical step"):
        run()
