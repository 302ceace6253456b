"""`/api/v1/…`: the root Tinker plane. Ids say who answers; bodies are forwarded as they came.

See docs/decisions/2026-11-24-root-plane.md for who answers what.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from homefire.gateway.caller import Caller
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.control_plane import ControlPlane
from homefire.gateway.envelope import read_envelope
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.root_samplers import RootSamplers
from homefire.gateway.root_trainers import SMALL_BODY_BYTES, RootTrainers
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.pooled import is_sampler, service_of

_OPERATIONS = frozenset(
    {
        "forward",
        "forward_backward",
        "optim_step",
        "save_weights",
        "save_weights_for_sampler",
        "save_weights_external",
        "load_weights",
        "load_adapter",
        "get_info",
        "unload_model",
    }
)
_MAX_PROMPT_BYTES = 64 << 20
_UNSUPPORTED = {
    "create_custom_loss": "use forward_backward_custom, whose loss the client computes",
    "retrieve_futures": "poll retrieve_future: client/config offers nothing else",
    "auth/token": "API keys are sent as they are: client/config asks for no token",
}
Answer = Callable[[Caller], Awaitable[None]]


class RootPlane:
    def __init__(
        self,
        *,
        trainers: RootTrainers,
        samplers: RootSamplers,
        control: ControlPlane,
        calls: ControlCalls,
    ) -> None:
        self._trainers = trainers
        self._samplers = samplers
        self._control = control
        self._calls = calls
        self._answers: dict[str, Answer] = {
            "client/config": self._answer_config,
            "client/dynamic_config": self._answer_dynamic_config,
            "healthz": self._answer_health,
            "telemetry": self._answer_telemetry,
            "session_heartbeat": self._heartbeat,
            "create_model": self._create_model,
            "retrieve_future": self._retrieve_future,
            "cancel_future": self._cancel_future,
            "asample": self._sample,
            "join_sampling_session": self._join,
        }

    async def answer(self, caller: Caller) -> None:
        operation = caller.path_parameter("operation")
        if operation in _UNSUPPORTED:
            raise Unsupported(f"{operation} is not supported", hint=_UNSUPPORTED[operation])
        if operation in _OPERATIONS and caller.method == "POST":
            await self._operate(caller, operation)
        elif operation in self._answers:
            await self._answers[operation](caller)
        else:
            await self._ask_control(caller, operation)

    async def _answer_config(self, caller: Caller) -> None:
        """All flags keep the client's defaults."""
        await caller.answer_json({})

    async def _answer_dynamic_config(self, caller: Caller) -> None:
        await caller.answer_json({"sample_cancel_enabled": True})

    async def _answer_health(self, caller: Caller) -> None:
        await caller.answer_json({"status": "ok"})

    async def _answer_telemetry(self, caller: Caller) -> None:
        """Nobody here wants to know."""
        await caller.body.read(max_bytes=_MAX_PROMPT_BYTES)
        await caller.answer_json({"status": "accepted"})

    async def _heartbeat(self, caller: Caller) -> None:
        """Answered at once, also while control is down."""
        await caller.body.read(max_bytes=SMALL_BODY_BYTES)
        try:
            await self._control.forward(caller, hold_s=0.0)
        except (UpstreamDown, UpstreamLost):
            await caller.answer_json({"type": "session_heartbeat"})

    async def _ask_control(self, caller: Caller, operation: str) -> None:
        await self._control.answer(caller)
        parts = operation.split("/")
        if len(parts) == 3 and (parts[0], parts[2]) == ("sessions", "finish"):
            self._calls.forget_session(caller.account, parts[1])

    async def _create_model(self, caller: Caller) -> None:
        envelope = await read_envelope(caller, max_bytes=SMALL_BODY_BYTES)
        await self._trainers.create(caller, "create_model", envelope)

    async def _operate(self, caller: Caller, operation: str) -> None:
        envelope = await read_envelope(caller)
        if operation == "load_weights" and envelope.model_id is None:
            await self._trainers.create(caller, operation, envelope)
        else:
            await self._trainers.operate(caller, operation, envelope)

    async def _sample(self, caller: Caller) -> None:
        envelope = await read_envelope(caller, max_bytes=_MAX_PROMPT_BYTES)
        await self._samplers.sample(caller, envelope)

    async def _join(self, caller: Caller) -> None:
        await self._samplers.join(caller, await read_envelope(caller, max_bytes=SMALL_BODY_BYTES))

    async def _retrieve_future(self, caller: Caller) -> None:
        request_id = await _request_id(caller)
        if is_sampler(service_of(request_id)):
            await self._samplers.retrieve(caller, request_id)
        else:
            await self._trainers.retrieve(caller, request_id)

    async def _cancel_future(self, caller: Caller) -> None:
        request_id = await _request_id(caller)
        if not is_sampler(service_of(request_id)):
            raise Unsupported(
                "an operation of a trainer cannot be cancelled once it was accepted",
                hint="only samples can be cancelled",
                field="request_id",
            )
        await self._samplers.cancel(caller, request_id)


async def _request_id(caller: Caller) -> str:
    envelope = await read_envelope(caller, max_bytes=SMALL_BODY_BYTES)
    if not envelope.request_id:
        raise InvalidArgument("the request names no request_id", field="request_id")
    return envelope.request_id
