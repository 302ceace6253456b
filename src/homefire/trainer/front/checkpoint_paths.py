"""What clients call a checkpoint, and where a path that they give leads to.

step-2                                    a state of the model's own slot
cross_job://job-3f9a1c2e/step-2           a state of a dedicated job of the account
tinker://job-3f…-s9c…:train:0/weights/s   the same; the session's id begins with its job's
tinker://ts-3f…:train:0/weights/s         a state of a run of the root plane: of this pool, of a job
                                          of its own, or of another pool of the account
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.wire.checkpoint_paths import (
    CheckpointPath,
    is_checkpoint_path,
    parse_checkpoint_path,
    parse_cross_job_path,
)
from homefire.wire.errors import UnknownSnapshot, WrongCheckpointKind
from homefire.wire.ids import POLICY_SLOT, check_name, job_of_model
from homefire.wire.manifest import CheckpointFamily
from homefire.wire.pooled import pool_job_id, run_job_id
from homefire.wire.specs import TrainerSpec


class Place(msgspec.Struct, frozen=True):
    """Where a path leads, before the store is looked at."""

    slot: str
    name: str
    job: str | None
    """None: a run of the root plane, whose job is to be found."""


def parse_state_path(path: str, *, job: str, slot: str) -> Place:
    """`job` and `slot` are the model's own, which bare names belong to.

    Raises WrongCheckpointKind for the path of anything else, InvalidArgument for no path at all.
    """
    return _place(path, CheckpointFamily.STATE, job=job, slot=slot)


def _place(path: str, family: CheckpointFamily, *, job: str, slot: str) -> Place:
    if (other := parse_cross_job_path(path)) is not None:
        return Place(POLICY_SLOT, other.name, other.job)
    if not is_checkpoint_path(path):
        return Place(slot, check_name(path, field="path"), job)
    parsed = parse_checkpoint_path(path)
    if parsed.family is not family:
        raise _wrong_kind(path, family, parsed)
    dedicated = job_of_model(parsed.run)
    return Place(POLICY_SLOT if dedicated else parsed.run, parsed.name, dedicated)


def find_state(store: CheckpointStore, path: str, *, spec: TrainerSpec, slot: str) -> CheckpointKey:
    """Of a committed state. Blocks on the disk."""
    parsed = parse_state_path(path, job=spec.job, slot=slot)
    for job in _jobs(store, parsed, spec):
        key = CheckpointKey(spec.account, job, parsed.slot, CheckpointFamily.STATE, parsed.name)
        if store.exists(key):
            return key
        if store.exists(msgspec.structs.replace(key, family=CheckpointFamily.SAMPLER)):
            raise _not_a_state(path)
    raise _unknown(store, parsed, spec)


def find_snapshot(
    store: CheckpointStore, path: str, *, spec: TrainerSpec, slot: str
) -> CheckpointKey:
    """Of a committed sampler snapshot, by the same forms of paths. Blocks on the disk."""
    parsed = _place(path, CheckpointFamily.SAMPLER, job=spec.job, slot=slot)
    for job in _jobs(store, parsed, spec):
        key = CheckpointKey(spec.account, job, parsed.slot, CheckpointFamily.SAMPLER, parsed.name)
        if store.exists(key):
            return key
    raise UnknownSnapshot(
        f"there is no sampler snapshot {path!r}",
        hint="save one with save_weights_for_sampler first",
        field="path",
    )


def _jobs(store: CheckpointStore, path: Place, spec: TrainerSpec) -> Iterator[str]:
    """Where the slot may be, likeliest first; all jobs of the account, so that an error can say
    that a run has another base model."""
    if path.job is not None:
        yield path.job
        return
    pool = pool_job_id(spec.account, spec.model_dir)
    likely = dict.fromkeys((spec.job, pool, run_job_id(spec.account, path.slot)))
    yield from likely
    yield from (job for job in store.jobs(spec.account) if job not in likely)


def state_names(store: CheckpointStore, *, account: str, job: str, slot: str) -> list[str]:
    manifests = store.list(account, job, slot=slot, family=CheckpointFamily.STATE)
    return sorted(manifest.identity for manifest in manifests)


def _unknown(store: CheckpointStore, path: Place, spec: TrainerSpec) -> UnknownSnapshot:
    owner = f"job {path.job}" if path.slot == POLICY_SLOT else f"training run {path.slot}"
    known = [
        name
        for job in _jobs(store, path, spec)
        for name in state_names(store, account=spec.account, job=job, slot=path.slot)
    ]
    return UnknownSnapshot(
        f"{owner} has no saved state {path.name!r}",
        hint=f"it has {', '.join(known[-5:])}" if known else "save one with save_state first",
        field="path",
    )


def _wrong_kind(path: str, wanted: CheckpointFamily, found: CheckpointPath) -> WrongCheckpointKind:
    if wanted is CheckpointFamily.STATE:
        return _not_a_state(path)
    instead = CheckpointPath(found.run, wanted, found.name)
    return WrongCheckpointKind(
        f"{path!r} is no sampler snapshot", hint=f"name one, such as {instead}", field="path"
    )


def _not_a_state(path: str) -> WrongCheckpointKind:
    return WrongCheckpointKind(
        f"{path!r} is no training state: a sampler snapshot has rounded weights and no optimizer",
        hint="load a state that save_state wrote",
        field="path",
    )
