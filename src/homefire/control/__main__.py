"""`python -m homefire.control SPEC`: the control plane as a process.

SIGTERM is a clean stop: every trainer and replica is stopped, every row stays, the exit status is 0.
SIGKILL leaves them running; the next control plane on the home adopts them. When its supervisor was
killed and no other took over, it stops cleanly by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from homefire.control.app import control_app
from homefire.control.plane import ControlPlane
from homefire.foundation.logs import configure
from homefire.foundation.supervised import end_with_supervisor
from homefire.http.serve import serve_unix_until_stopped
from homefire.launch.local import LocalLauncher
from homefire.wire.errors import HomefireError
from homefire.wire.specs import ControlSpec, read_spec


def main(arguments: list[str]) -> int:
    log = configure("control")
    spec = read_spec(Path(arguments[0]), ControlSpec)
    try:
        plane = ControlPlane(spec, launcher=LocalLauncher())
    except HomefireError as exc:
        log.error("control cannot start: %s", exc)
        return 1
    end_with_supervisor()
    serve_unix_until_stopped(
        control_app(plane), socket=spec.listen.socket, on_stop=plane.stop_processes
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
