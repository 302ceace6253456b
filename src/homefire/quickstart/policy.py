"""The policy as the loop sees it: a training client, and how to learn from rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tinker

from homefire.quickstart.datums import rollout_datum, supervised_datum
from homefire.quickstart.objective import clipped_policy_gradient, group_advantages
from homefire.quickstart.task import Demonstration
from homefire.sdk import FiretitanTrainingClient, SampledCompletion


class Tokenizer(Protocol):
    """What the loop needs of a Hugging Face tokenizer."""

    @property
    def eos_token_id(self) -> int: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Update:
    """A gradient and the step on it, both submitted; `metrics()` waits for both."""

    gradient: tinker.APIFuture[tinker.ForwardBackwardOutput]
    step: tinker.APIFuture[tinker.OptimStepResponse]

    def metrics(self) -> dict[str, float]:
        metrics = self.gradient.result().metrics
        self.step.result()
        return metrics


@dataclass
class Policy:
    client: FiretitanTrainingClient
    tokenizer: Tokenizer
    instruction: str = ""
    num_steps: int = 0
    """Optimizer steps submitted so far; the server must count the same."""

    def messages(self, prompt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.instruction + prompt}]

    def supervised_data(self, demonstrations: Sequence[Demonstration]) -> list[tinker.Datum]:
        """Rows whose summed loss is the mean cross-entropy of an answer's token."""
        rows = [(self._prompt_ids(d.prompt), self._answer_ids(d.answer)) for d in demonstrations]
        num_targets = sum(len(answer) for _, answer in rows)
        return [supervised_datum(prompt, answer, weight=1 / num_targets) for prompt, answer in rows]

    def imitate(self, data: list[tinker.Datum], *, learning_rate: float) -> Update:
        """One supervised step, not waited for."""
        gradient = self.client.forward_backward(data, "cross_entropy")
        return Update(gradient, self._step(learning_rate))

    def reinforce(
        self,
        completions_PG: Sequence[Sequence[SampledCompletion]],
        rewards_PG: Sequence[Sequence[float]],
        *,
        num_updates: int,
        learning_rate: float,
        rng: random.Random,
    ) -> list[Update]:
        """Updates on shuffled parts of the batch, not waited for. Rows without advantage teach
        nothing and are left out; no rows, no updates."""
        data = _data_with_advantage(completions_PG, group_advantages(rewards_PG))
        rng.shuffle(data)
        parts = [data[i::num_updates] for i in range(min(num_updates, len(data)))]
        return [self._reinforce_once(part, learning_rate) for part in parts]

    def target_logprobs(self, data: list[tinker.Datum]) -> npt.NDArray[np.float32]:
        """float32, of all rows end to end."""
        outputs = self.client.forward(data, "cross_entropy").result().loss_fn_outputs
        return np.concatenate([output["logprobs"].to_numpy().ravel() for output in outputs])

    def _reinforce_once(self, data: list[tinker.Datum], learning_rate: float) -> Update:
        gradient = self.client.forward_backward_custom(data, clipped_policy_gradient)
        return Update(gradient, self._step(learning_rate))

    def _step(self, learning_rate: float) -> tinker.APIFuture[tinker.OptimStepResponse]:
        self.num_steps += 1
        return self.client.optim_step(tinker.AdamParams(learning_rate=learning_rate))

    def _prompt_ids(self, prompt: str) -> list[int]:
        return list(
            self.tokenizer.apply_chat_template(
                self.messages(prompt), tokenize=True, add_generation_prompt=True, return_dict=False
            )
        )

    def _answer_ids(self, answer: str) -> list[int]:
        return [
            *self.tokenizer.encode(answer, add_special_tokens=False),
            self.tokenizer.eos_token_id,
        ]


def _data_with_advantage(
    completions_PG: Sequence[Sequence[SampledCompletion]],
    advantages_PG: Sequence[Sequence[float]],
) -> list[tinker.Datum]:
    return [
        rollout_datum(completion, advantage)
        for completions_G, advantages_G in zip(completions_PG, advantages_PG, strict=True)
        for completion, advantage in zip(completions_G, advantages_G, strict=True)
        if advantage != 0
    ]
