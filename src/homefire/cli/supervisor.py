"""The supervisor: starts control and the gateway, starts them again when they die, stops them.

    take over -> start both -> wait until all planes answer -> watch -> stop control, then gateway

It owns no state worth keeping: trainers and replicas belong to control, which adopts them again
after its own death, and the listening socket stays open here while a gateway is replaced.
"""

from __future__ import annotations

import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec

from homefire.cli.leftovers import end, find_leftovers, kill
from homefire.cli.readiness import wait_until_answering
from homefire.cli.service import Service, ServiceCommand, read_service_record
from homefire.foundation.durable import write_private
from homefire.foundation.home import Home
from homefire.foundation.process import is_alive
from homefire.wire.errors import Unavailable
from homefire.wire.specs import ControlSpec, GatewaySpec

READY_WITHIN_S = 60.0
"""Control may have to make the built-in model and adopt many processes before it answers."""
CONTROL_STOPS_WITHIN_S = 90.0
"""Longer than control's own bound for the recovery points of all trainers."""
GATEWAY_STOPS_WITHIN_S = 3.0
"""Nothing worth waiting for is in flight once control has stopped everything."""
LEFTOVERS_STOP_WITHIN_S = 2.0
_ONE_PRESS_S = 0.5
"""Signals this close together are one: `timeout` and service managers signal child and group."""
_YOUNG_S = 30.0
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 10.0


@dataclass(frozen=True)
class Exited:
    service: Service
    status: int


@dataclass(frozen=True)
class StopAsked:
    number: signal.Signals
    at: float
    """Monotonic seconds."""


@dataclass(frozen=True)
class Answering:
    """All planes answer."""


Happening = Exited | StopAsked | Answering


def restart_delay_s(failures: int) -> float:
    """0.1, 0.2, 0.4 … 10 seconds: a service that keeps dying must not keep the machine busy."""
    return min(_FIRST_DELAY_S * 2 ** (failures - 1), _LONGEST_DELAY_S)


class Supervisor:
    """Lives in the main thread; signals, exits and the readiness probe arrive in one queue."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._started_at: dict[str, float] = {}
        self._hurried_from = 0.0
        """When a further signal starts to mean that it should go faster."""
        self._control: Service
        self._gateway: Service

    def take_over(self) -> None:
        """Ends the gateway and control of a supervisor that was killed.

        By SIGKILL, since to control a SIGTERM means to stop every job, while after a SIGKILL the
        next control adopts them running. The home's lock proves that nobody supervises these.
        """
        records = [read_service_record(self._record(name)) for name in ("gateway", "control")]
        stale = [record.process for record in records if record and is_alive(record.process)]
        if stale:
            _say("taking over from a `homefire up` that was killed")
            kill(stale)

    def run(
        self, control: ControlSpec, gateway: GatewaySpec, *, listening: socket.socket, url: str
    ) -> int:
        """Blocks until stopped; 0 after a clean stop. Raises Unavailable when starting fails."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask_to_stop)
        self._control = self._service("control", control, [])
        self._gateway = self._service(
            "gateway", gateway, ["--fd", str(listening.fileno())], (listening.fileno(),)
        )
        try:
            self._start(self._control)
            self._start(self._gateway)
            if self._wait_until_ready(gateway, listening):
                print(f"homefire is ready at {url}", flush=True)
                self._watch()
        finally:
            clean = self._stop()
        return 0 if clean else 1

    def _ask_to_stop(self, number: int, _: FrameType | None) -> None:
        self._happenings.put(StopAsked(signal.Signals(number), time.monotonic()))

    def _service(
        self,
        name: str,
        spec: ControlSpec | GatewaySpec,
        options: list[str],
        descriptors: tuple[int, ...] = (),
    ) -> Service:
        spec_file = self._home.run / f"{name}.spec.json"
        write_private(spec_file, msgspec.json.encode(spec))
        command = ServiceCommand(
            name=name,
            words=[sys.executable, "-m", f"homefire.{name}", str(spec_file), *options],
            log=self._home.run / f"{name}.log",
            record=self._record(name),
            descriptors=descriptors,
        )
        return Service(command, lambda service, code: self._happenings.put(Exited(service, code)))

    def _record(self, name: str) -> Path:
        return self._home.run / f"{name}.json"

    def _start(self, service: Service) -> None:
        self._started_at[service.name] = time.monotonic()
        service.start()

    def _wait_until_ready(self, gateway: GatewaySpec, listening: socket.socket) -> bool:
        """False when a stop was asked for meanwhile. Raises Unavailable when a service ended."""
        given_up = threading.Event()
        address = _own_address(gateway.host, listening)

        def ask() -> None:
            secure = gateway.tls_certificate is not None
            key = self._home.api_key()
            if wait_until_answering(address, key=key, secure=secure, given_up=given_up):
                self._happenings.put(Answering())

        threading.Thread(target=ask, daemon=True).start()
        try:
            match self._next(READY_WITHIN_S):
                case Answering():
                    return True
                case StopAsked():
                    return False
                case Exited(service, status):
                    raise _did_not_start(service, f"ended with status {status}")
                case None:
                    raise _did_not_start(self._control, f"did not answer in {READY_WITHIN_S:g} s")
        finally:
            given_up.set()

    def _watch(self) -> None:
        """Until a stop is asked for: starts again what ends, after a delay that grows."""
        due: dict[Service, float] = {}
        while True:
            now = time.monotonic()
            for service in [service for service, at in due.items() if at <= now]:
                del due[service]
                self._start(service)
            wait_s = max(min(due.values()) - time.monotonic(), 0) if due else None
            match self._next(wait_s):
                case StopAsked(number, at):
                    self._hurried_from = at + _ONE_PRESS_S
                    _say(f"{number.name}: saving the state of running jobs (again to hurry)")
                    return
                case Exited(service, status):
                    due[service] = time.monotonic() + self._delay_after_exit(service, status)
                case _:
                    pass

    def _delay_after_exit(self, service: Service, status: int) -> float:
        young = time.monotonic() - self._started_at[service.name] < _YOUNG_S
        service.failures = service.failures + 1 if young else 1
        delay_s = restart_delay_s(service.failures)
        _say(f"{service.name} ended with status {status}; starting it again in {delay_s:g} s")
        return delay_s

    def _stop(self) -> bool:
        """Whether everything stopped by itself. Afterwards nothing of this home runs."""
        self._control.signal(signal.SIGTERM)
        clean = self._await_exit(self._control, timeout_s=CONTROL_STOPS_WITHIN_S)
        self._gateway.signal(signal.SIGTERM)
        self._await_exit(self._gateway, timeout_s=GATEWAY_STOPS_WITHIN_S)
        leftovers = find_leftovers(self._home)
        if leftovers:
            _say(f"ending {len(leftovers)} processes that were left")
            end(leftovers, grace_s=LEFTOVERS_STOP_WITHIN_S)
        _say("homefire has stopped" if clean else "homefire has stopped, not cleanly")
        return clean

    def _await_exit(self, service: Service, *, timeout_s: float) -> bool:
        """Kills the service at the deadline, or when a stop is asked for once more."""
        deadline = time.monotonic() + timeout_s
        while service.is_running:
            left_s = deadline - time.monotonic()
            happening = self._next(left_s) if left_s > 0 else None
            hurried = isinstance(happening, StopAsked) and happening.at >= self._hurried_from
            if happening is None or hurried:
                _say(f"not waiting for {service.name} any longer")
                service.signal(signal.SIGKILL)
                service.wait()
                return False
        return True

    def _next(self, timeout_s: float | None) -> Happening | None:
        try:
            return self._happenings.get(timeout=timeout_s)
        except queue.Empty:
            return None


def _own_address(host: str, listening: socket.socket) -> tuple[str, int]:
    """Where this process reaches its own listening socket."""
    port = listening.getsockname()[1]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _did_not_start(service: Service, what: str) -> Unavailable:
    return Unavailable(
        f"{service.name} {what} before homefire was ready",
        hint=f"the end of its log:\n{service.log_tail()}",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
