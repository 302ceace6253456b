"""How much of the machine a process needs, estimated from the model's files. Pure but for stat."""

from __future__ import annotations

from pathlib import Path

from homefire.control.capacity import Capacity, threads_per_engine
from homefire.control.catalog import parameter_count, read_model_config
from homefire.control.db.rows import Need
from homefire.wire.specs import ActivationBudget, TrainerMode

_PROCESS_BYTES = 400 << 20
"""Of each rank: Python, torch and a batch of small rows."""
_WHOLE_COPY_BYTES_PER_PARAMETER = 4
"""Of each rank, for a mixture of experts: its files are converted whole before a rank keeps its part."""
_BYTES_PER_PARAMETER = {
    TrainerMode.FULL: 22,  # float32 masters, two moments, gradient, compute copy, last snapshot
    TrainerMode.LORA: 6,
    TrainerMode.FORWARD_ONLY: 6,
}
_REPLICA_BYTES_PER_PARAMETER = 8
"""The served weights in float32, and the next ones beside them during a hot load."""

MICRO_BATCH_TOKENS = 2048
"""What a CPU is fastest with: of 512 to 8192 tokens, 1024 to 2048 took the least time on models of
0.8 and 34 M parameters, 8 to 12 % less than 8192, whose activations leave the caches."""
_SMALLEST_MICRO_BATCH = 128
_NUMBER_BYTES = 4
"""Of an activation, float32 on CPU."""
_ACTIVATION_SHARE = 0.5
"""Of the memory that the weights leave: graphs kept for custom losses and large saves want the rest."""


def trainer_need(directory: Path, mode: TrainerMode, ranks: int = 1) -> Need:
    """Of all ranks together. They share what one engine gets of the cores, a thread each at least."""
    threads = max(1, threads_per_engine() // ranks)
    divided = _BYTES_PER_PARAMETER[mode] * _num_parameters(directory)
    more = (ranks - 1) * (_PROCESS_BYTES + _gathered_bytes(directory))
    return Need(ranks * threads, _PROCESS_BYTES + divided + more)


def _gathered_bytes(directory: Path) -> int:
    """What a rank holds beside its part: during a pass embedding and head are whole, in float32."""
    config = read_model_config(directory)
    if config.is_moe:
        return _WHOLE_COPY_BYTES_PER_PARAMETER * _num_parameters(directory)
    return 2 * 4 * (config.text.vocab_size or 0) * (config.text.hidden_size or 0)


def replica_need(directory: Path) -> Need:
    weights = _REPLICA_BYTES_PER_PARAMETER * _num_parameters(directory)
    return Need(threads_per_engine(), _PROCESS_BYTES + weights)


def _num_parameters(directory: Path) -> int:
    return parameter_count(directory, read_model_config(directory))


def micro_batch_tokens(directory: Path, need: Need, capacity: Capacity, ranks: int = 1) -> int:
    """Tokens whose activations fit beside the weights; a row is never cut, so one may exceed it. Each
    rank has its own of them at the same time.

    Found once per job and stored with it: bits depend on how a batch is cut.
    """
    activations = activation_budget(directory, need, capacity, ranks)
    if activations is None:
        return MICRO_BATCH_TOKENS
    token_bytes = activations.layer_token_bytes * activations.num_layers
    return max(_SMALLEST_MICRO_BATCH, min(MICRO_BATCH_TOKENS, activations.max_bytes // token_bytes))


def activation_budget(
    directory: Path, need: Need, capacity: Capacity, ranks: int = 1
) -> ActivationBudget | None:
    """What each rank's pass may keep beside the weights, and what a float32 token takes; None where
    the configuration does not tell.

    Measured 24.4 x hidden numbers per layer where the MLP is 3 x hidden.
    """
    text = read_model_config(directory).text
    if not text.num_hidden_layers or not text.hidden_size:
        return None
    widest = text.intermediate_size or 0
    widest = max(widest) if isinstance(widest, list) else widest
    room = _ACTIVATION_SHARE * (capacity.memory_bytes - need.memory_bytes)
    return ActivationBudget(
        max_bytes=max(0, int(room / ranks)),
        layer_token_bytes=_NUMBER_BYTES * (12 * text.hidden_size + 4 * widest),
        input_token_bytes=_NUMBER_BYTES * text.hidden_size,
        num_layers=text.num_hidden_layers,
    )
