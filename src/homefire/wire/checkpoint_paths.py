"""What the protocols call a checkpoint. Tinker's:

tinker://ts-3f…:train:0/weights/step-40             a training state
tinker://ts-3f…:train:0/sampler_weights/step-40     a snapshot to sample from
tinker://ts-3f…:train:0/external_weights/step-40    weights to take elsewhere

The part behind the run is the checkpoint's id within the run. Fireworks' name for another dedicated
job's checkpoint is cross_job://job-3f9a1c2e/step-40.
"""

from __future__ import annotations

import msgspec

from homefire.wire.errors import InvalidArgument
from homefire.wire.ids import check_name
from homefire.wire.manifest import CheckpointFamily

_SCHEME = "tinker://"
_CROSS_JOB = "cross_job://"
_SEGMENTS = {
    CheckpointFamily.STATE: "weights",
    CheckpointFamily.SAMPLER: "sampler_weights",
    CheckpointFamily.EXTERNAL: "external_weights",
}
_FAMILIES = {segment: family for family, segment in _SEGMENTS.items()}


class CheckpointPath(msgspec.Struct, frozen=True):
    """Example: CheckpointPath("ts-3f…:train:0", CheckpointFamily.STATE, "step-40")."""

    run: str
    family: CheckpointFamily
    name: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run}/{self.checkpoint_id}"

    @property
    def checkpoint_id(self) -> str:
        return f"{_SEGMENTS[self.family]}/{self.name}"


class CrossJobPath(msgspec.Struct, frozen=True):
    """Example: CrossJobPath("job-3f9a1c2e", "step-40"). What kind it is, the call says."""

    job: str
    name: str


def parse_cross_job_path(path: str, *, field: str = "path") -> CrossJobPath | None:
    """None for a path of another form."""
    if not path.startswith(_CROSS_JOB):
        return None
    job, _, name = path.removeprefix(_CROSS_JOB).partition("/")
    return CrossJobPath(check_name(job, field=field), check_name(name, field=field))


def is_checkpoint_path(path: str) -> bool:
    return path.startswith(_SCHEME)


def parse_checkpoint_path(path: str, *, field: str = "path") -> CheckpointPath:
    """InvalidArgument names what it should look like."""
    run, slash, checkpoint_id = path.removeprefix(_SCHEME).partition("/")
    if not path.startswith(_SCHEME) or not slash:
        raise InvalidArgument(
            f"{field} {path[:200]!r} is no checkpoint path",
            hint="use tinker://<training run>/<weights|sampler_weights>/<name>",
            field=field,
        )
    return checkpoint_in(check_name(run, field=field), checkpoint_id, field=field)


def checkpoint_in(run: str, checkpoint_id: str, *, field: str = "checkpoint_id") -> CheckpointPath:
    """Of an id such as `weights/step-40`; a bare name is InvalidArgument."""
    segment, slash, name = checkpoint_id.partition("/")
    if not slash or segment not in _FAMILIES:
        raise InvalidArgument(
            f"{field} {checkpoint_id[:200]!r} names no kind of checkpoint",
            hint=f"use one of {', '.join(f'{known}/<name>' for known in _FAMILIES)}",
            field=field,
        )
    return CheckpointPath(run, _FAMILIES[segment], check_name(name, field=field))
