"""A run of six steps whose weights must come out the same whatever dies on the way."""

from __future__ import annotations

from typing import Any

from journeys.loop import Loop, start_loop

STEPS = 6


def undisturbed_digest(server: Any) -> str:
    """Of the weights after six steps without a mishap."""
    loop = start_loop(server)
    loop.train(STEPS)
    return weights_digest(loop, "final")


def weights_digest(loop: Loop, name: str) -> str:
    """Digest of what the trainer computes with, through an ordinary base snapshot."""
    saved = loop.client.save_weights_for_sampler_ext(name, checkpoint_type="base")
    (manifest,) = [
        m for m in loop.store.list("local", loop.job.job_id) if m.identity == saved.snapshot_name
    ]
    return manifest.digest


def engine_pid(loop: Loop) -> int:
    return loop.events("engine_started")[-1]["pid"]


def front_pid(loop: Loop) -> int:
    return loop.events("started")[-1]["pid"]
