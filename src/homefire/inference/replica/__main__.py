"""`python -m homefire.inference.replica SPEC`: runs one replica until SIGTERM."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from homefire.foundation import logs
from homefire.foundation.clock import SystemClock
from homefire.http.serve import serve_unix_until_stopped
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.inference.replica.app import replica_app
from homefire.inference.replica.replica import Replica
from homefire.wire.specs import ReplicaSpec, read_spec


def main() -> None:
    spec = read_spec(Path(sys.argv[1]), ReplicaSpec)
    logs.configure(f"replica {spec.name}")
    replica = Replica(spec, _open_and_freeze, SystemClock())
    serve_unix_until_stopped(
        replica_app(replica), socket=spec.listen.socket, on_stop=replica.release_watchers
    )


def _open_and_freeze(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
    """What loading left behind (a million objects of torch and transformers) is taken out of garbage
    collection, which would otherwise walk it under load."""
    engine = open_engine(spec, publish)
    gc.collect()
    gc.freeze()
    return engine


if __name__ == "__main__":
    main()
