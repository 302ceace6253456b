"""The objective, written as any user of `forward_backward_custom` would: in torch, on logprobs.

Advantages are relative to a group of completions of one prompt (GRPO, arXiv:2402.03300), without
dividing by the group's deviation (arXiv:2503.20783); the ratio is clipped as in PPO with a wider
upper bound (DAPO, arXiv:2503.14476), which lets one batch of rollouts serve several updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import tinker
import torch

CLIP_LOW = 0.2
CLIP_HIGH = 0.3


def group_advantages(rewards_PG: Sequence[Sequence[float]]) -> list[list[float]]:
    """rewards[prompt][completion] -> reward minus the mean of its group, in the same layout."""
    return [
        [reward - sum(rewards_G) / len(rewards_G) for reward in rewards_G]
        for rewards_G in rewards_PG
    ]


def clipped_policy_gradient(
    data: list[tinker.Datum], logprobs_list: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """-mean over completion tokens of min(r A, clip(r) A), r = exp(logprob - sampled logprob).

    `data` are `rollout_datum`s, `logprobs_list` their target logprobs under the trained weights.
    """
    logprobs = torch.cat(logprobs_list)
    sampled = _joined(data, "logprobs")
    advantages = _joined(data, "advantages")
    on_completion = advantages != 0
    ratio = torch.exp(logprobs - sampled)
    clipped = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -surrogate.sum() / on_completion.sum()
    gap = (logprobs.detach() - sampled)[on_completion].abs().max()
    return loss, {"loss": loss.item(), "largest_logprob_change": gap.item()}


def _joined(data: list[tinker.Datum], name: str) -> torch.Tensor:
    return torch.cat([datum.loss_fn_inputs[name].to_torch() for datum in data])
