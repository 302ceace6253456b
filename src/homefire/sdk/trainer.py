"""Trainer jobs: create, wait, reconnect, delete, and their metrics record."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec

from homefire.sdk.config import CreatedTrainerJob, TrainerJobConfig, TrainerServiceEndpoint
from homefire.sdk.connection import ASK_ONCE, Json, held_timeout_s, raise_for_status
from homefire.sdk.fireworks import FireworksClient
from homefire.sdk.progress import Progress
from homefire.wire.ids import job_name as resource_name
from homefire.wire.ids import new_id
from homefire.wire.resources import JobState
from homefire.wire.retention import RetentionPolicy

log = logging.getLogger(__name__)

_GONE = frozenset({JobState.DELETED, JobState.ARCHIVED, JobState.DELETING})
"""Tombstones: checkpoints can still be listed and promoted, the trainer never runs again."""
_RESUMABLE = frozenset(
    {
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.PAUSED,
        JobState.COMPLETED,
        JobState.EARLY_STOPPED,
    }
)
_STARTING = frozenset(
    {
        JobState.CREATING,
        JobState.PENDING,
        JobState.VALIDATING,
        JobState.RE_QUEUEING,
        JobState.CREATING_INPUT_DATASET,
    }
)
"""On the way to RUNNING by itself."""
_ENDED = _GONE | _RESUMABLE | {JobState.EXPIRED}
"""Waiting longer brings nothing."""
_HEALTH_TIMEOUT_S = 5.0
_RESUMABLE_INTERVAL_S = 10.0


class TrainerJobManager(FireworksClient):
    """Service-mode trainer jobs of one account. Thread-safe; every call blocks.

    Construct as `FireworksClient`. Waiting looks at once, then after 50 ms, then ever more
    rarely up to `poll_interval_s`, and shows its state on a terminal.
    """

    def create(self, config: TrainerJobConfig) -> CreatedTrainerJob:
        """Asks for a trainer and returns its id at once; wait with `wait_for_ready`.

        ValueError for a bad config, before any request. httpx.HTTPStatusError when the server
        refuses, e.g. an unknown base model (it says what is available).
        """
        config.validate()
        job_id = new_id("job")
        response = self._connection.request(
            "POST",
            f"/v1/accounts/{self.account_id}/rlorTrainerJobs",
            params={**config.request_params(), "rlorTrainerJobId": job_id},
            body=config.request_body(),
        )
        if response.status_code == httpx.codes.CONFLICT:
            # The id is ours and fresh: an earlier try of this very call arrived.
            return _created(self.get(job_id))
        raise_for_status(response)
        return _created(response.json())

    def get(self, job_id: str) -> dict[str, Any]:
        """The job resource: `state`, `status`, `trainingConfig`, … 404 raises HTTPStatusError."""
        return self._connection.call("GET", self._path(job_id))

    def try_get(self, job_id: str) -> dict[str, Any] | None:
        """As `get`; None when the account has no such job."""
        response = self._connection.request("GET", self._path(job_id))
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        raise_for_status(response)
        return response.json()

    def list(self) -> list[dict[str, Any]]:
        """All jobs of the account that are not deleted."""
        path = f"/v1/accounts/{self.account_id}/rlorTrainerJobs"
        return self._connection.call("GET", path, params={"pageSize": "200"})["rlorTrainerJobs"]

    def delete(self, job_id: str) -> None:
        """Stops the trainer and buries the job; its checkpoints stay. Failures are only logged."""
        try:
            self._connection.call("DELETE", self._path(job_id))
        except httpx.HTTPError as exc:
            log.warning("trainer job %s was not deleted: %s", job_id, exc)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stops the trainer; its state is kept and `reconnect_and_wait` resumes it."""
        return self._connection.call("POST", f"{self._path(job_id)}:cancel", body={})

    def pause(self, job_id: str) -> dict[str, Any]:
        """Gives the trainer's memory and threads back, behind a recovery point. It goes on at the
        same step, with the same bits, when an operation comes, or by `resume_and_wait`.

        A homefire route. It answers at once; the room is free when the trainer has ended.
        """
        return self._connection.call("POST", f"{self._path(job_id)}:pause", body={})

    def create_and_wait(
        self, config: TrainerJobConfig, poll_interval_s: float = 5.0, timeout_s: float = 900
    ) -> TrainerServiceEndpoint:
        """`create`, then `wait_for_ready`."""
        created = self.create(config)
        return self.wait_for_ready(created.job_id, created.job_name, poll_interval_s, timeout_s)

    def wait_for_ready(
        self,
        job_id: str,
        job_name: str | None = None,
        poll_interval_s: float = 5.0,
        timeout_s: float = 900,
    ) -> TrainerServiceEndpoint:
        """Blocks until the job is RUNNING and its trainer answers.

        RuntimeError with the job's status message when it failed, ended or was deleted;
        TimeoutError after `timeout_s` seconds with the state and reason (a job that waits for
        room is PENDING and says for what).
        """

        def look(progress: Progress) -> TrainerServiceEndpoint | None:
            job = self._look(job_id, progress)
            state = job.get("state", "")
            if state in _ENDED:
                raise RuntimeError(_ended_text(job_id, job))
            if state != JobState.RUNNING:
                return None
            endpoint = self._endpoint(job_id, job_name, job)
            return endpoint if self._is_healthy(endpoint, progress) else None

        return self._waiter.until(
            look, what=f"trainer {job_id}", timeout_s=timeout_s, interval_s=poll_interval_s
        )

    def wait_for_existing(
        self, job_id: str, poll_interval_s: float = 5.0, timeout_s: float = 900
    ) -> TrainerServiceEndpoint:
        """`wait_for_ready` for a job that somebody else created."""
        return self.wait_for_ready(job_id, None, poll_interval_s, timeout_s)

    def resume_and_wait(
        self, job_id: str, poll_interval_s: float = 5.0, timeout_s: float = 900
    ) -> TrainerServiceEndpoint:
        """Starts a stopped job again, at the step where it was, and waits for it."""
        self._connection.call("POST", f"{self._path(job_id)}:resume", body={})
        return self.wait_for_ready(job_id, None, poll_interval_s, timeout_s)

    def reconnect_and_wait(
        self,
        job_id: str,
        poll_interval_s: float = 5.0,
        timeout_s: float = 600.0,
        max_wait_for_resumable_s: float = 120.0,
    ) -> TrainerServiceEndpoint:
        """The endpoint of a job in whatever state it is: waits for a running or starting one,
        resumes a failed, cancelled, paused or completed one. Weights, optimizer and step go on.

        A job on its way to a stop is given `max_wait_for_resumable_s` seconds. RuntimeError when
        it was deleted or never becomes resumable; TimeoutError after `timeout_s`.
        """
        job = self._settled(job_id, poll_interval_s, max_wait_for_resumable_s)
        if job["state"] in _RESUMABLE:
            self._resume_unless_running(job_id)
        return self.wait_for_ready(job_id, None, poll_interval_s, timeout_s)

    def log_metrics(self, job_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Adds what the client knows (rewards, times, …) to the job's record for a step.

        A homefire route. ValueError when a value is not a finite number.
        """
        for name, value in metrics.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"metrics[{name!r}] is {value!r}: use a finite number")
        body = {"step": step, "metrics": dict(metrics)}
        self._connection.call("POST", f"{self._path(job_id)}/metrics", body=body)

    def get_metrics(self, job_id: str) -> list[dict[str, Any]]:
        """The job's record, oldest first: rows of the server (loss, tokens, ms) and of clients."""
        return self._connection.call("GET", f"{self._path(job_id)}/metrics").get("rows") or []

    def get_lineage(self, job_id: str) -> dict[str, Any]:
        """Steps, snapshots, hot loads and evaluations of the job, and their edges."""
        return self._connection.call("GET", f"{self._path(job_id)}/lineage")

    def get_account_lineage(
        self,
        *,
        weights: str | None = None,
        job: str | None = None,
        step: int | None = None,
        model: str | None = None,
        direction: str = "both",
    ) -> dict[str, Any]:
        """One graph of the account's weights, or its part `up` or `down` from weights, a model, a job,
        or a step of a job. `weights` as completions name them. A homefire route."""
        asked = {"weights": weights, "job": job, "step": step, "model": model}
        params = {name: str(value) for name, value in asked.items() if value is not None}
        path = f"/v1/accounts/{self.account_id}/lineage"
        return self._connection.call("GET", path, params={**params, "direction": direction})

    def get_retention(self, job_id: str) -> dict[str, Any]:
        """Which checkpoints of the job stay; every rule is null where all do."""
        return self._connection.call("GET", f"{self._path(job_id)}/retention")

    def set_retention(
        self,
        job_id: str,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        ttl_seconds: float | None = None,
        keep_best: str | None = None,
        lower_is_better: bool = False,
    ) -> dict[str, Any]:
        """Replaces the job's policy: a checkpoint stays when any rule keeps it; without rules all do.

        What something rests on stays in any case. A homefire route.
        """
        policy = RetentionPolicy(
            keep_last=keep_last,
            keep_every=keep_every,
            ttl_seconds=ttl_seconds,
            keep_best=keep_best,
            lower_is_better=lower_is_better,
        )
        body = msgspec.to_builtins(policy)
        return self._connection.call("PUT", f"{self._path(job_id)}/retention", body=body)

    def prune_checkpoints(self, job_id: str, *, dry_run: bool = False) -> dict[str, Any]:
        """Applies the job's policy now. Every checkpoint with `keep` and `why`, and `freedBytes`."""
        path = f"{self._path(job_id)}/checkpoints:prune"
        return self._connection.call("POST", path, body={"dryRun": dry_run})

    def pin_checkpoint(self, job_id: str, name: str, *, pinned: bool = True) -> dict[str, Any]:
        """A pinned checkpoint neither expires nor is pruned. The checkpoint's row."""
        verb = "pin" if pinned else "unpin"
        return self._connection.call("POST", f"{self._path(job_id)}/checkpoints/{name}:{verb}")

    def _path(self, job_id: str) -> str:
        return f"/v1/{resource_name(self.account_id, job_id)}"

    def _look(self, job_id: str, progress: Progress) -> Json:
        response = self._connection.request(
            "GET", self._path(job_id), timeout_s=held_timeout_s(progress), patience=ASK_ONCE
        )
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RuntimeError(
                f"trainer job {job_id!r} does not exist in account {self.account_id!r}"
            )
        raise_for_status(response)
        job: Json = response.json()
        progress.update(_state_text(job))
        return job

    def _endpoint(self, job_id: str, job_name: str | None, job: Json) -> TrainerServiceEndpoint:
        length = (job.get("trainingConfig") or {}).get("maxContextLength")
        return TrainerServiceEndpoint(
            job_name=job_name or job.get("name") or resource_name(self.account_id, job_id),
            job_id=job_id,
            base_url=f"{self.base_url}/training/v1/rlorTrainerJobs/{self.account_id}/{job_id}",
            max_context_length=length or None,
        )

    def _is_healthy(self, endpoint: TrainerServiceEndpoint, progress: Progress) -> bool:
        response = self._connection.request(
            "GET",
            f"{endpoint.base_url}/api/v1/healthz",
            headers={"Authorization": f"Bearer {self.api_key}"},
            timeout_s=_HEALTH_TIMEOUT_S,
            patience=ASK_ONCE,
        )
        if response.status_code != httpx.codes.OK:
            progress.update(f"running, but its trainer answers HTTP {response.status_code}")
        return response.status_code == httpx.codes.OK

    def _settled(self, job_id: str, interval_s: float, timeout_s: float) -> Json:
        def look(progress: Progress) -> Json | None:
            job = self._look(job_id, progress)
            state = job.get("state", "")
            if state in _GONE:
                raise RuntimeError(_ended_text(job_id, job))
            return job if state == JobState.RUNNING or state in _RESUMABLE | _STARTING else None

        try:
            return self._waiter.until(
                look,
                what=f"trainer {job_id}",
                timeout_s=timeout_s,
                interval_s=max(interval_s, _RESUMABLE_INTERVAL_S),
            )
        except TimeoutError as exc:
            raise RuntimeError(f"trainer job {job_id!r} did not become resumable: {exc}") from exc

    def _resume_unless_running(self, job_id: str) -> None:
        try:
            self._connection.call("POST", f"{self._path(job_id)}:resume", body={})
        except httpx.HTTPStatusError:
            # Another client may have resumed it between our look and our call.
            if self.get(job_id).get("state") not in _STARTING | {JobState.RUNNING}:
                raise


def _created(job: Json) -> CreatedTrainerJob:
    name = job.get("name")
    if not name:
        raise RuntimeError("the server answered a trainer job without a name")
    return CreatedTrainerJob(job_name=name, job_id=name.rpartition("/")[2])


def _status_message(job: Json) -> str:
    status = job.get("status") or {}
    return job.get("statusMessage") or job.get("message") or status.get("message") or ""


def _state_text(job: Json) -> str:
    state = str(job.get("state", "unknown")).removeprefix("JOB_STATE_")
    message = _status_message(job)
    return f"{state}: {message}" if message else state


def _ended_text(job_id: str, job: Json) -> str:
    advice = (
        "its checkpoints can still be listed and promoted; create a new job to train on"
        if job.get("state") in _GONE
        else f"reconnect_and_wait({job_id!r}) resumes it"
    )
    return f"trainer job {job_id!r} is {_state_text(job)} ({advice})"
