"""Completions of prompts through the deployment, scored, and checked to be made by known weights."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass

from homefire.quickstart.policy import Policy
from homefire.quickstart.promises import promise
from homefire.quickstart.records import Snapshot
from homefire.quickstart.task import reward
from homefire.sdk import DeploymentSampler, SampledCompletion


@dataclass(frozen=True)
class Rollout:
    prompt: str
    completion: SampledCompletion
    reward: float


@dataclass(frozen=True)
class RolloutSampler:
    """Samples through the serving path: what a user of the model would get."""

    sampler: DeploymentSampler
    policy: Policy
    max_answer_tokens: int

    def groups(
        self, prompts: Sequence[str], *, group_size: int, snapshot: Snapshot
    ) -> list[list[Rollout]]:
        """rollouts[prompt][completion]: `group_size` completions of each prompt, with logprobs."""
        return asyncio.run(
            self._together([self._group(prompt, group_size, snapshot) for prompt in prompts])
        )

    def answers(self, prompts: Sequence[str], *, snapshot: Snapshot) -> list[Rollout]:
        """One completion of each prompt; the i-th is sampled with seed i."""
        asked = [self._group(prompt, 1, snapshot, seed=i) for i, prompt in enumerate(prompts)]
        return [rollouts_G[0] for rollouts_G in asyncio.run(self._together(asked))]

    async def _together(
        self, groups: Sequence[Coroutine[None, None, list[Rollout]]]
    ) -> list[list[Rollout]]:
        return await asyncio.gather(*groups)

    async def _group(
        self, prompt: str, group_size: int, snapshot: Snapshot, **options: int
    ) -> list[Rollout]:
        completions = await self.sampler.sample_with_tokens(
            self.policy.messages(prompt),
            n=group_size,
            max_tokens=self.max_answer_tokens,
            temperature=1.0,
            logprobs=True,
            expect_identity=snapshot.identity,
            **options,
        )
        for completion in completions:
            check_weights(completion, snapshot)
        return [Rollout(prompt, c, score(prompt, c)) for c in completions]


def score(prompt: str, completion: SampledCompletion) -> float:
    """An answer that was cut off is wrong, whatever it says."""
    return reward(prompt, completion.text) if completion.finish_reason == "stop" else 0.0


def check_weights(completion: SampledCompletion, snapshot: Snapshot) -> None:
    """The completion must name the snapshot, and the digest that the trainer wrote for it."""
    weights = completion.weights
    promise(
        weights is not None
        and (weights.identity, weights.digest) == (snapshot.identity, snapshot.digest),
        f"a completion was made by {weights}, but {snapshot.identity} with digest "
        f"{snapshot.digest} was hot-loaded",
    )


def rewards_of(
    rollouts_PG: Sequence[Sequence[Rollout]], *, shuffled_by: random.Random | None = None
) -> list[list[float]]:
    """rewards[prompt][completion]; `shuffled_by` permutes them over the whole batch (an ablation)."""
    rewards = [rollout.reward for rollouts_G in rollouts_PG for rollout in rollouts_G]
    if shuffled_by is not None:
        shuffled_by.shuffle(rewards)
    queue = iter(rewards)
    return [[next(queue) for _ in rollouts_G] for rollouts_G in rollouts_PG]
