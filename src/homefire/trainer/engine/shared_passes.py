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
from homefire.model.packed import packed_hidden, target_logprobs
from homefire.model.packed_lora import Segment, applied_by_segment
from homefire.trainer.engine.network import Float32, Part
from homefire.trainer.engine.residence import Residence
from homefire.trainer.engine.torch_weights import LoraWeights


def backward_together(residence: Residence, parts: Sequence[Part]) -> list[Float32]:
    """Logprobs [T, K] of each part; its gradient is added aside on its weights."""
    model = residence.model
    residence.use_base()
    model.module.requires_grad_(False)
    segments = [Segment(_adapted(part).adapter, len(part.batch.tokens)) for part in parts]
    with applied_by_segment(model, segments):
        logprobs = _logprobs(model, segments, parts)
        values = [output.detach().cpu().numpy() for output in logprobs]
        _push(logprobs, [part.gradient_of(v) for part, v in zip(parts, values, strict=True)])
    return values


def _adapted(part: Part) -> LoraWeights:
    if not isinstance(part.weights, LoraWeights):
        raise TypeError(f"{type(part.weights).__name__} shares no pass")
    return part.weights


def _logprobs(
    model: LoadedModel, segments: Sequence[Segment], parts: Sequence[Part]
) -> list[Tensor]:
    """[T, K] of each part, differentiable."""
    tokens = torch.cat([torch.from_numpy(part.batch.tokens) for part in parts]).to(model.device)
    lengths = [length for part in parts for length in part.batch.lengths]
    hidden = packed_hidden(model, tokens, lengths)
    logprobs: list[Tensor] = []
    for segment, part, states in zip(
        segments, parts, hidden.split([s.num_tokens for s in segments]), strict=True
    ):
        targets = torch.from_numpy(part.batch.targets).to(model.device)
        low_rank = head_update(model, segment.adapter, states)
        logprobs.append(target_logprobs(states, model.logits_head, targets, low_rank=low_rank))
    return logprobs


def _push(outputs: Sequence[Tensor], gradients: Sequence[Float32]) -> None:
    """Backward through the outputs whose gradient is not zero throughout."""
    pushed = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g.any()]
    if pushed:
        torch.autograd.backward(
            [output for output, _ in pushed],
            [torch.from_numpy(gradient).to(output.device) for output, gradient in pushed],
        )
