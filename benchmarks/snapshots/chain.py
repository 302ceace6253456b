"""A long chain of deltas: any point of it is the trainer's weights, bit for bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
from report import Report
from weights import moved

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    DirectoryStore,
    RawTensor,
    SnapshotInfo,
    digest_tensors,
    ensure_tiny,
    materialize,
    whole_digest,
    write_base,
    write_delta,
)

_SHAPE = (256, 128)
_NUM_TENSORS = 8
_SHARE = 0.02


def measure(report: Report, directory: Path, *, num_deltas: int, num_points: int) -> None:
    report.say(f"{num_points} random points of a chain of {num_deltas} deltas")
    store = DirectoryStore(directory / "chain")
    digests = _publish(store, ensure_tiny(directory / "tiny"), num_deltas)
    points = random.Random(0).sample(sorted(digests), min(num_points, len(digests)))
    began = time.perf_counter()
    equal = 0
    for identity in points:
        found = materialize(store, "local", "bench", "policy", identity)
        equal += whole_digest(digest_tensors(found.tensors)) == digests[identity]
    seconds = time.perf_counter() - began
    report.add(f"points of a {num_deltas}-delta chain equal to the trainer's", equal / len(points),
               at_least=1.0)  # fmt: skip
    report.add("one such point, 0.26 M parameters, from its base", seconds / len(points), "s")


def _publish(store: DirectoryStore, model_files: Path, num_deltas: int) -> dict[str, str]:
    """The trainer's digests by identity."""
    generator = np.random.default_rng(0)
    tensors = {f"w{n}": _random(generator) for n in range(_NUM_TENSORS)}
    parent = write_base(store, _key(0), tensors, _info(0), model_files=model_files)
    digests = {parent.identity: whole_digest(digest_tensors(tensors))}
    for number in range(1, num_deltas + 1):
        following = moved(tensors, _SHARE)
        parent = write_delta(
            store, _key(number), following, _info(number), parent=parent, parent_tensors=tensors
        )
        tensors = following
        digests[parent.identity] = whole_digest(digest_tensors(tensors))
    return digests


def _random(generator: np.random.Generator) -> RawTensor:
    bits = generator.integers(0x3C00, 0x3F00, _SHAPE[0] * _SHAPE[1]).astype("<u2")
    return RawTensor("BF16", _SHAPE, bits.view(np.uint8))


def _key(number: int) -> CheckpointKey:
    return CheckpointKey("local", "bench", "policy", CheckpointFamily.SAMPLER, f"s{number:04d}")


def _info(number: int) -> SnapshotInfo:
    return SnapshotInfo(step=number, base_model="bench", created_at=float(number))
