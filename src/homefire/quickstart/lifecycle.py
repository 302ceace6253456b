"""The story in seven chapters: request, teach, sync and evaluate, reinforce, reconnect, evaluate, branch."""

from __future__ import annotations

from homefire.quickstart.branch import branch
from homefire.quickstart.lab import open_lab
from homefire.quickstart.records import Results, RunLog
from homefire.quickstart.run import Run
from homefire.quickstart.server import Address
from homefire.quickstart.settings import QuickstartSettings
from homefire.quickstart.story import Story


def run_lifecycle(
    settings: QuickstartSettings, address: Address, log: RunLog, story: Story
) -> Results:
    """Blocks until all is done; what it made on the server is deleted, whatever happens."""
    story.chapter("Request a trainer and a deployment, and wait for both")
    with open_lab(address, settings.base_model) as lab:
        story.say(
            f"trainer {lab.job.job_id}, deployment {lab.deployment_id}, model {lab.base_model}"
        )
        half = settings.rl_steps // 2

        story.chapter("Connect, and teach the format by supervised steps")
        run = Run.begin(lab, settings, log, story)
        run.teach()

        story.chapter("Save a base snapshot, hot-load it, evaluate through the deployment")
        before = run.evaluate("before RL")

        story.chapter("Improve by reinforcement learning: sample, reward, update, sync a delta")
        steps = run.reinforce(range(half))

        story.chapter("Lose the training client, reconnect to the running job, and go on")
        run.reconnect()
        steps += run.reinforce(range(half, settings.rl_steps))

        story.chapter("Sync the last delta, and evaluate again")
        after = run.evaluate("after RL")

        story.chapter("Branch: a second job continues exactly where this one is")
        proof = branch(lab, run.policy, settings)
        story.say(
            f"{proof.num_logprobs} logprobs agree bit for bit, before and after one more step"
        )
        return Results(lab.job.job_id, lab.deployment_id, before, after, steps, proof)
