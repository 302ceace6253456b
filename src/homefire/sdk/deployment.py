"""Inference deployments: create, wait, hot-load, scale, delete."""

from __future__ import annotations

import logging
from typing import Any

import httpx

from homefire.sdk.config import DeploymentConfig, DeploymentInfo
from homefire.sdk.connection import (
    ASK_ONCE,
    Json,
    Patience,
    held_timeout_s,
    json_object,
    raise_for_status,
)
from homefire.sdk.fireworks import FireworksClient
from homefire.sdk.hot_load import HotLoadOutcome, HotLoadVerdict, judge
from homefire.sdk.progress import Progress
from homefire.sdk.waiting import Waiter
from homefire.wire.ids import deployment_name
from homefire.wire.resources import DeploymentState

log = logging.getLogger(__name__)

_BROKEN = frozenset({DeploymentState.FAILED, DeploymentState.DELETED, DeploymentState.DELETING})
_HOT_LOAD_PATH = "/hot_load/v1/models/hot_load"
_COMPLETIONS_PATH = "/inference/v1/completions"
_PROBE_TIMEOUT_S = 10.0
_WARMUP_TIMEOUT_S = 30.0
_GONE_TIMEOUT_S = 60.0
_GONE_INTERVAL_S = 2.0


class DeploymentManager(FireworksClient):
    """Deployments of one account. Thread-safe; every call blocks.

    `inference_url` and `hotload_api_url` default to `base_url`; the rest as `FireworksClient`.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
        additional_headers: dict[str, str] | None = None,
        verify_ssl: bool | None = None,
        *,
        waiter: Waiter | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(
            api_key, base_url, additional_headers, verify_ssl, waiter=waiter, transport=transport
        )
        self.inference_url = (inference_url or self.base_url).rstrip("/")
        self.hotload_api_url = (hotload_api_url or self.base_url).rstrip("/")

    def model_of(self, deployment_id: str) -> str:
        """What completions take as `model`: `accounts/<account>/deployments/<id>`."""
        return deployment_name(self.account_id, deployment_id)

    def get(self, deployment_id: str) -> DeploymentInfo | None:
        """The deployment, or None when the account has none of that id."""
        resource = self._resource(deployment_id)
        return None if resource is None else self._info(resource)

    def create_or_get(
        self, config: DeploymentConfig, force_recreate: bool = False
    ) -> DeploymentInfo:
        """The deployment of that id, made when it is missing, broken, or `force_recreate`.

        An existing one is returned as it is: other settings in `config` do not change it (a
        warning tells when it follows another trainer). ValueError for a bad config;
        httpx.HTTPStatusError when the server refuses.
        """
        config.validate()
        existing = self._resource(config.deployment_id)
        if existing is not None:
            if existing.get("state") not in _BROKEN and not force_recreate:
                _warn_of_other_trainer(existing, config)
                return self._info(existing)
            self._delete_and_wait(config.deployment_id)
        return self._create(config)

    def wait_for_ready(
        self, deployment_id: str, timeout_s: float = 600, poll_interval_s: float = 15
    ) -> DeploymentInfo:
        """Blocks until the deployment is READY or answers a probe completion.

        RuntimeError with the status message when it failed, is being deleted or does not exist;
        TimeoutError after `timeout_s` seconds.
        """

        def look(progress: Progress) -> DeploymentInfo | None:
            return self._ready(deployment_id, progress)

        return self._waiter.until(
            look,
            what=f"deployment {deployment_id}",
            timeout_s=timeout_s,
            interval_s=poll_interval_s,
        )

    def update(
        self, deployment_id: str, body: dict[str, Any], update_mask: str | list[str]
    ) -> DeploymentInfo:
        """Changes the fields that `update_mask` names (snake_case) to what `body` says (camelCase).

        Example: update("d", {"hotLoadTrainerJob": job_name}, "hot_load_trainer_job").
        """
        mask = update_mask if isinstance(update_mask, str) else ",".join(update_mask)
        if not mask:
            raise ValueError("update_mask is empty: name the fields to change, in snake_case")
        return self._info(
            self._connection.call(
                "PATCH", self._path(deployment_id), params={"updateMask": mask}, body=body
            )
        )

    def scale(self, deployment_id: str, replica_count: int) -> DeploymentInfo:
        """Sets how many replicas there are; `wait_for_ready` waits for them.

        New ones load the weights that the deployment serves before they answer. With 0 none is left until
        the next request or hot load. httpx.HTTPStatusError above the deployment's max_replica_count.
        """
        body = {"replicaCount": replica_count}
        return self._info(
            self._connection.call("PATCH", self._path(deployment_id) + ":scale", body=body)
        )

    def scale_to_zero(self, deployment_id: str) -> None:
        """Stops all replicas and keeps the deployment, which no request wakes. Failures are only logged."""
        body = {"maxReplicaCount": 0, "minReplicaCount": 0}
        try:
            self._connection.call("PATCH", self._path(deployment_id), body=body)
        except httpx.HTTPError as exc:
            log.warning("deployment %s was not scaled to zero: %s", deployment_id, exc)

    def delete(self, deployment_id: str) -> None:
        """Stops and removes the deployment. Failures are only logged."""
        try:
            self._delete(deployment_id)
        except httpx.HTTPError as exc:
            log.warning("deployment %s was not deleted: %s", deployment_id, exc)

    def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        incremental_snapshot_metadata: dict[str, Any] | None = None,
        reset_prompt_cache: bool | str = True,
        timeout: int = 60,
        *,
        drain: str | None = None,
        drain_timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Asks the deployment to load a snapshot; the load goes on in the background.

        Completions that still run after `drain_timeout_s` seconds (None: 90) go on in place under the new
        weights, each token labelled with its own (`SampledCompletion.weights_spans`); `drain="strict"` makes
        the load fail instead. `reset_prompt_cache` may also be `all`, `new_session` or `none`.

        httpx.HTTPStatusError when the snapshot is unknown; the old weights keep serving.
        `timeout` is of the request, in seconds.
        """
        body: Json = {"identity": snapshot_identity, "reset_prompt_cache": reset_prompt_cache}
        drains = {"drain": drain, "drain_timeout_s": drain_timeout_s}
        body |= {name: value for name, value in drains.items() if value is not None}
        if incremental_snapshot_metadata is not None:
            body["incremental_snapshot_metadata"] = incremental_snapshot_metadata
        return self._connection.call(
            "POST",
            self.hotload_api_url + _HOT_LOAD_PATH,
            headers=self._hot_load_headers(deployment_id, base_model),
            body=body,
            timeout_s=timeout,
        )

    def hotload_check_status(
        self, deployment_id: str, base_model: str, timeout: int = 30
    ) -> dict[str, Any]:
        """`{"replicas": [{"current_snapshot_identity", "readiness", "loading_state"}]}`."""
        return self._hot_load_status(deployment_id, base_model, timeout, Patience())

    def wait_for_hotload(
        self,
        deployment_id: str,
        base_model: str,
        expected_identity: str,
        timeout_seconds: int = 400,
        poll_interval: int = 5,
    ) -> bool:
        """Blocks until every replica serves `expected_identity`; False when that failed or took
        more than `timeout_seconds` (the reason is logged, `await_hotload` returns it)."""
        outcome = self.await_hotload(
            deployment_id,
            base_model,
            expected_identity,
            timeout_seconds=timeout_seconds,
            poll_interval=poll_interval,
        )
        if not outcome.is_serving:
            log.error(
                "hot load of %s into %s: %s", expected_identity, deployment_id, outcome.detail
            )
        return outcome.is_serving

    def await_hotload(
        self,
        deployment_id: str,
        base_model: str,
        expected_identity: str,
        *,
        timeout_seconds: float = 400,
        poll_interval: float = 5,
    ) -> HotLoadOutcome:
        """As `wait_for_hotload`, with the reason."""

        def look(progress: Progress) -> HotLoadOutcome | None:
            status = self._hot_load_status(
                deployment_id, base_model, held_timeout_s(progress), ASK_ONCE
            )
            outcome = judge(status, expected_identity)
            progress.update(outcome.detail)
            return None if outcome.verdict is HotLoadVerdict.WAITING else outcome

        try:
            return self._waiter.until(
                look,
                what=f"hot load of {expected_identity}",
                timeout_s=timeout_seconds,
                interval_s=poll_interval,
            )
        except TimeoutError as exc:
            return HotLoadOutcome(HotLoadVerdict.WAITING, str(exc))

    def hotload_and_wait(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        incremental_snapshot_metadata: dict[str, Any] | None = None,
        reset_prompt_cache: bool = True,
        timeout_seconds: int = 400,
    ) -> bool:
        """`hotload`, then `wait_for_hotload`."""
        self.hotload(
            deployment_id,
            base_model,
            snapshot_identity,
            incremental_snapshot_metadata,
            reset_prompt_cache,
        )
        return self.wait_for_hotload(deployment_id, base_model, snapshot_identity, timeout_seconds)

    def warmup(self, model: str, max_retries: int = 30, retry_interval_s: float = 10.0) -> bool:
        """Sends four-token completions until one succeeds; False after `max_retries` failures.

        `model` is e.g. `accounts/<account>/deployments/<id>`. `retry_interval_s` is the longest
        pause between two tries.
        """
        tries = 0

        def look(progress: Progress) -> bool | None:
            nonlocal tries
            tries += 1
            if self._answers(model, _WARMUP_TIMEOUT_S, progress):
                return True
            return False if tries >= max_retries else None

        return self._waiter.until(
            look,
            what=f"warm-up of {model}",
            timeout_s=max_retries * (retry_interval_s + _WARMUP_TIMEOUT_S),
            interval_s=retry_interval_s,
        )

    def _path(self, deployment_id: str) -> str:
        return f"/v1/{self.model_of(deployment_id)}"

    def _info(self, resource: Json) -> DeploymentInfo:
        return DeploymentInfo.from_resource(resource, account=self.account_id)

    def _resource(self, deployment_id: str) -> Json | None:
        response = self._connection.request("GET", self._path(deployment_id))
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        raise_for_status(response)
        return json_object(response)

    def _create(self, config: DeploymentConfig) -> DeploymentInfo:
        response = self._connection.request(
            "POST",
            f"/v1/accounts/{self.account_id}/deployments",
            params=config.request_params(),
            body=config.request_body(),
        )
        if response.status_code == httpx.codes.CONFLICT:
            existing = self._resource(config.deployment_id)
            if existing is not None:
                return self._info(existing)
        raise_for_status(response)
        return self._info(json_object(response))

    def _delete(self, deployment_id: str) -> None:
        params = {"ignoreChecks": "true", "hard": "true"}
        self._connection.call("DELETE", self._path(deployment_id), params=params)

    def _delete_and_wait(self, deployment_id: str) -> None:
        def look(progress: Progress) -> bool | None:
            resource = self._resource(deployment_id)
            state = DeploymentState.DELETED if resource is None else resource.get("state", "")
            progress.update(state)
            return True if state == DeploymentState.DELETED else None

        self._delete(deployment_id)
        self._waiter.until(
            look,
            what=f"removal of deployment {deployment_id}",
            timeout_s=_GONE_TIMEOUT_S,
            interval_s=_GONE_INTERVAL_S,
        )

    def _ready(self, deployment_id: str, progress: Progress) -> DeploymentInfo | None:
        response = self._connection.request(
            "GET", self._path(deployment_id), timeout_s=held_timeout_s(progress), patience=ASK_ONCE
        )
        if response.status_code == httpx.codes.NOT_FOUND:
            raise RuntimeError(
                f"deployment {deployment_id!r} does not exist; create_or_get makes it"
            )
        raise_for_status(response)
        resource = json_object(response)
        info = self._info(resource)
        reason = (resource.get("status") or {}).get("message") or ""
        if info.state in _BROKEN:
            raise RuntimeError(f"deployment {deployment_id!r} is {info.state}: {reason}")
        progress.update(f"{info.state}: {reason}" if reason else info.state)
        if info.state == DeploymentState.READY:
            return info
        is_creating = info.state == DeploymentState.CREATING
        model = self.model_of(deployment_id)
        return info if is_creating and self._answers(model, _PROBE_TIMEOUT_S, progress) else None

    def _answers(self, model: str, timeout_s: float, progress: Progress) -> bool:
        body = {"model": model, "prompt": [1, 2], "max_tokens": 4, "temperature": 0.0}
        try:
            response = self._connection.request(
                "POST",
                self.inference_url + _COMPLETIONS_PATH,
                headers={"Authorization": f"Bearer {self.api_key}"},
                body=body,
                timeout_s=timeout_s,
                patience=ASK_ONCE,
            )
        except httpx.TransportError as exc:
            progress.update(f"no answer ({type(exc).__name__})")
            return False
        return response.status_code == httpx.codes.OK

    def _hot_load_status(
        self, deployment_id: str, base_model: str, timeout: float, patience: Patience
    ) -> Json:
        return self._connection.call(
            "GET",
            self.hotload_api_url + _HOT_LOAD_PATH,
            headers=self._hot_load_headers(deployment_id, base_model),
            timeout_s=timeout,
            patience=patience,
        )

    def _hot_load_headers(self, deployment_id: str, base_model: str) -> dict[str, str]:
        return {
            "Authorization": f"Bearer {self.api_key}",
            "fireworks-model": base_model,
            "fireworks-deployment": self.model_of(deployment_id),
        }


def _warn_of_other_trainer(existing: Json, config: DeploymentConfig) -> None:
    wanted, actual = config.hot_load_trainer_job, existing.get("hotLoadTrainerJob")
    if wanted and actual and wanted != actual:
        log.warning(
            "deployment %s exists and loads snapshots of %s, not of %s; "
            "update(deployment_id, {'hotLoadTrainerJob': …}, 'hot_load_trainer_job') re-attaches it",
            config.deployment_id,
            actual,
            wanted,
        )
