"""A directory becomes a base model: whole or not at all, and what does not fit is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from homefire.checkpoints import (
    RawTensor,
    ensure_tiny,
    raw_tensor,
    read_model_directory,
    write_safetensors,
)
from homefire.checkpoints.model_import import import_model, verify_import
from homefire.wire.errors import (
    AlreadyExists,
    DigestMismatch,
    HomefireError,
    InvalidArgument,
    ModelUnavailable,
    Unsupported,
)

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(tmp_path) -> Path:
    return ensure_tiny(tmp_path / "source")


@pytest.fixture
def take(source, tmp_path):
    def take(name: str = "mine", **options):
        destination = tmp_path / "models" / name
        return import_model(source, destination, origin="here", created_at=1.0, **options)

    return take


def change_config(source: Path, **changes) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(source: Path, tensors) -> None:
    (source / WEIGHTS).unlink()
    write_safetensors(source / WEIGHTS, tensors, {"format": "pt"})


def test_a_model_is_copied_with_a_manifest_of_every_digest(source, take, same):
    steps: list[tuple[str, int, int]] = []
    made = take(report=lambda *step: steps.append(step))
    assert not made.was_there
    assert same(read_model_directory(made.directory), read_model_directory(source))
    names = {path.name for path in made.directory.iterdir()}
    assert names == {path.name for path in source.iterdir()} | {"manifest.json"}
    assert verify_import(made.directory) == made.manifest
    assert made.manifest.metadata == {"origin": "here"}
    assert {what for what, _, _ in steps} == {"checking", "copying"}
    assert all(done <= total for _, done, total in steps)
    assert steps[-1][1] == steps[-1][2]


def test_the_same_model_again_is_fine_and_another_is_not(source, take):
    first = take()
    again = take()
    assert (again.was_there, again.manifest) == (True, first.manifest)
    tensors = read_model_directory(source)
    name = next(iter(tensors))
    zeros = RawTensor(tensors[name].dtype, tensors[name].shape, np.zeros_like(tensors[name].data))
    rewrite(source, {**tensors, name: zeros})
    with pytest.raises(AlreadyExists, match="another model"):
        take()
    assert verify_import(first.directory) == first.manifest


def pickled(source: Path) -> None:
    (source / WEIGHTS).rename(source / "pytorch_model.bin")


def adapter(source: Path) -> None:
    (source / "config.json").rename(source / "adapter_config.json")


def truncated(source: Path) -> None:
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[:-7])


def not_finite(source: Path) -> None:
    tensors = dict(read_model_directory(source))
    name = sorted(tensors)[1]
    bits = tensors[name].data.copy().view("<u2")
    bits[3] = 0x7FC0
    tensors[name] = RawTensor(tensors[name].dtype, tensors[name].shape, bits.view(np.uint8))
    rewrite(source, tensors)


def shard_missing(source: Path) -> None:
    (source / WEIGHTS).rename(source / "a.safetensors")
    names = read_model_directory_names(source / "a.safetensors")
    index = {"weight_map": {n: "a.safetensors" for n in names} | {"x": "b.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def read_model_directory_names(path: Path) -> list[str]:
    from homefire.checkpoints import read_safetensors

    return list(read_safetensors(path))


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (pickled, Unsupported, "pytorch_model.bin"),
        (adapter, Unsupported, "PEFT adapter"),
        (truncated, DigestMismatch, "model.safetensors"),
        (not_finite, InvalidArgument, "NaN"),
        (shard_missing, ModelUnavailable, "b.safetensors"),
        (lambda s: (s / "tokenizer.json").unlink(), InvalidArgument, "no tokenizer.json"),
        (lambda s: (s / "tokenizer.json").write_text("[]"), InvalidArgument, "no tokenizer"),
        (lambda s: (s / "config.json").write_text("{"), InvalidArgument, "damaged"),
        (lambda s: (s / "config.json").unlink(), ModelUnavailable, "config.json"),
        (lambda s: change_config(s, model_type=""), InvalidArgument, "model_type"),
        (lambda s: change_config(s, vocab_size=999), InvalidArgument, "vocab_size 999"),
        (lambda s: change_config(s, auto_map={"AutoModel": "x"}), Unsupported, "auto_map"),
        (
            lambda s: change_config(s, quantization_config={"quant_method": "gptq"}),
            Unsupported,
            "gptq",
        ),
        (lambda s: (s / WEIGHTS).unlink(), ModelUnavailable, "neither"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(source, take, tmp_path, spoil, error, said):
    spoil(source)
    with pytest.raises(error, match=said):
        take()
    left = list((tmp_path / "models").iterdir()) if (tmp_path / "models").exists() else []
    assert left == []


def test_an_import_that_was_damaged_later_is_found(take):
    directory = take().directory
    path = directory / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch, match=WEIGHTS):
        verify_import(directory)
    shutil.rmtree(directory)
    with pytest.raises(ModelUnavailable, match="was not imported"):
        verify_import(directory)


def test_a_source_that_changes_meanwhile_is_noticed(source, take):
    tensors = dict(read_model_directory(source))
    other = {name: raw_tensor(np.zeros(t.shape, np.float32)) for name, t in tensors.items()}

    def meddle(what: str, done: int, total: int) -> None:
        if what == "checking" and done == total:
            rewrite(source, other)

    with pytest.raises(HomefireError, match="changed while it was imported"):
        take(report=meddle)
