"""`homefire checkpoint import`: from a directory to a model that the catalog finds."""

from __future__ import annotations

import pytest

from homefire.checkpoints import ensure_tiny
from homefire.control.catalog import Catalog


@pytest.fixture
def source(tmp_path):
    return ensure_tiny(tmp_path / "my-model")


def test_a_directory_becomes_a_model_that_the_catalog_finds(homefire, home, source):
    outcome = homefire("checkpoint", "import", str(source), "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["model"] == "accounts/local/models/my-model"
    assert outcome.json["architecture"] == "qwen3"
    catalog = Catalog(account="local", models=home.models, roots=[], aliases={})
    found = catalog.resolve("accounts/local/models/my-model", [])
    assert found.directory == str(home.models / "my-model")
    assert homefire("checkpoint", "verify", "--model", "my-model").out.startswith("ok ")


def test_what_the_engine_refuses_is_not_imported(homefire, home, source):
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"qwen3"', '"qwen99"'))
    outcome = homefire("checkpoint", "import", str(source), "--as", "odd")
    assert outcome.status == 1
    assert "qwen99" in outcome.err
    assert not (home.models / "odd").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("./nowhere",), "is no directory"),
        (("SOURCE", "--as", "tiny"), "taken by homefire itself"),
        (("SOURCE", "--as", "a/b"), "not a valid name"),
        (("SOURCE", "--revision", "main"), "belongs to a repository"),
        (("org/never-downloaded",), "could not be downloaded"),
    ],
)
def test_wrong_usage_is_named(homefire, source, monkeypatch, words, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [str(source) if word == "SOURCE" else word for word in words]
    outcome = homefire("checkpoint", "import", "--no-engine-check", *words)
    assert outcome.status == 1
    assert said in outcome.err


def test_verify_wants_a_job_or_a_model(homefire):
    assert "not clear" in homefire("checkpoint", "verify").err


def test_a_repository_is_taken_from_the_cache_at_a_commit(
    homefire, home, source, tmp_path, monkeypatch
):
    commit = "a" * 40
    entry = tmp_path / "hub" / "models--org--small"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    (entry / "snapshots").mkdir()
    source.rename(entry / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub")
    )
    outcome = homefire("checkpoint", "import", "org/small", "--no-engine-check", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["origin"] == f"org/small@{commit}"
    assert (home.models / "small" / "manifest.json").is_file()
