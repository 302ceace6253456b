"""`python -m homefire.trainer.engine --fd N --kind torch|fake`: serves one front over a socket."""

from __future__ import annotations

import argparse
import signal
import socket

from homefire.foundation import logs
from homefire.trainer.engine.protocol import TrainingEngine
from homefire.trainer.engine.serve import serve
from homefire.wire.specs import EngineKind


def main() -> None:
    parser = argparse.ArgumentParser(prog="homefire.trainer.engine")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a socket pair")
    parser.add_argument("--kind", type=EngineKind, choices=list(EngineKind), required=True)
    arguments = parser.parse_args()
    logs.configure("trainer.engine")
    # Ctrl-C reaches the whole process group; the front decides when its engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=arguments.fd) as connection:
        serve(connection, build_engine(arguments.kind))


def build_engine(kind: EngineKind) -> TrainingEngine:
    """Imports only what the kind needs: the fake starts without torch."""
    if kind == EngineKind.FAKE:
        from homefire.trainer.engine.fake import fake_engine

        return fake_engine()
    from homefire.trainer.engine.torch_engine import torch_engine

    return torch_engine()


if __name__ == "__main__":
    main()
