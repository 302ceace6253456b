"""How much of the machine a process needs, estimated from the model's files. Pure but for stat."""

from __future__ import annotations

from pathlib import Path

from homefire.control.capacity import threads_per_engine
from homefire.control.catalog import parameter_count, read_model_config
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


def trainer_need(directory: Path, mode: TrainerMode) -> Need:
    return _need(directory, _BYTES_PER_PARAMETER[mode])


def replica_need(directory: Path) -> Need:
    return _need(directory, _REPLICA_BYTES_PER_PARAMETER)


def _need(directory: Path, bytes_per_parameter: int) -> Need:
    parameters = parameter_count(directory, read_model_config(directory))
    return Need(threads_per_engine(), _PROCESS_BYTES + bytes_per_parameter * parameters)
