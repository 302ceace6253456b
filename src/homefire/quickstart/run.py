"""One run: the policy, the deployment that serves it, and what each phase of the loop does."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Self

from homefire.foundation.clock import Clock, SystemClock
from homefire.quickstart.lab import Lab
from homefire.quickstart.policy import Policy, Update
from homefire.quickstart.records import Evaluation, RunLog, Snapshot, StepRecord, SupervisedRecord
from homefire.quickstart.rollouts import Rollout, RolloutSampler, rewards_of
from homefire.quickstart.serving import Serving
from homefire.quickstart.settings import QuickstartSettings
from homefire.quickstart.story import Story
from homefire.quickstart.task import (
    demonstration,
    held_out_prompts,
    prompts_sha256,
    training_prompt,
)
from homefire.sdk import AdaptiveConcurrencyController, DeploymentSampler
from homefire.sdk.evaluations import SEED_IS_INDEX

_UPDATES_IN_FLIGHT = 4
"""Supervised updates submitted ahead, so that the trainer never waits for this script."""


@dataclass
class Run:
    lab: Lab
    settings: QuickstartSettings
    log: RunLog
    story: Story
    policy: Policy
    serving: Serving
    rollouts: RolloutSampler
    window: AdaptiveConcurrencyController
    prompts: random.Random
    """Draws prompts and demonstrations and nothing else, so that a seed fixes them whatever the
    rollouts are."""
    clock: Clock

    @classmethod
    def begin(cls, lab: Lab, settings: QuickstartSettings, log: RunLog, story: Story) -> Self:
        client = lab.connect()
        policy = Policy(client, client.get_tokenizer(), settings.instruction)
        window = AdaptiveConcurrencyController(initial_window=64)
        sampler = DeploymentSampler(
            inference_url=lab.deployments.inference_url,
            model=lab.deployment_model,
            api_key=lab.address.api_key,
            tokenizer=policy.tokenizer,
            concurrency_controller=window,
        )
        return cls(
            lab=lab,
            settings=settings,
            log=log,
            story=story,
            policy=policy,
            serving=Serving.of(lab, policy),
            rollouts=RolloutSampler(sampler, policy, settings.max_answer_tokens),
            window=window,
            prompts=random.Random(settings.seed),
            clock=SystemClock(),
        )

    def teach(self) -> None:
        """Supervised steps, several of them under way at a time."""
        total = self.settings.supervised_steps
        under_way: deque[tuple[int, Update]] = deque()
        with self.story.loop("supervised", total) as advance:

            def finish_oldest() -> None:
                step, update = under_way.popleft()
                record = SupervisedRecord(step, update.metrics()["loss:sum"])
                self.log.supervised(record)
                advance(f"loss {record.loss:.3f}")

            for step in range(total):
                under_way.append((step, self._teach_once(step)))
                if len(under_way) > _UPDATES_IN_FLIGHT:
                    finish_oldest()
            while under_way:
                finish_oldest()

    def reinforce(self, steps: Iterable[int]) -> list[StepRecord]:
        numbers = list(steps)
        with self.story.loop("reinforce", len(numbers)) as advance:
            records = []
            for number in numbers:
                record = self._reinforce_once(number)
                self.log.step(record)
                self.lab.jobs.log_metrics(
                    self.lab.job.job_id, record.snapshot.step, record.client_metrics()
                )
                advance(f"reward {record.reward:.3f}")
                records.append(record)
        return records

    def reconnect(self) -> None:
        """A new client on the same trainer takes over; the old one, never closed, is superseded."""
        self.policy.client = self.lab.reconnect()
        self.serving.follow(self.policy.client)
        self.story.say(f"{self.lab.job.job_id} goes on after step {self.policy.num_steps}")

    def evaluate(self, name: str) -> Evaluation:
        """Syncs the policy, answers the held-out set, and records the result here and on the server."""
        snapshot = self.serving.sync()
        prompts = held_out_prompts()
        answers = self.rollouts.answers(prompts, snapshot=snapshot)
        self.window.step_completed()
        evaluation = _evaluation(name, snapshot, prompts, answers)
        self.log.evaluation(evaluation)
        self._record_on_server(evaluation, answers)
        self.story.say(f"{snapshot.identity}: held-out reward {evaluation.reward:.3f}")
        return evaluation

    def _teach_once(self, step: int) -> Update:
        wrong_share = self.settings.wrong_share
        rows = range(self.settings.supervised_rows)
        data = self.policy.supervised_data(
            [demonstration(self.prompts, wrong_share=wrong_share) for _ in rows]
        )
        return self.policy.imitate(data, learning_rate=self.settings.supervised_rate(step))

    def _reinforce_once(self, number: int) -> StepRecord:
        began = self.clock.monotonic()
        snapshot = self.serving.sync()
        synced = self.clock.monotonic()
        rollouts_PG = self._sample(snapshot)
        sampled = self.clock.monotonic()
        updates = [update.metrics() for update in self._update(number, rollouts_PG)]
        return StepRecord(
            step=number,
            snapshot=snapshot,
            reward=fmean(reward for rewards_G in rewards_of(rollouts_PG) for reward in rewards_G),
            loss=fmean([metrics["loss"] for metrics in updates] or [0.0]),
            logprob_gap=updates[0]["largest_logprob_change"] if updates else 0.0,
            num_completions=sum(len(rollouts_G) for rollouts_G in rollouts_PG),
            window=self.window.window_size,
            sync_s=synced - began,
            sample_s=sampled - synced,
            train_s=self.clock.monotonic() - sampled,
        )

    def _sample(self, snapshot: Snapshot) -> list[list[Rollout]]:
        prompts = [training_prompt(self.prompts) for _ in range(self.settings.rl_prompts)]
        rollouts_PG = self.rollouts.groups(
            prompts, group_size=self.settings.group_size, snapshot=snapshot
        )
        self.window.step_completed()
        return rollouts_PG

    def _update(self, number: int, rollouts_PG: list[list[Rollout]]) -> list[Update]:
        order = random.Random(f"{self.settings.seed}:{number}")
        shuffled_by = order if self.settings.shuffle_rewards else None
        return self.policy.reinforce(
            [[rollout.completion for rollout in rollouts_G] for rollouts_G in rollouts_PG],
            rewards_of(rollouts_PG, shuffled_by=shuffled_by),
            num_updates=self.settings.updates_per_step,
            learning_rate=self.settings.rl_rate(number),
            rng=order,
        )

    def _record_on_server(self, evaluation: Evaluation, answers: list[Rollout]) -> None:
        self.lab.jobs.record_evaluation(
            evaluation.name,
            deployment=self.lab.deployment_id,
            identity=evaluation.snapshot.identity,
            digest=evaluation.snapshot.digest,
            step=evaluation.snapshot.step,
            scores={"reward": evaluation.reward},
            prompts_sha256=evaluation.prompts_sha256,
            num_prompts=len(evaluation.prompts),
            sampling={
                "temperature": 1.0,
                "max_tokens": self.settings.max_answer_tokens,
                "seed": SEED_IS_INDEX,
                "instruction": self.settings.instruction,
            },
            job=self.lab.job.job_id,
            completions=[answer.completion for answer in answers],
            scorer="homefire.quickstart.rescoring:score",
        )


def _evaluation(
    name: str, snapshot: Snapshot, prompts: tuple[str, ...], answers: list[Rollout]
) -> Evaluation:
    rewards = [answer.reward for answer in answers]
    return Evaluation(
        name=name,
        snapshot=snapshot,
        reward=fmean(rewards),
        prompts_sha256=prompts_sha256(prompts),
        prompts=prompts,
        answers=[answer.completion.text for answer in answers],
        rewards=rewards,
    )
