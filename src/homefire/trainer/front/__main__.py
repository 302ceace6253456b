"""`python -m homefire.trainer.front SPEC`: serves one trainer job until SIGTERM, then exits with 0."""

from __future__ import annotations

import sys
from pathlib import Path

from homefire.foundation.logs import configure
from homefire.http.serve import serve_unix_until_stopped
from homefire.trainer.front.api import build_app
from homefire.trainer.front.job_lock import sole_front
from homefire.trainer.front.service import Front
from homefire.wire.errors import Unavailable
from homefire.wire.specs import TrainerSpec, read_spec


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m homefire.trainer.front SPEC\n")
        return 2
    log = configure("trainer")
    spec = read_spec(Path(arguments[0]), TrainerSpec)
    try:
        with sole_front(Path(spec.job_dir)):
            front = Front(spec)
            app = build_app(front)
            serve_unix_until_stopped(app, socket=spec.listen.socket, on_stop=front.stop)
    except Unavailable as exc:
        log.error("%s", exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
