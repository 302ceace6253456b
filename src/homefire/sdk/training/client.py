"""The training client: one model of a session."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import tinker

from homefire.sdk import checks
from homefire.sdk.config import GradAccNormalization
from homefire.sdk.connection import Connection, Json
from homefire.sdk.training.optimizer import optim_params
from homefire.sdk.training.ordered import OrderedFuture, in_thread, retrieve

Result = TypeVar("Result")
CustomLoss = Callable[[list[tinker.Datum], list[Any]], tuple[Any, dict[str, float]]]
"""(data, logprobs per datum, differentiable) -> (loss, metrics)."""

DATA_PLANE_ERRORS: tuple[type[Exception], ...] = (
    tinker.TinkerError,
    httpx.HTTPError,
    RuntimeError,
    TimeoutError,
)
"""What a call that the server or the network failed can raise."""

_CHECKPOINT_TYPE = "homefire.checkpoint_type"
_CHECKPOINT_TYPES = ("base", "delta")
_NEW_CLIENT = (
    "this training client cannot be used any further: tinker numbered requests that will never be "
    "sent. Create a new client (a new FiretitanServiceClient and create_training_client); "
    "the trainer's weights are kept, gradients not yet stepped are not"
)


@dataclass(frozen=True)
class SaveSamplerResult:
    """`path` is what the server calls the snapshot, `snapshot_name` what hot load calls it."""

    path: str
    snapshot_name: str


@dataclass(frozen=True)
class LoadAdapterResponse:
    """Result of `load_adapter`."""

    adapter_path: str
    model_id: str


@dataclass(frozen=True)
class LoadStateResponse:
    """Result of `load_state` and `load_state_with_optimizer`."""

    path: str


class FiretitanTrainingClient:
    """One model of a session. Made by `FiretitanServiceClient`.

    Every call returns a future at once and takes effect in call order, so calls can be pipelined;
    calls may come from several threads. Bad arguments raise ValueError at once and cost nothing.
    Failures come out of the future as tinker.RequestFailedError.
    """

    def __init__(self, client: tinker.TrainingClient, connection: Connection) -> None:
        self._inner = client
        self._connection = connection
        self._order = threading.RLock()
        self._outstanding: set[Future[Any]] = set()
        self._broken_by: BaseException | None = None
        self.session_id = secrets.token_hex(4)
        """Eight hex digits, made for this object: the suffix of its snapshots' names."""

    @property
    def model_id(self) -> str:
        return self._inner.model_id

    @property
    def is_usable(self) -> bool:
        """False once a custom loss failed; see `forward_backward_custom`."""
        return self._broken_by is None

    def forward(
        self,
        data: list[tinker.Datum],
        loss_fn: tinker.types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
        """Logprobs of the target tokens (and the loss), without a gradient.

        `result().loss_fn_outputs[i]["logprobs"]` is float32 of the shape of datum i's target_tokens.
        """
        checks.check_data(data)
        checks.check_loss(loss_fn, loss_fn_config)
        return self._submit(lambda: self._inner.forward(data, loss_fn, loss_fn_config))

    def forward_backward(
        self,
        data: list[tinker.Datum],
        loss_fn: tinker.types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
        """As `forward`, and adds the gradient of the summed loss to what has accumulated."""
        checks.check_data(data)
        checks.check_loss(loss_fn, loss_fn_config)
        return self._submit(lambda: self._inner.forward_backward(data, loss_fn, loss_fn_config))

    def forward_backward_custom(
        self,
        data: list[tinker.Datum],
        loss_fn: CustomLoss | tinker.LossHandle,
        *,
        loss_type_input: str = "logprobs",
    ) -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
        """As `forward_backward`, with a loss that runs here.

        `loss_fn(data, logprobs_list)` gets one differentiable tensor of target logprobs per datum
        and returns (scalar loss, metrics). It runs in a thread of its own. When it raises, the
        future raises the same exception, and this client is done for: later calls were already
        numbered behind requests that will not be sent. Create a new client; the trainer's weights
        are kept.
        """
        checks.check_custom_data(data)
        if loss_type_input != "logprobs":
            raise ValueError(
                f"loss_type_input is {loss_type_input!r}: only 'logprobs' is supported"
            )
        if not callable(loss_fn) and not isinstance(loss_fn, tinker.LossHandle):
            raise ValueError(
                f"loss_fn is {type(loss_fn).__name__}: pass a function (data, logprobs)"
            )
        guarded = loss_fn if isinstance(loss_fn, tinker.LossHandle) else self._guard(loss_fn)

        def submit() -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
            future = self._inner.forward_backward_custom(data, guarded)
            future.future().add_done_callback(self._note_failure)
            return future

        return self._submit(submit)

    def optim_step(
        self,
        adam_params: tinker.AdamParams,
        grad_accumulation_normalization: GradAccNormalization | str | None = None,
    ) -> tinker.APIFuture[tinker.OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which it clears.

        `grad_accumulation_normalization` divides the gradient first, see `GradAccNormalization`;
        None leaves it a sum.
        """
        if not isinstance(adam_params, tinker.AdamParams):
            raise ValueError(
                f"adam_params is {type(adam_params).__name__}: pass tinker.AdamParams(learning_rate=…)"
            )
        checks.check_adam(adam_params)
        params = optim_params(adam_params, grad_accumulation_normalization)
        return self._submit(lambda: self._inner.optim_step(params))

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        *,
        timeout: float | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> tinker.APIFuture[tinker.types.SaveWeightsResponse]:
        """Saves weights and optimizer under `name`; what `load_state*` and branching take.

        A name that exists with other content is refused unless `overwrite`. `ttl_seconds` None
        keeps it for ever. `timeout` waits for the save, for at most so many seconds.
        """
        checks.check_name(name)
        checks.check_ttl(ttl_seconds)
        checks.check_metadata(user_metadata)
        future = self._submit(
            lambda: self._inner.save_state(
                name, ttl_seconds=ttl_seconds, overwrite=overwrite, user_metadata=user_metadata
            )
        )
        if timeout is not None:
            future.future().result(timeout)
        return future

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> tinker.APIFuture[tinker.types.SaveWeightsForSamplerResponse]:
        """Saves a sampler snapshot under exactly `name`; the server chooses its kind."""
        checks.check_name(name)
        checks.check_ttl(ttl_seconds)
        checks.check_metadata(user_metadata)
        return self._submit(
            lambda: self._inner.save_weights_for_sampler(
                name, ttl_seconds=ttl_seconds, user_metadata=user_metadata
            )
        )

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str | None = None, ttl_seconds: int | None = None
    ) -> SaveSamplerResult:
        """Saves a snapshot for hot load under `{name}-{session_id}`, and waits until it is stored.

        `checkpoint_type` is "base" (everything) or "delta" (what changed since the last snapshot);
        None leaves it to the server. Blocks.
        """
        if checkpoint_type not in (None, *_CHECKPOINT_TYPES):
            raise ValueError(
                f"checkpoint_type is {checkpoint_type!r}: use one of {list(_CHECKPOINT_TYPES)}, or None"
            )
        snapshot_name = f"{name}-{self.session_id}"
        metadata = {_CHECKPOINT_TYPE: checkpoint_type} if checkpoint_type else None
        future = self.save_weights_for_sampler(snapshot_name, ttl_seconds, metadata)
        return SaveSamplerResult(path=future.future().result().path, snapshot_name=snapshot_name)

    def load_state(self, path: str) -> OrderedFuture[LoadStateResponse]:
        """Loads saved weights and starts a fresh optimizer.

        `path` is a name of this job, or `cross_job://<job>/<name>`. Takes effect after all that
        was called before; blocks until that is done, the future covers the load itself.
        """
        return self._load_state(path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> OrderedFuture[LoadStateResponse]:
        """As `load_state`, with the saved optimizer: training goes on exactly there."""
        return self._load_state(path, optimizer=True)

    def load_adapter(self, adapter_path: str) -> OrderedFuture[LoadAdapterResponse]:
        """Loads the weights of a PEFT adapter (`accounts/<a>/models/<id>`). As `load_state`."""
        checks.check_path(adapter_path, field="adapter_path")
        return self._load(
            "load_adapter",
            {"adapter_path": adapter_path},
            lambda answer: LoadAdapterResponse(
                adapter_path=answer.get("adapter_path", adapter_path), model_id=self.model_id
            ),
        )

    def list_checkpoints(self) -> list[str]:
        """Names of the job's saved states, sorted."""
        return self._connection.call("GET", "/api/v1/list_checkpoints").get("checkpoints") or []

    def resolve_checkpoint_path(
        self, checkpoint_name: str, source_job_id: str | None = None
    ) -> str:
        """What `load_state*` takes: the name itself, or that name of another job."""
        checks.check_name(checkpoint_name, field="checkpoint_name")
        if source_job_id is None:
            return checkpoint_name
        checks.check_name(source_job_id, field="source_job_id")
        return f"cross_job://{source_job_id}/{checkpoint_name}"

    def get_info(self) -> tinker.types.GetInfoResponse:
        """The model's base, tokenizer and rank, as they were when the client was made."""
        return self._inner.get_info()

    def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer (imports transformers)."""
        return self._inner.get_tokenizer()

    def create_sampling_client(
        self, model_path: str, retry_config: Any = None
    ) -> tinker.SamplingClient:
        """tinker's sampling client. A dedicated trainer refuses it: sample through a deployment
        with `DeploymentSampler`."""
        return self._inner.create_sampling_client(model_path, retry_config).future().result()

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, retry_config: Any = None
    ) -> tinker.SamplingClient:
        """As `create_sampling_client`, on weights saved for it."""
        saved = self.save_weights_for_sampler(name or f"sampler-{secrets.token_hex(4)}")
        return self.create_sampling_client(saved.future().result().path, retry_config)

    async def forward_async(
        self,
        data: list[tinker.Datum],
        loss_fn: tinker.types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
        """`forward` as a coroutine: its result is the future, to be awaited too."""
        return self.forward(data, loss_fn, loss_fn_config)

    async def forward_backward_async(
        self,
        data: list[tinker.Datum],
        loss_fn: tinker.types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
        """`forward_backward` as a coroutine."""
        return self.forward_backward(data, loss_fn, loss_fn_config)

    async def forward_backward_custom_async(
        self,
        data: list[tinker.Datum],
        loss_fn: CustomLoss | tinker.LossHandle,
        *,
        loss_type_input: str = "logprobs",
    ) -> tinker.APIFuture[tinker.ForwardBackwardOutput]:
        """`forward_backward_custom` as a coroutine."""
        return self.forward_backward_custom(data, loss_fn, loss_type_input=loss_type_input)

    async def optim_step_async(
        self,
        adam_params: tinker.AdamParams,
        grad_accumulation_normalization: GradAccNormalization | str | None = None,
    ) -> tinker.APIFuture[tinker.OptimStepResponse]:
        """`optim_step` as a coroutine."""
        return self.optim_step(adam_params, grad_accumulation_normalization)

    async def save_state_async(
        self, name: str, ttl_seconds: int | None = None
    ) -> tinker.APIFuture[tinker.types.SaveWeightsResponse]:
        """`save_state` as a coroutine."""
        return self.save_state(name, ttl_seconds)

    async def save_weights_for_sampler_async(
        self, name: str, ttl_seconds: int | None = None
    ) -> tinker.APIFuture[tinker.types.SaveWeightsForSamplerResponse]:
        """`save_weights_for_sampler` as a coroutine."""
        return self.save_weights_for_sampler(name, ttl_seconds)

    async def load_state_async(self, path: str) -> OrderedFuture[LoadStateResponse]:
        """`load_state` without blocking the event loop."""
        return await asyncio.to_thread(self.load_state, path)

    async def load_state_with_optimizer_async(self, path: str) -> OrderedFuture[LoadStateResponse]:
        """`load_state_with_optimizer` without blocking the event loop."""
        return await asyncio.to_thread(self.load_state_with_optimizer, path)

    async def get_info_async(self) -> tinker.types.GetInfoResponse:
        """`get_info` as a coroutine."""
        return self.get_info()

    def _submit(self, call: Callable[[], tinker.APIFuture[Result]]) -> tinker.APIFuture[Result]:
        """Runs a tinker call that numbers a request, in the order of the callers."""
        with self._order:
            self._check_usable()
            future = call()
            self._keep(future.future())
            return future

    def _keep(self, future: Future[Any]) -> None:
        self._outstanding.add(future)
        future.add_done_callback(self._outstanding.discard)

    def _check_usable(self) -> None:
        if self._broken_by is not None:
            raise RuntimeError(_NEW_CLIENT) from self._broken_by

    def _guard(self, loss_fn: CustomLoss) -> CustomLoss:
        def guarded(data: list[tinker.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
            try:
                return loss_fn(data, logprobs)
            except BaseException as exc:
                self._broken_by = exc
                exc.add_note(f"in the custom loss: {_NEW_CLIENT}")
                raise

        return guarded

    def _note_failure(self, future: Future[Any]) -> None:
        # tinker ends the client for any failure between the two halves, the server's included.
        error = None if future.cancelled() else future.exception()
        if future.cancelled() or error is not None:
            self._broken_by = self._broken_by or error or asyncio.CancelledError()

    def _load_state(self, path: str, *, optimizer: bool) -> OrderedFuture[LoadStateResponse]:
        checks.check_path(path)
        return self._load(
            "load_weights",
            {"path": path, "optimizer": optimizer},
            lambda answer: LoadStateResponse(path=answer.get("path", path)),
        )

    def _load(
        self, operation: str, fields: Json, parse: Callable[[Json], Result]
    ) -> OrderedFuture[Result]:
        """A request without a sequence number: it takes effect at the end of what the model has
        accepted. tinker posts later than it numbers, so everything outstanding must be done before."""
        with self._order:
            self._check_usable()
            wait(self._outstanding.copy())
            accepted = self._connection.call(
                "POST", f"/api/v1/{operation}", body={"model_id": self.model_id, **fields}
            )
            request_id: str = accepted["request_id"]
            future = in_thread(lambda: parse(retrieve(self._connection, request_id)))
            self._keep(future)
            return OrderedFuture(future)
