"""The weights that a completion's `model` names, had for as long as it runs.

An ordinary deployment serves one snapshot at a time, which a request may insist on. The sampler of a root
job serves the base model and all that the job saved: a request says which.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from homefire.inference.engine.protocol import ServedWeights
from homefire.inference.replica.replica import Replica, identity_asked
from homefire.wire.checkpoint_paths import CheckpointPath, parse_checkpoint_path
from homefire.wire.errors import InvalidArgument, WrongCheckpointKind
from homefire.wire.ids import BASE_IDENTITY
from homefire.wire.manifest import CheckpointFamily

_SCHEME = "tinker://"


@asynccontextmanager
async def weights_of(model: str, replica: Replica) -> AsyncIterator[ServedWeights | None]:
    """None: the full weights that serve at its admission, which `Replica.check_asked` judges."""
    path = _snapshot(model)
    if not replica.spec.samples_job:
        if path is not None:
            raise InvalidArgument(
                f"deployment {replica.spec.deployment!r} samples no training run",
                hint="name the snapshot alone as model; its own sampler serves it",
                field="model",
            )
        replica.check_open()
        replica.check_asked(model, replica.engine.serving())
        yield None
        return
    run, name = await _asked(model, path, replica)
    weights = replica.session_weights
    async with weights.serving_newest(replica.engine, run=run, snapshot=name) as served:
        yield served


async def _asked(model: str, path: CheckpointPath | None, replica: Replica) -> tuple[str, str]:
    """Run and name of a snapshot; both empty for the base model."""
    if path is not None:
        return path.run, path.name
    identity = identity_asked(model)
    if identity is None or identity == BASE_IDENTITY:
        return "", ""
    return await replica.session_weights.run_of(identity), identity


def _snapshot(model: str) -> CheckpointPath | None:
    if not model.startswith(_SCHEME):
        return None
    path = parse_checkpoint_path(model, field="model")
    if path.family is not CheckpointFamily.SAMPLER:
        raise WrongCheckpointKind(
            f"{model!r} is no sampler snapshot",
            hint="save one with save_weights_for_sampler",
            field="model",
        )
    return path


def name_of(model: str, weights: ServedWeights, replica: Replica) -> str:
    """`model` in the answer: what asks for the same weights again."""
    return model if model.startswith(_SCHEME) else replica.model_name(weights)
