"""The engine's loop: one request frame in, one reply frame out, until the front hangs up.

Saves are written by a thread of their own (`saver.py`) after their reply, while later requests run.

A user's mistake answers `Failure`; anything unexpected answers `Failure` too, with its traceback in the
log. Nothing but the end of the stream, `Shutdown` or `EngineUnusable` ends the loop.
"""

from __future__ import annotations

import logging
import select
import socket
import threading

import msgspec

from homefire.foundation.failpoints import failpoint
from homefire.trainer.engine.protocol import EngineUnusable, TrainingEngine
from homefire.trainer.engine.saver import Saver
from homefire.wire.engine import (
    AdoptSnapshot,
    Arrays,
    CloseSlot,
    DiscardGradients,
    Done,
    Failure,
    Forward,
    ForwardBackward,
    LoadAdapter,
    LoadRecovery,
    LoadState,
    OpenModel,
    OpenSlot,
    OptimStep,
    PackedForwardBackward,
    Reply,
    Request,
    SaveExternal,
    SaveRecovery,
    SaveRequest,
    SaveSampler,
    SaveState,
    Shutdown,
    WeightsDigest,
)
from homefire.wire.engine_frames import decode_request, encode_reply, read_frame
from homefire.wire.errors import EngineFailed, ErrorRecord, HomefireError

log = logging.getLogger(__name__)
_AFTER_SAVES = (AdoptSnapshot, LoadState, LoadAdapter, LoadRecovery, Shutdown)


def serve(connection: socket.socket, engine: TrainingEngine) -> None:
    """Blocks until the front closes the stream or sends `Shutdown`."""
    outlet = _Outlet(connection)
    saver = Saver(lambda ended: outlet.send(encode_reply(ended)))
    try:
        while (frame := _next_frame(connection, engine)) is not None:
            failpoint("engine.before_run")
            message, reply = _answer(engine, saver, frame)
            failpoint("engine.before_reply")
            if not outlet.send(reply) or isinstance(message, Shutdown):
                return
    finally:
        saver.close()


class _Outlet:
    """Whole frames, of whichever thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, frame: bytes) -> bool:
        """False when the front has gone."""
        try:
            with self._lock:
                self._connection.sendall(frame)
        except OSError as exc:
            log.warning("the front went away before the reply: %s", exc)
            return False
        return True


def _next_frame(connection: socket.socket, engine: TrainingEngine) -> bytes | None:
    """Blocks for the next request; what the engine keeps for one that does not come is freed."""
    while (expires_in_s := engine.free_expired()) is not None:
        readable, _, _ = select.select([connection], [], [], expires_in_s)
        if readable:
            break
    return read_frame(connection)


def _answer(engine: TrainingEngine, saver: Saver, frame: bytes) -> tuple[Request | None, bytes]:
    message: Request | None = None
    try:
        message, arrays = decode_request(frame)
        reply, reply_arrays = _perform(engine, saver, message, arrays)
        return message, encode_reply(reply, reply_arrays)
    except HomefireError as exc:
        log.info("%s failed: %s", type(message).__name__, exc)
        return message, encode_reply(Failure(ErrorRecord.of(exc)))
    except msgspec.DecodeError as exc:
        error = EngineFailed(f"the request cannot be decoded: {exc}", hint="restart the engine")
        return message, encode_reply(Failure(ErrorRecord.of(error)))
    except EngineUnusable:
        raise
    except Exception as exc:  # the worker loop: a broken operation must not end it
        log.exception("%s broke", type(message).__name__)
        error = EngineFailed(f"{type(message).__name__} broke: {type(exc).__name__}: {exc}")
        return message, encode_reply(Failure(ErrorRecord.of(error)))


def _perform(
    engine: TrainingEngine, saver: Saver, message: Request, arrays: Arrays
) -> tuple[Reply, Arrays]:
    """Saves are only begun; what they decide for others waits for them."""
    if isinstance(message, SaveRequest):
        return saver.begin(engine.prepare_save(message)), {}
    if isinstance(message, _AFTER_SAVES):
        saver.finish()
    return dispatch(engine, message, arrays)


def dispatch(engine: TrainingEngine, message: Request, arrays: Arrays) -> tuple[Reply, Arrays]:
    """The method of each request. A save is durable when this returns."""
    match message:
        case Forward():
            return engine.forward(message, arrays)
        case ForwardBackward():
            return engine.forward_backward(message, arrays)
        case PackedForwardBackward():
            return engine.forward_backward_packed(message, arrays)
        case _:
            return _dispatch_without_arrays(engine, message), {}


def _dispatch_without_arrays(engine: TrainingEngine, message: Request) -> Reply:
    match message:
        case OptimStep():
            return engine.optim_step(message)
        case SaveSampler() | SaveExternal() | SaveState() | SaveRecovery():
            return engine.prepare_save(message).write()
        case AdoptSnapshot():
            return engine.adopt_snapshot(message)
        case LoadState():
            return engine.load_state(message)
        case LoadAdapter():
            return engine.load_adapter(message)
        case LoadRecovery():
            return engine.load_recovery(message)
        case WeightsDigest():
            return engine.weights_digest(message)
        case DiscardGradients():
            return engine.discard_gradients(message)
        case OpenModel():
            return engine.open_model(message)
        case OpenSlot():
            return engine.open_slot(message)
        case CloseSlot():
            return engine.close_slot(message)
        case Shutdown():
            return Done()
        case Forward() | ForwardBackward() | PackedForwardBackward():
            raise TypeError("forward passes take arrays")
