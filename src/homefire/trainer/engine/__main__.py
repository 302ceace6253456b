"""`python -m homefire.trainer.engine --fd N --kind torch|fake`: serves one front over a socket.

With `--ranks N` there are N such processes. `--fd` is rank 0's end of its socket with the front, another
rank's end of its link to rank 0; rank 0 has its ends of those as `--links`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from homefire.foundation import logs
from homefire.trainer.engine.peer import end_with_peer
from homefire.trainer.engine.protocol import EngineUnusable, TrainingEngine
from homefire.trainer.engine.serve import serve
from homefire.wire.specs import EngineKind

if TYPE_CHECKING:
    from homefire.trainer.engine.ranks.rank_group import RankPlace

log = logging.getLogger("homefire.trainer.engine")


def main() -> None:
    arguments = _parser().parse_args()
    logs.configure("trainer.engine" + (f".{arguments.rank}" if arguments.ranks > 1 else ""))
    # Ctrl-C reaches the whole process group; the front decides when its engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=arguments.fd) as connection:
        end_with_peer(connection)
        try:
            run(connection, arguments)
        except EngineUnusable as exc:
            log.error("the engine ends: %s", exc)
            logging.shutdown()
            # At once: what tidies up after torch would wait for ranks that no longer answer.
            os._exit(1)


def run(connection: socket.socket, arguments: argparse.Namespace) -> None:
    if arguments.rank > 0:
        follow(connection, arguments)
        return
    engine = lead(arguments) if arguments.ranks > 1 else build_engine(arguments.kind)
    serve(connection, engine)


def build_engine(kind: EngineKind) -> TrainingEngine:
    """Imports only what the kind needs: the fake starts without torch."""
    if kind == EngineKind.FAKE:
        from homefire.trainer.engine.fake import fake_engine

        return fake_engine()
    from homefire.trainer.engine.torch_engine import torch_engine

    return torch_engine()


def lead(arguments: argparse.Namespace) -> TrainingEngine:
    """Rank 0 of several."""
    from homefire.trainer.engine.ranks.opening import ranked_engine

    return ranked_engine(_place(arguments), [socket.socket(fileno=fd) for fd in arguments.links])


def follow(connection: socket.socket, arguments: argparse.Namespace) -> None:
    """Another rank: returns when rank 0 has gone."""
    from homefire.trainer.engine.ranks.opening import follow_first

    follow_first(_place(arguments), connection)


def _place(arguments: argparse.Namespace) -> RankPlace:
    from homefire.trainer.engine.ranks.rank_group import RankPlace

    return RankPlace(arguments.rank, arguments.ranks, arguments.rendezvous, arguments.rank_timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="homefire.trainer.engine")
    parser.add_argument("--fd", type=int, required=True, help="inherited end of a socket pair")
    parser.add_argument("--kind", type=EngineKind, choices=list(EngineKind), required=True)
    parser.add_argument("--ranks", type=int, default=1, help="processes of this engine")
    parser.add_argument("--rank", type=int, default=0, help="which of them this is")
    parser.add_argument("--links", type=_descriptors, default=[], help="rank 0: FD,FD,… by rank")
    parser.add_argument("--rendezvous", type=Path, help="a new file, where the ranks meet")
    parser.add_argument("--rank-timeout", type=float, default=600.0, help="seconds")
    return parser


def _descriptors(text: str) -> list[int]:
    return [int(descriptor) for descriptor in text.split(",")]


if __name__ == "__main__":
    main()
