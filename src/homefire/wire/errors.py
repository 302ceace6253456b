"""Every error that homefire raises on purpose, with the code that crosses the wire.

    HomefireError
    ├── UserError                    the request cannot succeed as it stands; retrying changes nothing
    │   ├── InvalidArgument          a field has a wrong value
    │   │   ├── LengthMismatch       tensors of one datum disagree in length
    │   │   ├── TokenOutOfRange      a token id is not in the model's vocabulary
    │   │   ├── SequenceTooLong      a row exceeds the context length
    │   │   └── UnknownLoss          no such loss function
    │   ├── UnknownModel             the catalog has no such base model
    │   ├── ModelUnavailable         the catalog knows it, its files cannot be reached
    │   ├── UnknownShape             no such training shape
    │   ├── NotFound                 no such resource
    │   │   ├── UnknownDeployment    never existed; answered with 400, since clients wait on 404
    │   │   └── ModelNotFound        the same below /v1, where OpenAI's clients expect 404
    │   ├── AlreadyExists            a resource of that name exists (control plane only)
    │   ├── DuplicateCheckpoint      a checkpoint of that name exists with other content
    │   ├── WrongCheckpointKind      e.g. a sampler snapshot given to load_state
    │   ├── UnknownSnapshot          the store has no such snapshot
    │   ├── SequenceReused           a seq_id came again with another payload
    │   ├── SequenceGap              requests are held behind a missing seq_id
    │   ├── IncompleteGradient       a chunk is missing, so the gradient was cleared and not stepped
    │   ├── Superseded               a newer session holds the trainer's policy slot
    │   ├── FailedPrecondition       the resource is in a state that does not allow this
    │   │   └── TooManyModels        a pooled trainer holds as many models as it may
    │   ├── NonFiniteGradient        NaN or Inf in a loss or gradient; nothing was stepped
    │   ├── OutOfMemory              the device has no room for this batch
    │   ├── SizeCapExceeded          a snapshot would exceed the size cap
    │   ├── WeightsMismatch          the asked identity is not what is being served
    │   ├── Unsupported              a feature of the protocol that this version refuses by name
    │   ├── Unauthenticated          no key, or a wrong one
    │   ├── PermissionDenied         the key may not do this
    │   ├── PayloadTooLarge          a cap on bytes or counts
    │   ├── HomeTooNew               the home was written by a newer version
    │   ├── HomeBusy                 another process holds the home
    │   └── PortInUse                another process listens there
    └── ServerError                  the request was fine, we were not
        ├── EngineFailed             the engine died or broke on this operation
        ├── DigestMismatch           bytes do not hash to what their manifest says
        │   └── CanaryMismatch       loaded weights do not answer as their manifest says
        ├── ReplayDivergence         a replayed result differs from the journaled one
        ├── StateReplaced            a state that a replay loads again was overwritten or deleted since
        ├── HotLoadFailed            the replica kept its old weights
        ├── StorageFailed            the disk refused a write
        ├── Overloaded               a queue is full; retry later
        ├── SwapInProgress           weights are being swapped, and the deployment asked to refuse meanwhile
        ├── Unavailable              a service is down or starting
        └── InternalError            anything else

Each class has a stable `code`; `from_code` brings it back as the same class on the other side.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

import msgspec


class Category(StrEnum):
    """Who has to act. The values are the Tinker protocol's failed-future categories."""

    USER = "user"
    """The caller must change the request."""
    SERVER = "server"
    """The operator must look; the request may be retried."""


class HomefireError(Exception):
    """Root of the tree. `message` says what and which one, `hint` what to do about it."""

    code: ClassVar[str] = "internal"
    category: ClassVar[Category] = Category.SERVER
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[int] = 13

    def __init__(self, message: str, *, hint: str = "", field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field

    @property
    def details(self) -> dict[str, str]:
        """What a program may want of the message, beside it in the body."""
        return {}

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(HomefireError):
    code = "user_error"
    category = Category.USER
    http_status = 400
    grpc_code = 3


class InvalidArgument(UserError):
    code = "invalid_argument"


class LengthMismatch(InvalidArgument):
    code = "length_mismatch"


class TokenOutOfRange(InvalidArgument):
    code = "token_out_of_range"


class SequenceTooLong(InvalidArgument):
    code = "sequence_too_long"


class UnknownLoss(InvalidArgument):
    code = "unknown_loss"


class UnknownModel(UserError):
    code = "unknown_model"


class ModelUnavailable(UserError):
    code = "model_unavailable"
    grpc_code = 9


class UnknownShape(UserError):
    code = "unknown_shape"
    http_status = 404
    grpc_code = 5


class NotFound(UserError):
    code = "not_found"
    http_status = 404
    grpc_code = 5


class UnknownDeployment(NotFound):
    code = "unknown_deployment"
    http_status = 400
    grpc_code = 3


class ModelNotFound(NotFound):
    code = "model_not_found"


class AlreadyExists(UserError):
    code = "already_exists"
    http_status = 409
    grpc_code = 6


class DuplicateCheckpoint(UserError):
    code = "duplicate_checkpoint"
    grpc_code = 6


class WrongCheckpointKind(UserError):
    code = "wrong_checkpoint_kind"


class UnknownSnapshot(UserError):
    code = "unknown_snapshot"


class SequenceReused(UserError):
    code = "sequence_reused"


class SequenceGap(UserError):
    code = "sequence_gap"
    http_status = 422


class IncompleteGradient(UserError):
    code = "incomplete_gradient"


class Superseded(UserError):
    code = "superseded"
    grpc_code = 9


class FailedPrecondition(UserError):
    code = "failed_precondition"
    grpc_code = 9


class TooManyModels(FailedPrecondition):
    code = "too_many_models"


class NonFiniteGradient(UserError):
    code = "non_finite_gradient"


class OutOfMemory(UserError):
    code = "out_of_memory"
    grpc_code = 8


class SizeCapExceeded(UserError):
    code = "size_cap_exceeded"


class WeightsMismatch(UserError):
    code = "weights_mismatch"
    http_status = 412
    grpc_code = 9

    def __init__(
        self, message: str, *, hint: str = "", field: str | None = None, current: str = ""
    ) -> None:
        """`current`: the identity that is served."""
        super().__init__(message, hint=hint, field=field)
        self.current = current

    @property
    def details(self) -> dict[str, str]:
        return {"current_identity": self.current} if self.current else {}


class Unsupported(UserError):
    code = "unsupported"
    grpc_code = 12


class Unauthenticated(UserError):
    code = "unauthenticated"
    http_status = 401
    grpc_code = 16


class PermissionDenied(UserError):
    code = "permission_denied"
    http_status = 403
    grpc_code = 7


class PayloadTooLarge(UserError):
    code = "payload_too_large"
    http_status = 413
    grpc_code = 8


class HomeTooNew(UserError):
    code = "home_too_new"


class HomeBusy(UserError):
    code = "home_busy"


class PortInUse(UserError):
    code = "port_in_use"


class ServerError(HomefireError):
    code = "server_error"


class EngineFailed(ServerError):
    code = "engine_failed"


class DigestMismatch(ServerError):
    code = "digest_mismatch"
    grpc_code = 15


class CanaryMismatch(DigestMismatch):
    code = "canary_mismatch"


class ReplayDivergence(ServerError):
    code = "replay_divergence"
    grpc_code = 15


class StateReplaced(ServerError):
    code = "state_replaced"


class HotLoadFailed(ServerError):
    code = "hot_load_failed"


class StorageFailed(ServerError):
    code = "storage_failed"


class Overloaded(ServerError):
    code = "overloaded"
    http_status = 429
    grpc_code = 8


class SwapInProgress(ServerError):
    code = "swap_in_progress"
    http_status = 425
    grpc_code = 14


class Unavailable(ServerError):
    code = "unavailable"
    http_status = 503
    grpc_code = 14


class InternalError(ServerError):
    code = "internal"


def _subclasses(cls: type[HomefireError]) -> list[type[HomefireError]]:
    return [cls, *(leaf for child in cls.__subclasses__() for leaf in _subclasses(child))]


ERRORS_BY_CODE: dict[str, type[HomefireError]] = {
    cls.code: cls for cls in _subclasses(HomefireError) if cls is not HomefireError
}


class ErrorRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error between our own processes and in journals.

    Example: ErrorRecord("unknown_loss", "user", "loss_fn 'foo' is unknown", "use cross_entropy")
    """

    code: str
    category: str
    message: str
    hint: str = ""
    field: str | None = None

    @classmethod
    def of(cls, error: HomefireError) -> ErrorRecord:
        return cls(error.code, error.category.value, error.message, error.hint, error.field)

    def exception(self) -> HomefireError:
        return from_code(self.code, self.message, hint=self.hint, field=self.field)


def from_code(
    code: str, message: str, *, hint: str = "", field: str | None = None
) -> HomefireError:
    """The error class of a wire code; an unknown code (a newer peer) becomes `InternalError`."""
    return ERRORS_BY_CODE.get(code, InternalError)(message, hint=hint, field=field)


def error_body(error: HomefireError, *, request_id: str) -> dict[str, Any]:
    """The JSON body of a failed request, in the union of dialects that our clients read.

    Fireworks reads `error.message` or the gRPC shape (`code`, `message`, `details`) on either level,
    tinker prints the body, openai reads `error.message`, `error.type`, `error.code`, `error.param`.
    """
    kind = "invalid_request_error" if error.category is Category.USER else "server_error"
    info = _error_info(error, request_id=request_id)
    detail = {
        "code": error.code,
        "category": error.category.value,
        "message": str(error),
        "hint": error.hint,
        "request_id": request_id,
        "type": kind,
        "param": error.field,
        "details": [info],
        **error.details,
    }
    return {
        "error": detail,
        "code": error.grpc_code,
        "message": str(error),
        "detail": str(error),
        "details": [info],
    }


def _error_info(error: HomefireError, *, request_id: str) -> dict[str, Any]:
    """`google.rpc.ErrorInfo`: the stable reason that a client may branch on."""
    metadata = {"request_id": request_id, "field": error.field or ""}
    return {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": error.code.upper(),
        "domain": "homefire",
        "metadata": {name: value for name, value in metadata.items() if value},
    }


def error_of_body(body: dict[str, Any]) -> HomefireError:
    """The inverse of `error_body`: its message has the hint in it. KeyError or TypeError for a body of
    another make."""
    error = body["error"]
    hint: str = error.get("hint", "")
    message: str = error["message"].removesuffix(f" ({hint})")
    return from_code(error["code"], message, hint=hint, field=error.get("param"))
