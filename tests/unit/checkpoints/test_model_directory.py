from __future__ import annotations

import msgspec
import pytest

from homefire.checkpoints import read_model_directory
from homefire.checkpoints.model_directory import companion_files, copy_files, write_model
from homefire.wire.errors import DigestMismatch, ModelUnavailable


def test_small_weights_are_one_file(tmp_path, make_tensors, same):
    files = write_model(tmp_path, make_tensors())
    assert files.keys() == {"model.safetensors"}
    assert same(read_model_directory(tmp_path), make_tensors())


def test_large_weights_are_shards_with_an_index(tmp_path, make_tensors, same):
    files = write_model(tmp_path, make_tensors(), max_shard_bytes=100)
    assert set(files) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    index = msgspec.json.decode((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"]["embed.weight"] == "model-00001-of-00002.safetensors"
    assert index["metadata"]["total_size"] == sum(t.data.nbytes for t in make_tensors().values())
    assert same(read_model_directory(tmp_path), make_tensors())


def test_a_missing_shard_is_named(tmp_path, make_tensors):
    write_model(tmp_path, make_tensors(), max_shard_bytes=100)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="00002-of-00002"):
        read_model_directory(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "not a valid index"),
        (b'{"weight_map": {"w": "../../etc/passwd"}}', "outside its directory"),
        (b'{"weight_map": {"other": "model-00001-of-00002.safetensors"}}', "disagree about"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, make_tensors, index, reason):
    write_model(tmp_path, make_tensors(), max_shard_bytes=100)
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(DigestMismatch, match=reason):
        read_model_directory(tmp_path)


def test_a_directory_without_weights_says_what_it_lacks(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"neither model\.safetensors"):
        read_model_directory(tmp_path)


def test_companions_are_everything_but_weights_and_hidden_files(model_files, tmp_path):
    destination = tmp_path / "copy"
    destination.mkdir()
    (model_files / "linked.json").symlink_to(model_files / "config.json")
    copy_files(companion_files(model_files), destination)
    assert {path.name for path in destination.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "linked.json",
    }
    assert not (destination / "linked.json").is_symlink()


def test_a_directory_without_a_configuration_is_not_a_model(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        companion_files(tmp_path)
