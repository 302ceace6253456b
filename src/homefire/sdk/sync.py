"""Weights from the trainer to the deployment: save, hot-load, warm up, and keep the delta chain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from homefire.sdk.config import DEFAULT_CHECKSUM_FORMAT, DEFAULT_DELTA_COMPRESSION
from homefire.sdk.hot_load import HotLoadOutcome, current_identity, replicas_of
from homefire.sdk.progress import Progress
from homefire.sdk.sampling import ChatTokenizer, DeploymentSampler
from homefire.sdk.waiting import Waiter

if TYPE_CHECKING:
    from homefire.sdk.deployment import DeploymentManager
    from homefire.sdk.training import FiretitanTrainingClient

log = logging.getLogger(__name__)
_WARMUP_INTERVAL_S = 10.0


@dataclass
class WeightSyncer:
    """Brings the policy's weights into a deployment, base first and deltas after.

    Example: tracker.save_and_hotload("step_00010") -> "step_00010-4b50536f".

    A base is saved first, for every LoRA save, and again after a hot load failed: the next delta
    would else build on a snapshot that the deployment may not have. Not thread-safe.
    """

    policy_client: FiretitanTrainingClient
    deploy_mgr: DeploymentManager | None = None
    deployment_id: str | None = None
    base_model: str = ""
    hotload_timeout: int = 600
    """Seconds for one hot load."""
    first_checkpoint_type: str = "base"
    compression_format: str = DEFAULT_DELTA_COMPRESSION
    warmup_after_hotload: bool = True
    warmup_max_retries: int = 10
    reset_prompt_cache: bool = True
    lora_rank: int = 0
    base_saved: bool = field(default=False, init=False)
    """Whether the next save may be a delta."""
    base_identity: str | None = field(default=None, init=False)
    """The snapshot that was loaded last: what a delta is announced against."""
    last_timing: dict[str, float] = field(default_factory=dict[str, float], init=False)
    """Seconds of the last sync: save_time_s, hotload_time_s, warmup_time_s, total_time_s."""
    waiter: Waiter = field(default_factory=Waiter, kw_only=True, repr=False)
    timer: Callable[[], float] = field(default=time.perf_counter, kw_only=True, repr=False)
    _deployment_checked: bool = field(default=False, init=False, repr=False)

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Saves the weights, loads them into the deployment, and returns the snapshot's name.

        Returns when every replica reports that it serves that snapshot. Without a deployment it
        only saves. RuntimeError with the reason when the load fails; the deployment keeps serving
        the old weights, and the next save is a base. `last_timing` holds the durations.
        """
        started = self.timer()
        kind = checkpoint_type or self._next_type()
        snapshot = self._save(name, kind)
        saved = self.timer()
        self.last_timing = {"save_time_s": saved - started, "hotload_time_s": 0.0}
        if self.deploy_mgr is not None and self.deployment_id is not None:
            self._hotload_or_raise(snapshot, kind)
            self.last_timing["hotload_time_s"] = self.timer() - saved
        warmup_started = self.timer()
        self._warm_up()
        ended = self.timer()
        self.last_timing["warmup_time_s"] = ended - warmup_started
        self.last_timing["total_time_s"] = ended - started
        return snapshot

    def save_only(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Saves without loading: the snapshot's name, or None (with the reason logged) when the
        server or the network failed. ValueError for a bad name."""
        from homefire.sdk.training import DATA_PLANE_ERRORS

        try:
            return self._save(name, checkpoint_type or self._next_type())
        except DATA_PLANE_ERRORS as exc:
            log.error("snapshot %s was not saved: %s", name, exc)
            return None

    def hotload(self, snapshot_name: str, checkpoint_type: str) -> bool:
        """Loads a saved snapshot: whether every replica serves it now (else the reason is logged)."""
        try:
            self._hotload_or_raise(snapshot_name, checkpoint_type)
        except (RuntimeError, TimeoutError, httpx.HTTPError) as exc:
            log.error("snapshot %s was not loaded: %s", snapshot_name, exc)
            return False
        self._warm_up()
        return True

    def check_deployment_state(self) -> str | None:
        """The identity that the deployment serves now; None for the base weights."""
        manager, deployment_id = self._deployment()
        return current_identity(manager.hotload_check_status(deployment_id, self.base_model))

    def wait_for_hotload_ready(self, timeout_s: int = 300, poll_interval_s: int = 5) -> None:
        """Blocks until the deployment has a replica to load into; TimeoutError when it gets none."""
        manager, deployment_id = self._deployment()

        def look(progress: Progress) -> bool | None:
            replicas = replicas_of(manager.hotload_check_status(deployment_id, self.base_model))
            progress.update(f"{len(replicas)} replicas")
            return bool(replicas) or None

        self.waiter.until(
            look,
            what=f"a replica of {deployment_id}",
            timeout_s=timeout_s,
            interval_s=poll_interval_s,
        )

    def reset_delta_chain(self) -> None:
        """Makes the next save a base, e.g. after the deployment was re-attached or recreated."""
        self.base_saved = False
        self.base_identity = None

    def get_deployment_sampler(
        self, tokenizer: ChatTokenizer | None = None, **options: Any
    ) -> DeploymentSampler:
        """A sampler on the deployment; options as of `DeploymentSampler`."""
        manager, deployment_id = self._deployment()
        return DeploymentSampler(
            inference_url=manager.inference_url,
            model=manager.model_of(deployment_id),
            api_key=manager.api_key,
            tokenizer=tokenizer,
            **options,
        )

    def _next_type(self) -> str:
        if self.lora_rank > 0:
            return "base"
        return "delta" if self.base_saved else self.first_checkpoint_type

    def _save(self, name: str, kind: str) -> str:
        saved = self.policy_client.save_weights_for_sampler_ext(name, checkpoint_type=kind)
        self.base_saved = True
        return saved.snapshot_name

    def _hotload_or_raise(self, snapshot: str, kind: str) -> None:
        try:
            outcome = self._hotload(snapshot, kind)
        except (RuntimeError, TimeoutError, httpx.HTTPError):
            self.reset_delta_chain()
            raise
        if not outcome.is_serving:
            self.reset_delta_chain()
            raise RuntimeError(
                f"hot load of {snapshot!r} into {self.deployment_id!r} failed: {outcome.detail}; "
                "the deployment keeps its old weights, the next save will be a base"
            )
        self.base_identity = snapshot

    def _hotload(self, snapshot: str, kind: str) -> HotLoadOutcome:
        manager, deployment_id = self._deployment()
        self._check_deployment_once()
        manager.hotload(
            deployment_id,
            self.base_model,
            snapshot,
            self._incremental_metadata(kind),
            self.reset_prompt_cache,
        )
        return manager.await_hotload(
            deployment_id, self.base_model, snapshot, timeout_seconds=self.hotload_timeout
        )

    def _check_deployment_once(self) -> None:
        if self._deployment_checked:
            return
        self.wait_for_hotload_ready()
        if self.check_deployment_state() is not None:
            # It serves a snapshot of some earlier run: announce no parent that it may not hold.
            self.base_identity = None
        self._deployment_checked = True

    def _incremental_metadata(self, kind: str) -> dict[str, Any] | None:
        if kind != "delta" or self.base_identity is None or self.lora_rank > 0:
            return None
        return {
            "previous_snapshot_identity": self.base_identity,
            "compression_format": self.compression_format,
            "checksum_format": DEFAULT_CHECKSUM_FORMAT,
        }

    def _warm_up(self) -> None:
        if not self.warmup_after_hotload or self.deploy_mgr is None or self.deployment_id is None:
            return
        model = self.deploy_mgr.model_of(self.deployment_id)
        if not self.deploy_mgr.warmup(model, self.warmup_max_retries, _WARMUP_INTERVAL_S):
            log.warning("deployment %s answers no completions yet", self.deployment_id)

    def _deployment(self) -> tuple[DeploymentManager, str]:
        if self.deploy_mgr is None or self.deployment_id is None:
            raise ValueError("deploy_mgr or deployment_id is missing: a hot load needs both")
        return self.deploy_mgr, self.deployment_id
