"""One packed pass of the torch model over the rows of several adapters.

Backbone, attention and every base product run once over all tokens; the adapters' updates and the
head, which each part has its own low rank on, run part by part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from homefire.model.loading import LoadedModel
from homefire.model.lora import head_update
from homefire.model.packed import PendingBackward, fused_loss, packed_hidden, target_logprobs
from homefire.model.packed_lora import Segment, applied_by_segment
from homefire.trainer.engine.network import Float32, Part
from homefire.trainer.engine.out_of_memory import named_out_of_memory
from homefire.trainer.engine.residence import Residence
from homefire.trainer.engine.torch_weights import LoraWeights


@named_out_of_memory()
def backward_together(residence: Residence, parts: Sequence[Part]) -> list[Float32]:
    """Logprobs [T, K] of each part; its gradient is added aside on its weights."""
    model = residence.model
    residence.use_base()
    model.module.requires_grad_(False)
    segments = [Segment(_adapted(part).adapter, len(part.batch.tokens)) for part in parts]
    states = _hidden(model, parts, segments).split([segment.num_tokens for segment in segments])
    found = [_scored(model, part, own) for part, own in zip(parts, states, strict=True)]
    _push([pending for _, pending in found if pending is not None])
    return [logprobs.detach().cpu().numpy() for logprobs, _ in found]


def _adapted(part: Part) -> LoraWeights:
    if not isinstance(part.weights, LoraWeights):
        raise TypeError(f"{type(part.weights).__name__} shares no pass")
    return part.weights


def _hidden(model: LoadedModel, parts: Sequence[Part], segments: Sequence[Segment]) -> Tensor:
    """[T of all parts, E], differentiable."""
    tokens = torch.cat([torch.from_numpy(part.batch.tokens) for part in parts]).to(model.device)
    with applied_by_segment(model, segments):
        return packed_hidden(
            model,
            tokens,
            [n for part in parts for n in part.batch.lengths],
            recompute=max(part.batch.recompute for part in parts),
            reentries=[lambda: applied_by_segment(model, segments)],
        )


def _scored(
    model: LoadedModel, part: Part, states: Tensor
) -> tuple[Tensor, PendingBackward | None]:
    """A part's logprobs [T, K], and the backward that waits behind them."""
    targets = torch.from_numpy(part.batch.targets).to(model.device)
    low_rank = head_update(model, _adapted(part).adapter, states)

    def gradient_of(logprobs: Tensor, span: slice) -> Tensor:
        values = logprobs.detach().cpu().numpy()
        return torch.from_numpy(part.gradient_of(values, span)).to(logprobs.device)

    head = model.logits_head
    if part.is_per_token:
        return fused_loss(states, head, targets, gradient_of, low_rank=low_rank)
    logprobs = target_logprobs(states, head, targets, low_rank=low_rank)
    gradient = gradient_of(logprobs, slice(0, len(targets)))
    return logprobs, PendingBackward(logprobs, gradient) if gradient.any() else None


def _push(pending: Sequence[PendingBackward]) -> None:
    """One backward for all parts."""
    if pending:
        torch.autograd.backward([p.output for p in pending], [p.gradient for p in pending])
