"""Where a client's checkpoint path leads to.

step-2                                 a state of this job
cross_job://job-3f9a1c2e/step-2        a state of another job of the account
tinker://<model_id>/weights/step-2     the same; the model id begins with its job's id
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.trainer.front.sessions import POLICY_SLOT
from homefire.wire.errors import InvalidArgument, UnknownSnapshot, WrongCheckpointKind
from homefire.wire.ids import check_name
from homefire.wire.manifest import CheckpointFamily, Manifest

_CROSS_JOB = "cross_job://"
_TINKER = "tinker://"
_SESSION_MARK = "-s"


class StatePath(msgspec.Struct, frozen=True):
    job: str
    name: str


def session_prefix(job: str) -> str:
    """Session ids begin with this, so that ids made from them say which job they belong to."""
    return f"{job}{_SESSION_MARK}"


def parse_state_path(path: str, *, job: str) -> StatePath:
    """Raises WrongCheckpointKind for a sampler snapshot's path, InvalidArgument for no path at all."""
    if path.startswith(_CROSS_JOB):
        source, _, name = path.removeprefix(_CROSS_JOB).partition("/")
        return _checked(source, name)
    if path.startswith(_TINKER):
        return _parse_tinker(path)
    return _checked(job, path)


def _parse_tinker(path: str) -> StatePath:
    parts = path.removeprefix(_TINKER).split("/")
    if len(parts) != 3:
        raise InvalidArgument(
            f"{path!r} is no checkpoint path", hint="tinker://<model>/weights/<name>", field="path"
        )
    model, family, name = parts
    if family != "weights":
        raise _not_a_state(path)
    return _checked(model.partition(":")[0].rpartition(_SESSION_MARK)[0], name)


def _checked(job: str, name: str) -> StatePath:
    return StatePath(check_name(job, field="path"), check_name(name, field="path"))


def find_state(store: CheckpointStore, path: str, *, account: str, job: str) -> Path:
    """The directory of a committed state. Blocks on the disk."""
    return store.directory(_state_key(store, path, account=account, job=job))


def state_manifest(store: CheckpointStore, path: str, *, account: str, job: str) -> Manifest:
    return store.manifest(_state_key(store, path, account=account, job=job))


def _state_key(store: CheckpointStore, path: str, *, account: str, job: str) -> CheckpointKey:
    parsed = parse_state_path(path, job=job)
    where = (account, parsed.job, POLICY_SLOT)
    key = CheckpointKey(*where, CheckpointFamily.STATE, parsed.name)
    if store.exists(key):
        return key
    if store.exists(CheckpointKey(*where, CheckpointFamily.SAMPLER, parsed.name)):
        raise _not_a_state(path)
    known = state_names(store, account=account, job=parsed.job)
    raise UnknownSnapshot(
        f"job {parsed.job} has no saved state {parsed.name!r}",
        hint=f"it has {', '.join(known[-5:])}" if known else "save one with save_state first",
        field="path",
    )


def state_names(store: CheckpointStore, *, account: str, job: str) -> list[str]:
    manifests = store.list(account, job, slot=POLICY_SLOT, family=CheckpointFamily.STATE)
    return sorted(manifest.identity for manifest in manifests)


def _not_a_state(path: str) -> WrongCheckpointKind:
    return WrongCheckpointKind(
        f"{path!r} is a sampler snapshot: it has no optimizer and rounded weights",
        hint="load a state that save_state wrote",
        field="path",
    )
