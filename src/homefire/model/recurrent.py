"""Convolution and recurrent states of running sequences, joined by slot beside the key/value slots.

They live in layers of transformers' own cache, as every model that keeps its state there expects. Between
passes we hold them as one tensor per layer and kind, a row per slot; a decoding pass gets views of the
running slots' rows. Keys and values pass through: our attention keeps them.

Axes: B running slots, S slots held, T tokens of one text, W hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from homefire.model.attention import AttentionContext, attending
from homefire.model.padded import ByRow
from homefire.model.slots import SlotCache

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_Place = tuple[int, str, int]
"""Layer, kind of state, number of the state within the layer."""
_KINDS = {
    "conv_states": "is_conv_states_initialized",
    "recurrent_states": "is_recurrent_states_initialized",
}
"""Where a cache layer has them, and where it says that it has."""
_FLAGS = (*_KINDS.values(), "has_previous_state", "conv_kernel_size")


class RecurrentStates:
    """Owned by one thread, filled and moved in step with a `SlotCache`."""

    def __init__(self, config: PreTrainedConfig, *, max_slots: int) -> None:
        self._config = config
        self._max_slots = max_slots
        self._states: dict[_Place, Tensor] = {}
        """[S, …], as one text's state."""
        self._flags: dict[int, dict[str, dict[int, Any]]] = {}
        """What a layer says of its states once a text has begun, by layer."""

    def beginning(self) -> DynamicCache:
        """For a text of which nothing was computed."""
        return _cache(self._config, seen=0)

    def keep(self, cache: DynamicCache, slots: Sequence[int]) -> None:
        """Takes over the state of the one text of `cache`, for each of the slots."""
        for place, state in _found(cache):
            self._joined(place, state, 1 + max(slots))[list(slots)] = state
        for index, layer in _stateful_layers(cache):
            self._flags[index] = {name: dict(getattr(layer, name)) for name in _FLAGS}

    def running(self, num_running: int, *, longest: int) -> DynamicCache:
        """The first `num_running` slots, of up to `longest` tokens; what a pass writes into the cache is
        theirs after `keep_running`."""
        cache = _cache(self._config, seen=longest)
        for index, layer in _stateful_layers(cache):
            for name, flags in self._flags[index].items():
                setattr(layer, name, dict(flags))
        for (index, kind, number), joined in self._states.items():
            state = joined[:num_running]
            layer: Any = cache.layers[index]
            getattr(layer, kind)[number] = state
            layer.dtype, layer.device = state.dtype, state.device
        return cache

    def keep_running(self, cache: DynamicCache, num_running: int) -> None:
        """Models write into the state or put another in its place."""
        for place, state in _found(cache):
            mine = self._states[place][:num_running]
            if state.data_ptr() != mine.data_ptr():
                mine.copy_(state)

    def move(self, *, source: int, destination: int) -> None:
        for joined in self._states.values():
            joined[destination] = joined[source]

    def _joined(self, place: _Place, state: Tensor, num_slots: int) -> Tensor:
        """Storage of at least that many slots, grown by doubling."""
        held = self._states.get(place)
        if held is None or len(held) < num_slots:
            size = min(self._max_slots, max(num_slots, 2 * len(held) if held is not None else 1))
            joined = state.new_zeros(size, *state.shape[1:])
            if held is not None:
                joined[: len(held)] = held
            self._states[place] = held = joined
        return held


def text_hidden(
    model: LoadedModel,
    slots: SlotCache,
    states: RecurrentStates,
    tokens: Tensor,
    kept_in: Sequence[int],
) -> Tensor:
    """tokens int64 [T] of one text, never padded: its state would run on over the padding -> [T, W].

    Keys, values and state are kept in each of the slots `kept_in`, of which there may be none.
    """
    context = slots.prefilling([len(tokens)], [kept_in])
    cache = states.beginning()
    positions = torch.arange(len(tokens), device=tokens.device)
    hidden = _run(model, tokens[None], positions[None], context, cache)[0]
    if kept_in:
        states.keep(cache, kept_in)
    return hidden


def decoded_hidden(
    model: LoadedModel, slots: SlotCache, states: RecurrentStates, tokens: Tensor
) -> Tensor:
    """tokens int64 [B], one for each running slot -> [B, W]."""
    context = slots.decoding(len(tokens))
    positions = context.positions.to(tokens.device)
    cache = states.running(len(tokens), longest=int(positions.max()))
    hidden = _run(model, tokens[:, None], positions[:, None], ByRow(context), cache)
    states.keep_running(cache, len(tokens))
    return hidden[:, 0]


def _run(
    model: LoadedModel,
    tokens: Tensor,
    positions: Tensor,
    context: AttentionContext,
    cache: DynamicCache,
) -> Tensor:
    named = {cache_argument(model.backbone): cache}
    with attending(context):
        output = model.backbone(input_ids=tokens, position_ids=positions, use_cache=True, **named)
    return output.last_hidden_state


def cache_argument(module: nn.Module) -> str:
    """transformers renames it: some releases warn of the old name, others know only that."""
    known = inspect.signature(module.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class _PassingLayer(DynamicLayer):
    """Of an attention layer: gives keys and values back and only says how many tokens went before."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self._seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0


class _PassingStatefulLayer(LinearAttentionAndFullAttentionLayer):
    """The same for a layer that has attention and state beside each other (Falcon-H1)."""

    def __init__(self, seen: int, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self._seen = seen

    update = _PassingLayer.update
    get_seq_length = _PassingLayer.get_seq_length
    get_mask_sizes = _PassingLayer.get_mask_sizes


def _cache(config: PreTrainedConfig, *, seen: int) -> DynamicCache:
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, DynamicLayer):
            cache.layers[index] = _PassingStatefulLayer(seen, layer.number_of_states)
        elif isinstance(layer, DynamicLayer):
            cache.layers[index] = _PassingLayer(seen)
    return cache


def _stateful_layers(cache: DynamicCache) -> Iterator[tuple[int, Any]]:
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            yield index, layer


def _found(cache: DynamicCache) -> Iterator[tuple[_Place, Tensor]]:
    """Every state that a pass has left in the cache."""
    for index, layer in _stateful_layers(cache):
        for kind in _KINDS:
            for number, state in getattr(layer, kind).items():
                if state is not None:
                    yield (index, kind, number), state
