"""Ids of the root Tinker plane: who serves what can be read from an id, or asked once and remembered.

At the root a client names base models, not jobs. Behind it stand ordinary jobs and deployments:

pool-<12 hex>            the pooled LoRA trainer of one base model and account (a trainer job)
run-<12 hex>             the job of one full-parameter run (rank 0)
<job>-sampler            the deployment that samples what that job saves
ts-<16 hex>              a session, of no job in particular
ts-…:train:0             a training run: the model id that the clients derive; also its slot in the store
<job>.<16 hex>           a request of a trainer
<job>-sampler.<16 hex>   a request of a sampler
<job>-sampler.<8 hex>[.<what>]   a sampling session; see `SamplingSession`
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

import msgspec

from homefire.wire.errors import InvalidArgument
from homefire.wire.ids import check_name

SESSION_PREFIX = "ts-"
_SAMPLER_SUFFIX = "-sampler"
_EPHEMERAL = re.compile(r"^ephemeral-\d{6,}-[0-9a-f]{8}$")
_TRAIN = ":train:"


def pool_job_id(account: str, model_directory: str) -> str:
    """One pool per base model, whatever name it was asked by."""
    return f"pool-{_short(account, model_directory)}"


def run_job_id(account: str, run: str) -> str:
    """The job of a full-parameter run."""
    return f"run-{_short(account, run)}"


def sampler_id(job: str) -> str:
    """The deployment that samples a root job's snapshots."""
    return f"{job}{_SAMPLER_SUFFIX}"


def job_of_sampler(deployment: str) -> str | None:
    """The inverse of `sampler_id`; None for an ordinary deployment's name."""
    return deployment.removesuffix(_SAMPLER_SUFFIX) if is_sampler(deployment) else None


def is_sampler(deployment: str) -> bool:
    return deployment.endswith(_SAMPLER_SUFFIX)


def service_of(request_id: str) -> str:
    """The job or deployment that a request id, or a sampling session's, belongs to."""
    return request_id.partition(".")[0]


def ephemeral_name(seq_id: int, nonce: str) -> str:
    """A snapshot that was saved for one sampling session alone; `nonce` is that session's."""
    return f"ephemeral-{seq_id:06d}-{nonce}"


def is_ephemeral(snapshot: str) -> bool:
    """No client knows it by a path, so no list shows it."""
    return _EPHEMERAL.match(snapshot) is not None


def session_of(run: str) -> str:
    """`ts-3f…:train:0` -> `ts-3f…`"""
    return run.partition(_TRAIN)[0]


class SamplingSession(msgspec.Struct, frozen=True):
    """What a sampling session samples from; its id says all of it, so nothing has to be remembered.

    Example: SamplingSession("pool-1f…-sampler", "9c0ffee1", "ts-3f…:train:0", "step_00010").
    """

    sampler: str
    nonce: str
    """8 hex digits, from the client's session and its `sampling_session_seq_id`."""
    run: str = ""
    """The training run, which is the slot of the snapshot; empty for the base model."""
    snapshot: str = ""

    @classmethod
    def of(
        cls, sampler: str, session_id: str, seq_id: int, *, run: str = "", snapshot: str = ""
    ) -> SamplingSession:
        """The same session and number give the same id again."""
        return cls(sampler, _short(session_id, str(seq_id))[:8], run, snapshot)

    @property
    def is_base(self) -> bool:
        return not self.snapshot

    @property
    def id(self) -> str:
        head = f"{self.sampler}.{self.nonce}"
        if self.is_base:
            return head
        what = base64.urlsafe_b64encode(f"{self.run}/{self.snapshot}".encode()).decode()
        return f"{head}.{what.rstrip('=')}"

    @property
    def model_path(self) -> str | None:
        """As clients write it; None for the base model."""
        return None if self.is_base else f"tinker://{self.run}/sampler_weights/{self.snapshot}"


def parse_sampling_session(session_id: str) -> SamplingSession:
    """InvalidArgument for what `SamplingSession.id` never gave."""
    parts = session_id.split(".")
    try:
        if len(parts) == 2:
            return SamplingSession(check_name(parts[0], field="sampler"), parts[1])
        sampler, nonce, what = parts
        text = base64.urlsafe_b64decode(what + "=" * (-len(what) % 4)).decode()
        run, slash, snapshot = text.partition("/")
        if not slash:
            raise ValueError("no snapshot")
        run, snapshot = (check_name(name, field="sampling_session_id") for name in (run, snapshot))
        return SamplingSession(check_name(sampler, field="sampler"), nonce, run, snapshot)
    except (ValueError, binascii.Error, InvalidArgument) as exc:
        raise InvalidArgument(
            f"{session_id!r} is no sampling session",
            hint="create one with create_sampling_session",
            field="sampling_session_id",
        ) from exc


def _short(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
