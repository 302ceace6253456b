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
from homefire.wire.errors import InvalidArgument, UnknownSnapshot, WrongCheckpointKind
from homefire.wire.ids import check_name
from homefire.wire.manifest import CheckpointFamily
from homefire.wire.pooled import pool_job_id, run_job_id
from homefire.wire.specs import TrainerSpec

POLICY_SLOT = "policy"
"""The one slot of a dedicated job that trains."""
_CROSS_JOB = "cross_job://"
_TINKER = "tinker://"
_SESSION_MARK = "-s"
_SEGMENTS = {
    CheckpointFamily.STATE: "weights",
    CheckpointFamily.SAMPLER: "sampler_weights",
    CheckpointFamily.EXTERNAL: "external_weights",
}
"""What the protocol calls a family in a path."""


class StatePath(msgspec.Struct, frozen=True):
    slot: str
    name: str
    job: str | None
    """None: a run of the root plane, whose job is to be found."""


def session_prefix(job: str) -> str:
    """Session ids begin with this, so that ids made from them say which job they belong to."""
    return f"{job}{_SESSION_MARK}"


def checkpoint_path(run: str, family: CheckpointFamily, name: str) -> str:
    return f"{_TINKER}{run}/{_SEGMENTS[family]}/{name}"


def parse_state_path(path: str, *, job: str, slot: str) -> StatePath:
    """`job` and `slot` are the model's own, which bare names belong to.

    Raises WrongCheckpointKind for the path of anything else, InvalidArgument for no path at all.
    """
    if path.startswith(_CROSS_JOB):
        source, _, name = path.removeprefix(_CROSS_JOB).partition("/")
        return _checked(source, POLICY_SLOT, name)
    if path.startswith(_TINKER):
        return _parse_tinker(path)
    return _checked(job, slot, path)


def _parse_tinker(path: str) -> StatePath:
    parts = path.removeprefix(_TINKER).split("/")
    if len(parts) != 3:
        raise InvalidArgument(
            f"{path!r} is no checkpoint path", hint="tinker://<model>/weights/<name>", field="path"
        )
    run, segment, name = parts
    if segment != _SEGMENTS[CheckpointFamily.STATE]:
        raise _not_a_state(path)
    job, mark, _ = run.partition(":")[0].rpartition(_SESSION_MARK)
    return _checked(job, POLICY_SLOT, name) if mark else _checked(None, run, name)


def _checked(job: str | None, slot: str, name: str) -> StatePath:
    for part in (name, slot, job):
        if part is not None:
            check_name(part, field="path")
    return StatePath(slot, name, job)


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
    states, snapshots = (
        f"/{_SEGMENTS[family]}/" for family in (CheckpointFamily.STATE, CheckpointFamily.SAMPLER)
    )
    if path.startswith(_TINKER) and snapshots not in path:
        raise InvalidArgument(
            f"{path!r} is no sampler snapshot",
            hint=f"tinker://<model>{snapshots}<name>",
            field="path",
        )
    parsed = parse_state_path(path.replace(snapshots, states, 1), job=spec.job, slot=slot)
    for job in _jobs(store, parsed, spec):
        key = CheckpointKey(spec.account, job, parsed.slot, CheckpointFamily.SAMPLER, parsed.name)
        if store.exists(key):
            return key
    raise UnknownSnapshot(
        f"there is no sampler snapshot {path!r}",
        hint="save one with save_weights_for_sampler first",
        field="path",
    )


def _jobs(store: CheckpointStore, path: StatePath, spec: TrainerSpec) -> Iterator[str]:
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


def _unknown(store: CheckpointStore, path: StatePath, spec: TrainerSpec) -> UnknownSnapshot:
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


def _not_a_state(path: str) -> WrongCheckpointKind:
    return WrongCheckpointKind(
        f"{path!r} is no training state: it has rounded weights and no optimizer",
        hint="load a state that save_state wrote",
        field="path",
    )
