"""The service client: a session on one trainer, which makes training clients."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Literal, Self

import tinker

from homefire.sdk import checks
from homefire.sdk.connection import Connection
from homefire.sdk.settings import quiet_telemetry, resolve_api_key, resolve_base_url, tinker_key
from homefire.sdk.training.client import FiretitanTrainingClient

_BASE_ONLY = "homefire.base_only"


class FiretitanServiceClient:
    """A session on one trainer: `base_url` is `endpoint.base_url` of `wait_for_ready`.

    `api_key` defaults to `FIREWORKS_API_KEY`. Requests that the server refuses raise
    tinker.APIStatusError, those that fail later tinker.RequestFailedError. Works in scripts,
    under `asyncio.run` and in notebooks. A context manager; `close()` ends the session.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
    ) -> None:
        checks.check_metadata(user_metadata)
        quiet_telemetry()
        self._key = tinker_key(resolve_api_key(api_key))
        self.base_url = resolve_base_url(base_url)
        self._inner = tinker.ServiceClient(
            user_metadata, project_id, base_url=self.base_url, api_key=self._key
        )
        self._connection = Connection(self.base_url, self._key)
        self._clients: dict[tuple[str, int], FiretitanTrainingClient] = {}

    def create_training_client(
        self, base_model: str, lora_rank: int = 0, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client on the job's policy, at its live weights, optimizer and step.

        `lora_rank` 0 trains all parameters and must match the job's. A client of an earlier
        session is superseded; gradients that it has not stepped are discarded. ValueError when
        this session already has a working client of that model and rank.
        """
        checks.check_path(base_model, field="base_model")
        if lora_rank < 0:
            raise ValueError(f"lora_rank is {lora_rank}: use 0 (all parameters) or a positive rank")
        known = self._clients.get((base_model, lora_rank))
        if known is not None and known.is_usable:
            raise ValueError(
                f"this service already has a training client of {base_model!r} with lora_rank "
                f"{lora_rank}: use that one, or make a new FiretitanServiceClient"
            )
        client = self.create_lora_training_client(
            base_model, rank=lora_rank, user_metadata=user_metadata
        )
        self._clients[base_model, lora_rank] = client
        return client

    def create_base_training_client(
        self, base_model: str, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client on the frozen base model, for reference logprobs: `forward` only."""
        metadata = {**(user_metadata or {}), _BASE_ONLY: "true"}
        return self.create_lora_training_client(base_model, rank=0, user_metadata=metadata)

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
    ) -> FiretitanTrainingClient:
        """A client with an adapter of `rank`, on the modules that `train_*` leave on."""
        checks.check_path(base_model, field="base_model")
        checks.check_metadata(user_metadata)
        created = self._inner.create_lora_training_client(
            base_model,
            rank=rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            user_metadata=user_metadata,
        )
        return self._wrap(created.future().result())

    def create_training_client_from_state(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client at saved weights, with a fresh optimizer."""
        checks.check_path(path)
        checks.check_metadata(user_metadata)
        created = self._inner.create_training_client_from_state(path, user_metadata=user_metadata)
        return self._wrap(created.future().result())

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client at saved weights and optimizer state: training goes on exactly there."""
        checks.check_path(path)
        checks.check_metadata(user_metadata)
        created = self._inner.create_training_client_from_state_with_optimizer(
            path, user_metadata=user_metadata
        )
        return self._wrap(created.future().result())

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Any = None,
    ) -> tinker.SamplingClient:
        """tinker's sampling client. A dedicated trainer refuses it: sample through a deployment
        with `DeploymentSampler`."""
        return (
            self._inner.create_sampling_client(
                model_path=model_path, base_model=base_model, retry_config=retry_config
            )
            .future()
            .result()
        )

    def create_rest_client(self) -> tinker.RestClient:
        """tinker's client for calls without a session."""
        return tinker.RestClient(base_url=self.base_url, api_key=self._key)

    def get_server_capabilities(self) -> dict[str, Any]:
        """`{"supported_models": [{"model_name", "max_context_length"}]}`."""
        return self._connection.call("GET", "/api/v1/get_server_capabilities")

    async def create_training_client_async(
        self, base_model: str, lora_rank: int = 0, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """`create_training_client` without blocking the event loop."""
        return await asyncio.to_thread(
            self.create_training_client, base_model, lora_rank, user_metadata
        )

    async def create_lora_training_client_async(
        self, base_model: str, rank: int = 32, **options: Any
    ) -> FiretitanTrainingClient:
        """`create_lora_training_client` without blocking the event loop."""
        return await asyncio.to_thread(
            self.create_lora_training_client, base_model, rank, **options
        )

    async def create_training_client_from_state_async(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """`create_training_client_from_state` without blocking the event loop."""
        return await asyncio.to_thread(self.create_training_client_from_state, path, user_metadata)

    async def create_training_client_from_state_with_optimizer_async(
        self, path: str, user_metadata: dict[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """`create_training_client_from_state_with_optimizer` without blocking the event loop."""
        return await asyncio.to_thread(
            self.create_training_client_from_state_with_optimizer, path, user_metadata
        )

    async def get_server_capabilities_async(self) -> dict[str, Any]:
        """`get_server_capabilities` without blocking the event loop."""
        return await asyncio.to_thread(self.get_server_capabilities)

    def close(self, status: Literal["success", "errored", "interrupted"] = "success") -> None:
        """Ends the session; the trainer keeps its weights and state."""
        self._inner.close(status).future().result()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close("success" if kind is None else "errored")

    def _wrap(self, client: tinker.TrainingClient) -> FiretitanTrainingClient:
        return FiretitanTrainingClient(client, self._connection)
