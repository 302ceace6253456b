"""What a family is compared with: Hugging Face's own attention, a text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from homefire.inference.engine.protocol import Prefilled, SequenceRequest
from homefire.model.layout import RowLayout
from homefire.model.loading import LoadedModel, load_model
from homefire.model.packed import packed_hidden, packed_logprobs
from parity.random_decoders import VOCABULARY
from parity.sampler_models import open_bench, prompt, reference, worst
from unit.inference.scheduler_bench import tokens_of

LENGTHS = (5, 17, 42, 30, 42, 1)
"""Longer than the windows, two of one length, and a text of one token."""
SAMPLES = ((5, 20), (17, 7), (9, 33), (30, 12), (28, 9))
"""Prompts and new tokens, over fewer slots than texts, so that some are admitted late."""
SLOTS, CHUNK = 3, 16


@dataclass(frozen=True)
class Packed:
    """Largest differences from Hugging Face one text at a time."""

    layout: RowLayout
    floor: float
    """Of Hugging Face itself, its texts padded into one batch. Nats."""
    logprob: float
    """Nats."""
    gradient: float
    """By parameter, relative to its largest gradient (or a thousandth of the model's)."""


def packed(directory: Path) -> Packed:
    rows, own = texts(), original(directory)
    with torch.no_grad():
        floor = apart(padded(own, rows), alone(own, rows))
    theirs = alone(own, rows)
    model = load_model(directory)
    ours = packed_rows(model, rows)
    weights = torch.randn(sum(map(len, theirs)), generator=torch.Generator().manual_seed(4))
    return Packed(
        model.layout,
        floor,
        apart(ours, theirs),
        gradient_error(gradients(model.module, ours, weights), gradients(own, theirs, weights)),
    )


def decoded(directory: Path) -> float:
    """Logprobs of the sampler's tokens against a forward over each whole text. Nats.

    The longer prompts are computed in chunks, and a last one begins with what the cache holds.
    """
    bench = open_bench(directory, max_running=SLOTS, prefill_tokens=CHUNK)
    requests = [SequenceRequest(prompt(n, i), new, seed=i) for i, (n, new) in enumerate(SAMPLES)]
    recorders = [bench.submit(request)[1] for request in requests[:-1]]
    for _ in range(4):
        bench.step()
    recorders.append(bench.submit(requests[-1])[1])
    bench.run()
    turn = (*requests[-1].prompt, *tokens_of(recorders[-1]), *prompt(3, 9))
    requests.append(SequenceRequest(turn, 5, seed=9))
    recorders.append(bench.submit(requests[-1])[1])
    bench.run()
    keeps_prefixes = bench.scheduler._network.num_blocks > 0
    num_cached = recorders[-1].of(Prefilled)[0].num_cached_tokens
    assert num_cached >= CHUNK if keeps_prefixes else num_cached == 0
    logprobs = reference(directory)
    pairs = zip(requests, recorders, strict=True)
    return max(worst(logprobs, request, recorder) for request, recorder in pairs)


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def original(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def packed_rows(model: LoadedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logprobs of each row's next tokens from one packed batch."""
    lengths, tokens = [len(row) for row in rows], torch.cat(list(rows))
    logprobs = packed_logprobs(model, packed_hidden(model, tokens, lengths), tokens.roll(-1))
    return [row[:-1] for row in logprobs.split(lengths)]


def alone(module: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """The same, one row at a time."""
    return [
        _next_logprobs(module(input_ids=row[None], use_cache=False).logits[0], row) for row in rows
    ]


def padded(module: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """The same from one right-padded batch."""
    longest = max(map(len, rows))
    batch = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows])
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    logits = module(input_ids=batch, attention_mask=mask, use_cache=False).logits
    return [_next_logprobs(logits[i, : len(row)], row) for i, row in enumerate(rows)]


def apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest difference."""
    difference = torch.cat(list(first)) - torch.cat(list(second))
    return difference.detach().abs().max().item()


def gradients(
    module: PreTrainedModel, logprobs: Sequence[Tensor], weights: Tensor
) -> dict[str, Tensor]:
    (torch.cat(list(logprobs)) * weights).sum().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def gradient_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(
        float((ours[name] - gradient).abs().max()) / max(float(gradient.abs().max()), least)
        for name, gradient in theirs.items()
    )


def _next_logprobs(logits: Tensor, row: Tensor) -> Tensor:
    return logits[:-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
