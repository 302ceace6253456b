"""A Hugging Face model in this process as a `Network`: our attention, slot cache and sampler around it.

Axes: B sequences, T prompt tokens of all rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from homefire.inference.engine.network import PrefillResult, PrefillRow, PromptScore
from homefire.inference.engine.protocol import Alternatives, ServedWeights, WeightSet
from homefire.inference.engine.sampler import likeliest, sample
from homefire.inference.engine.sampling_plan import Draws, SamplingPlan, Uniforms
from homefire.model import lora
from homefire.model.attention import AttentionContext, attending
from homefire.model.loading import LoadedModel, load_model
from homefire.model.slots import SlotCache
from homefire.model.tensors import (
    from_raw,
    load_serving_tensors,
    memory_digest,
    raw,
    serving_tensors,
)
from homefire.wire.errors import InvalidArgument
from homefire.wire.manifest import CheckpointKind, whole_digest
from homefire.wire.tensors import digest_tensors

_SCORED_AT_ONCE = 256
"""Prompt positions whose logits exist at once: 256 x 150k float32 logits are 0.15 GB."""


class EmbeddedNetwork:
    """Owns its module and changes its weights in place."""

    def __init__(
        self, directory: Path, *, max_running: int, max_context_length: int, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self._directory = directory
        self._model = load_model(directory)
        self._max_context_length = min(max_context_length, self._model.max_context_length)
        self._cache = SlotCache(
            max_slots=max_running,
            max_length=self._max_context_length,
            device=self._model.device,
        )
        self._is_base = True
        """The module holds the base model's weights, with or without an adapter on them."""
        self._adapter: lora.LoraAdapter | None = None
        self._adapter_hooks = ExitStack()
        _store_by_column(self._model)
        self._head = _Head(self._model)

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    @property
    def max_context_length(self) -> int:
        return self._max_context_length

    @torch.inference_mode()
    def prefill(
        self, rows: Sequence[PrefillRow], plan: SamplingPlan, uniforms: Uniforms
    ) -> PrefillResult:
        lengths = [len(row.tokens) for row in rows]
        tokens = torch.tensor([token for row in rows for token in row.tokens])
        positions = torch.cat([torch.arange(length) for length in lengths])
        context = self._cache.prefilling(lengths, [row.slots for row in rows])
        hidden_TH = self._hidden(tokens, positions, context)
        last = torch.tensor(lengths).cumsum(0) - 1
        logits_BV = self._logits(hidden_TH[last[_row_by_slot(rows)]])
        scores = [
            self._score(row, hidden_TH[end - length : end])
            for row, length, end in zip(rows, lengths, (last + 1).tolist(), strict=True)
        ]
        return PrefillResult(sample(logits_BV, plan, uniforms), scores)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], plan: SamplingPlan, uniforms: Uniforms) -> Draws:
        context = self._cache.decoding(len(tokens))
        hidden_BH = self._hidden(torch.tensor(tokens), context.positions, context)
        return sample(self._logits(hidden_BH), plan, uniforms)

    @torch.inference_mode()
    def move(self, *, source: int, destination: int) -> None:
        self._cache.move(source=source, destination=destination)

    def install(self, weights: WeightSet) -> str:
        if weights.kind is CheckpointKind.LORA:
            return self._install_adapter(weights)
        load_serving_tensors(self._model, weights.tensors)
        self._drop_adapter()
        self._is_base = weights.served.identity is None
        self._head.refresh()
        return memory_digest(self._model)

    def base_weights(self) -> WeightSet:
        return _base_weight_set(load_model(self._directory))

    def resident_weights(self) -> WeightSet:
        """The base model as it was loaded, without a copy of its tensors: they can be read again."""
        served = ServedWeights(None, memory_digest(self._model))
        return WeightSet(served, CheckpointKind.BASE, {})

    def _install_adapter(self, weights: WeightSet) -> str:
        adapter = _adapter_of(weights)
        lora.check_fits(self._model, adapter)
        if not self._is_base:
            self.install(self.base_weights())
        self._drop_adapter()
        self._adapter = adapter
        self._adapter_hooks.enter_context(lora.applied(self._model, adapter))
        tensors = {name: raw(tensor) for name, tensor in lora.peft_tensors(adapter).items()}
        return whole_digest(digest_tensors(tensors))

    def _drop_adapter(self) -> None:
        self._adapter_hooks.close()
        self._adapter = None

    def _hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """tokens, positions int64 [T] -> [T, H]"""
        device = self._model.device
        with attending(context):
            output = self._model.backbone(
                input_ids=tokens[None].to(device),
                position_ids=positions[None].to(device),
                use_cache=False,
            )
        return output.last_hidden_state[0]

    def _logits(self, hidden_BH: Tensor) -> Tensor:
        logits_BV = self._head(hidden_BH)
        if self._adapter is None:
            return logits_BV
        update = lora.head_update(self._model, self._adapter, hidden_BH)
        return logits_BV if update is None else logits_BV.addmm(update[0], update[1].t())

    def _score(self, row: PrefillRow, hidden_TH: Tensor) -> PromptScore:
        """Logprobs of the row's own tokens; position p is predicted by the hidden state before it."""
        if row.score_from is None:
            return PromptScore([], [])
        logprobs: list[float] = []
        alternatives: list[Alternatives] = []
        if row.score_from == 0:
            logprobs.append(0.0)
            alternatives += [[]] * bool(row.num_alternatives)
        start = max(row.score_from, 1)
        targets = torch.tensor(row.tokens[start:], device=hidden_TH.device)
        for hidden, target in zip(
            hidden_TH[start - 1 : -1].split(_SCORED_AT_ONCE),
            targets.split(_SCORED_AT_ONCE),
            strict=True,
        ):
            logprobs_TV = self._logits(hidden).float().log_softmax(-1)
            logprobs += logprobs_TV.gather(-1, target[:, None])[:, 0].tolist()
            alternatives += likeliest(logprobs_TV, row.num_alternatives)
        return PromptScore(logprobs, alternatives)


class _Head:
    """The lm_head, stored by column. A tied head gets a copy: looking up embeddings wants rows."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._copy: Tensor | None = None
        self.refresh()

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self._model.head_weight if self._copy is None else self._copy
        return F.linear(hidden, weight)

    def refresh(self) -> None:
        """After every change of the weights: a stale tied head would be wrong without any error."""
        if self._model.tied:
            self._copy = _by_column(self._model.head_weight)


def _store_by_column(model: LoadedModel) -> None:
    """Linear weights become transposed views of contiguous [in, out] matrices: same values, names and
    shapes, and small-batch products are 1.2 to 1.9 times faster on CPU (measured with MKL)."""
    for module in model.module.modules():
        if type(module) is nn.Linear and not (model.tied and module is model.head):
            module.weight.data = _by_column(module.weight)


def _by_column(weight: Tensor) -> Tensor:
    return weight.detach().t().contiguous().t()


def _row_by_slot(rows: Sequence[PrefillRow]) -> Tensor:
    """int64 [slots]: which row each slot continues, the slots in ascending order."""
    pairs = sorted((slot, i) for i, row in enumerate(rows) for slot in row.slots)
    return torch.tensor([row for _, row in pairs])


def _adapter_of(weights: WeightSet) -> lora.LoraAdapter:
    if weights.lora is None:
        raise InvalidArgument(f"the manifest of {weights.served.name!r} has no lora settings")
    config = {"r": weights.lora.rank, "lora_alpha": weights.lora.alpha}
    tensors = {name: from_raw(tensor) for name, tensor in weights.tensors.items()}
    return lora.adapter_from_peft(tensors, config)


def _base_weight_set(model: LoadedModel) -> WeightSet:
    tensors = {name: raw(tensor) for name, tensor in serving_tensors(model).items()}
    digest = whole_digest(digest_tensors(tensors))
    return WeightSet(ServedWeights(None, digest), CheckpointKind.BASE, tensors)
