"""Where a path that the root plane's clients give lies in the store.

tinker://ts-3f…:train:0/weights/step-2            a state of a run of the root plane
tinker://ts-3f…:train:0/sampler_weights/step-2    a sampler snapshot of it
tinker://job-3f…-s9c…:train:0/…                   the same of a dedicated job, whose slot is `policy`
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress

import msgspec

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.control.db import tables, tinker_tables
from homefire.control.db.rows import JobRow, TinkerRunRow
from homefire.wire.checkpoint_paths import CheckpointPath, parse_checkpoint_path
from homefire.wire.errors import UnknownSnapshot, WrongCheckpointKind
from homefire.wire.ids import POLICY_SLOT, job_of_model
from homefire.wire.manifest import CheckpointFamily


class CheckpointHome(msgspec.Struct, frozen=True):
    """The job and the slot that a run's checkpoints lie in."""

    job: JobRow
    slot: str
    run: TinkerRunRow | None
    """None: of a dedicated job."""

    def key(self, path: CheckpointPath) -> CheckpointKey:
        return CheckpointKey(self.job.account, self.job.id, self.slot, path.family, path.name)


def state_path(path: str, *, field: str) -> CheckpointPath:
    """A path that training can be resumed from."""
    parsed = parse_checkpoint_path(path, field=field)
    if parsed.family is not CheckpointFamily.STATE:
        raise WrongCheckpointKind(
            f"{path!r} is a sampler snapshot: it has no optimizer and rounded weights",
            hint="load a state that save_state wrote",
            field=field,
        )
    return parsed


def sampler_path(path: str, *, field: str) -> CheckpointPath:
    """A path that can be sampled from."""
    parsed = parse_checkpoint_path(path, field=field)
    if parsed.family is not CheckpointFamily.SAMPLER:
        raise WrongCheckpointKind(
            f"{path!r} is a training state, which no sampler loads",
            hint="save one with save_weights_for_sampler",
            field=field,
        )
    return parsed


def find_home(
    connection: sqlite3.Connection, account: str, path: CheckpointPath, *, field: str
) -> CheckpointHome:
    """UnknownSnapshot, also for another account's run."""
    run = tinker_tables.run(connection, path.run)
    job_id, slot = (run.job, run.id) if run else (job_of_model(path.run), POLICY_SLOT)
    job = tables.job(connection, job_id) if job_id else None
    if job is None or job.account != account:
        raise UnknownSnapshot(
            f"training run {path.run!r} does not exist in account {account!r}",
            hint="`tinker run list` shows the runs of this account",
            field=field,
        )
    return CheckpointHome(job, slot, run)


def check_exists(
    store: CheckpointStore, home: CheckpointHome, path: CheckpointPath, *, field: str
) -> CheckpointKey:
    """UnknownSnapshot, also for what has expired, names some that exist. Blocks on the disk."""
    key = home.key(path)
    with suppress(UnknownSnapshot):
        store.loadable(key)
        return key
    manifests = store.list(key.account, key.job, slot=key.slot, family=key.family)
    known = ", ".join(manifest.identity for manifest in manifests[-5:])
    kind = "saved state" if path.family is CheckpointFamily.STATE else "sampler snapshot"
    raise UnknownSnapshot(
        f"training run {path.run} has no {kind} {path.name!r}",
        hint=f"it has {known}" if known else "it has none yet",
        field=field,
    )
