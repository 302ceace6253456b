"""Bit flips and cuts of every kind of file: always detected, never a crash, never much memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from homefire.checkpoints import CheckpointFamily, materialize, read_safetensors, read_state
from homefire.checkpoints.delta_file import DELTA_FILE, read_delta_file
from homefire.checkpoints.manifest_file import read_manifest
from homefire.wire.errors import HomefireError
from homefire.wire.manifest import MANIFEST_FILE

from .conftest import BUCKET

NUM_PARSED = 4_000
"""Of files that are parsed without having been compared with a manifest."""


def damaged(original: bytes, generator: np.random.Generator) -> bytes:
    """One bit flipped, or cut."""
    data, position = bytearray(original), int(generator.integers(len(original)))
    if generator.random() < 0.8:
        data[position] ^= 1 << int(generator.integers(8))
    else:
        del data[position:]
    return bytes(data)


@pytest.fixture
def whole(trainer, store, make_tensors, nudge, make_key) -> dict[Path, Callable[[], object]]:
    """Every file of every kind of checkpoint, and how the checkpoint is loaded."""
    first = make_tensors()
    trainer.base("s0", first)
    trainer.delta("s1", nudge(first, 1), "s0")
    trainer.delta("s2", nudge(trainer.published["s1"], 2), "s1")
    trainer.lora("adapter", first)
    trainer.state("mark", first)
    loads: dict[Path, Callable[[], object]] = {}
    for name, target in [("s0", "s2"), ("s1", "s2"), ("s2", "s2"), ("adapter", "adapter")]:
        for path in store.directory(make_key(name)).iterdir():
            loads[path] = lambda target=target: materialize(store, *BUCKET, target)
    state = store.directory(make_key("mark", CheckpointFamily.STATE))
    loads |= dict.fromkeys(state.iterdir(), lambda: read_state(state))
    return loads


def flip_everywhere(
    loads: dict[Path, Callable[[], object]], total: int, *, seed: int
) -> tuple[int, list[str]]:
    """How many were tried, and those that went unnoticed."""
    generator, unnoticed, tried = np.random.default_rng(seed), list[str](), 0
    paths = sorted(loads)
    for number in range(total):
        path = paths[number % len(paths)]
        original = path.read_bytes()
        path.write_bytes(damaged(original, generator))
        tried += 1
        try:
            loads[path]()
        except HomefireError:
            pass
        else:
            unnoticed.append(f"{path} #{number}")
        finally:
            path.write_bytes(original)
    return tried, unnoticed


def test_flips_and_cuts_of_every_file_are_detected(whole) -> None:
    assert len(whole) >= 12
    assert flip_everywhere(whole, 600, seed=1) == (600, [])
    for load in whole.values():
        load()


@pytest.mark.long
@pytest.mark.soak
def test_ten_thousand_flips_and_cuts_are_detected(whole) -> None:
    assert flip_everywhere(whole, 10_000, seed=2) == (10_000, [])


def test_a_loader_that_checks_nothing_would_be_caught(whole) -> None:
    """The planted mistake."""
    blind = dict.fromkeys(whole, lambda: None)
    assert len(flip_everywhere(blind, 20, seed=3)[1]) == 20


@pytest.mark.parametrize("kind", ["safetensors", "delta", "manifest"])
def test_a_parser_of_a_damaged_file_refuses_or_reads_within_bounds(
    kind, whole, trainer, tmp_path
) -> None:
    """Before any digest is compared: an error of ours or a value, and memory like the file's."""
    name = {"safetensors": "model.safetensors", "delta": DELTA_FILE, "manifest": MANIFEST_FILE}[
        kind
    ]
    source = next(path for path in sorted(whole) if path.name == name)
    original, base = source.read_bytes(), trainer.published["s0"]
    directory = tmp_path / "damaged"
    directory.mkdir()
    path = directory / name

    def parse() -> None:
        if kind == "manifest":
            read_manifest(directory)
        elif kind == "safetensors":
            read_safetensors(path)
        else:
            file = read_delta_file(path)
            for tensor in file.deltas:
                file.apply(tensor, base[tensor])

    generator = np.random.default_rng(4)
    tracemalloc.start()
    refused = 0
    try:
        for _ in range(NUM_PARSED // 4):
            path.write_bytes(damaged(original, generator))
            try:
                parse()
            except (HomefireError, KeyError):
                refused += 1
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert refused > 0
