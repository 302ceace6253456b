"""How much of the machine a process needs, estimated from the model's files. Pure but for stat."""

from __future__ import annotations

from pathlib import Path

from homefire.control.capacity import Capacity, threads_per_engine
from homefire.control.catalog import ModelConfig, parameter_count, read_model_config
from homefire.control.db.rows import Need
from homefire.wire.specs import TrainerMode

_PROCESS_BYTES = 400 << 20
"""Python, torch and a batch of small rows."""
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
_ACTIVATION_SHARE = 0.5
"""Of the memory that the weights leave: graphs kept for custom losses and large saves want the rest."""


def trainer_need(directory: Path, mode: TrainerMode) -> Need:
    return _need(directory, _BYTES_PER_PARAMETER[mode])


def replica_need(directory: Path) -> Need:
    return _need(directory, _REPLICA_BYTES_PER_PARAMETER)


def _need(directory: Path, bytes_per_parameter: int) -> Need:
    parameters = parameter_count(directory, read_model_config(directory))
    return Need(threads_per_engine(), _PROCESS_BYTES + bytes_per_parameter * parameters)


def micro_batch_tokens(directory: Path, need: Need, capacity: Capacity) -> int:
    """Tokens whose activations fit beside the weights; a row is never cut, so one may exceed it.

    Found once per job and stored with it: bits depend on how a batch is cut.
    """
    room = _ACTIVATION_SHARE * (capacity.memory_bytes - need.memory_bytes)
    fitting = int(room / max(1, _activation_bytes(read_model_config(directory))))
    return max(_SMALLEST_MICRO_BATCH, min(MICRO_BATCH_TOKENS, fitting))


def _activation_bytes(config: ModelConfig) -> int:
    """What autograd keeps of a token, in float32; 0 where the configuration does not tell.

    Measured 24.4 x hidden numbers per layer where the MLP is 3 x hidden.
    """
    text = config.text
    widest = text.intermediate_size or 0
    widest = max(widest) if isinstance(widest, list) else widest
    return 4 * (text.num_hidden_layers or 0) * (12 * (text.hidden_size or 0) + 4 * widest)
