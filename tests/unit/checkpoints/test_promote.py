from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from homefire.checkpoints import (
    CheckpointKind,
    PromoteResult,
    PromoteSpec,
    promote,
    read_model_directory,
    read_safetensors,
)
from homefire.checkpoints.promote import run_worker
from homefire.wire.errors import AlreadyExists


@pytest.fixture
def make_spec(store, model_files, tmp_path):
    def make(identity: str, **fields) -> PromoteSpec:
        defaults = {
            "store_root": str(store.root),
            "account": "local",
            "job": "job-1",
            "slot": "policy",
            "identity": identity,
            "base_model_dir": str(model_files),
            "destination": str(tmp_path / "models" / "promoted"),
            "result_file": str(tmp_path / "result.json"),
        }
        return PromoteSpec(**{**defaults, **fields})

    return make


@pytest.fixture
def write_spec(tmp_path):
    def write(spec: PromoteSpec) -> Path:
        path = tmp_path / "spec.json"
        path.write_bytes(msgspec.json.encode(spec))
        return path

    return write


def result_of(spec: PromoteSpec) -> PromoteResult:
    return msgspec.json.decode(Path(spec.result_file).read_bytes(), type=PromoteResult)


def test_a_delta_becomes_a_plain_model_directory(
    trainer, make_spec, make_tensors, nudge, same, tmp_path
):
    trainer.base("s0", make_tensors())
    manifest = trainer.delta("s1", nudge(make_tensors()), "s0")
    result = promote(make_spec("s1"))
    destination = tmp_path / "models" / "promoted"
    assert same(read_model_directory(destination), trainer.published["s1"])
    assert {path.name for path in destination.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert (result.kind, result.digest) == (CheckpointKind.DELTA, manifest.digest)
    assert result.size_bytes == sum(path.stat().st_size for path in destination.iterdir())


def test_an_adapter_becomes_a_peft_directory(trainer, make_spec, make_tensors, same, tmp_path):
    trainer.lora("a", make_tensors())
    assert promote(make_spec("a")).kind is CheckpointKind.LORA
    destination = tmp_path / "models" / "promoted"
    assert same(read_safetensors(destination / "adapter_model.safetensors"), make_tensors())
    assert msgspec.json.decode((destination / "adapter_config.json").read_bytes())["r"] == 8


def test_promoting_the_same_weights_again_succeeds(trainer, make_spec, make_tensors):
    trainer.base("s0", make_tensors())
    assert promote(make_spec("s0")) == promote(make_spec("s0"))


def test_a_destination_with_other_content_is_kept(
    trainer, make_spec, make_tensors, nudge, tmp_path
):
    trainer.base("s0", make_tensors())
    trainer.delta("s1", nudge(make_tensors()), "s0")
    promote(make_spec("s0"))
    with pytest.raises(AlreadyExists, match="does not hold snapshot 's1'"):
        promote(make_spec("s1"))
    (tmp_path / "users").mkdir()
    with pytest.raises(AlreadyExists):
        promote(make_spec("s1", destination=str(tmp_path / "users")))


def test_the_worker_leaves_its_result_and_exits_0(trainer, make_spec, write_spec, make_tensors):
    manifest = trainer.base("s0", make_tensors())
    spec = make_spec("s0")
    command = [sys.executable, "-m", "homefire.checkpoints", "promote", str(write_spec(spec))]
    assert subprocess.run(command, check=False).returncode == 0
    result = result_of(spec)
    assert (result.ok, result.digest, result.error) == (True, manifest.digest, None)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"identity": "unknown"}, "unknown_snapshot"),
        ({"identity": "s1", "base_model_dir": "/nonexistent"}, "model_unavailable"),
        ({"destination": "/proc/nowhere/model"}, "storage_failed"),
        ({"destination": "bad\0name"}, "internal"),
    ],
)
def test_a_failed_promotion_leaves_its_error_and_exits_1(
    trainer, make_spec, write_spec, make_tensors, nudge, tmp_path, fields, code
):
    """A base brings its own configuration along; a delta needs the base model's."""
    trainer.base("s0", make_tensors())
    trainer.delta("s1", nudge(make_tensors()), "s0")
    spec = make_spec(**{"identity": "s0", **fields})
    assert run_worker(write_spec(spec)) == 1
    result = result_of(spec)
    assert not result.ok
    assert result.error is not None
    assert result.error.code == code
    assert not (tmp_path / "models" / "promoted").exists()
