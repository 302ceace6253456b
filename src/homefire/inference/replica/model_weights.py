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
from homefire.wire.errors import InvalidArgument, WeightsMismatch, WrongCheckpointKind
from homefire.wire.ids import BASE_IDENTITY
from homefire.wire.manifest import CheckpointFamily

_SCHEME = "tinker://"


@asynccontextmanager
async def weights_of(
    model: str, expected: str | None, replica: Replica
) -> AsyncIterator[ServedWeights | None]:
    """None: the full weights that serve, whichever they are. `expected` is the request's
    `expect_identity`.

    WeightsMismatch when an identity is asked for that does not serve.
    """
    path = _snapshot(model)
    if not replica.spec.samples_job:
        if path is not None:
            raise InvalidArgument(
                f"deployment {replica.spec.deployment!r} samples no training run",
                hint="name the snapshot alone as model; its own sampler serves it",
                field="model",
            )
        replica.check_open()
        yield _insisted(model, expected, replica.engine.serving())
        return
    run, name = await _asked(model, path, replica)
    weights = replica.session_weights
    async with weights.serving_newest(replica.engine, run=run, snapshot=name) as served:
        _check(expected, served, field="expect_identity")
        yield served


def _insisted(model: str, expected: str | None, serving: ServedWeights) -> ServedWeights | None:
    asked = identity_asked(model)
    _check(asked, serving, field="model")
    _check(expected, serving, field="expect_identity")
    return None if asked is None and expected is None else serving


def _check(asked: str | None, weights: ServedWeights, *, field: str) -> None:
    if asked is not None and asked != weights.name:
        raise WeightsMismatch(
            f"{asked!r} was asked for, {weights.name!r} is served",
            hint=f"hot load it first, or leave the identity out of {field}",
            field=field,
            current=weights.name,
        )


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
