from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from homefire.checkpoints import ensure_tiny
from homefire.control.catalog import Catalog, base_model_details, read_aliases
from homefire.control.db.rows import BaseModel, ModelRow, PromotionSource
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    ModelUnavailable,
    UnknownModel,
    Unsupported,
)
from homefire.wire.resources import ModelKind, ModelState

MakeCatalog = Callable[..., Catalog]


@pytest.fixture
def make_catalog(tmp_path: Path) -> MakeCatalog:
    def make(*roots: Path, **aliases: str) -> Catalog:
        named = {key.replace("__", "/"): value for key, value in aliases.items()}
        return Catalog(
            account="local", models=tmp_path / "models", roots=list(roots), aliases=named
        )

    return make


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A model directory that is below no model root."""
    return ensure_tiny(tmp_path / "elsewhere" / "mine")


def promoted(kind: ModelKind, state: ModelState) -> ModelRow:
    base = BaseModel(name="tiny", directory="/d", tokenizer_id="/d", max_context_length=8)
    return ModelRow(
        account="local",
        id="best",
        state=state,
        kind=kind,
        source=PromotionSource(job="j1", checkpoint="step_1", base_model=base),
        operation="op",
        worker=None,
        digest="",
        created_at=0.0,
    )


@pytest.mark.parametrize("name", ["tiny", "accounts/local/models/tiny", "accounts/x/models/tiny"])
def test_tiny_is_made_on_first_use_under_any_accounts_name(
    make_catalog: MakeCatalog, tmp_path: Path, name: str
) -> None:
    found = make_catalog().resolve(name, [])
    assert found.name == name
    assert Path(found.directory) == tmp_path / "models" / "tiny"
    assert found.tokenizer_id == found.directory
    assert found.max_context_length == 2048


def test_an_alias_may_lead_to_an_alias_and_to_a_directory_anywhere(
    make_catalog: MakeCatalog, outside: Path
) -> None:
    catalog = make_catalog(
        accounts__fireworks__models__qwen="accounts/x/models/y", accounts__x__models__y=str(outside)
    )
    assert catalog.resolve("accounts/fireworks/models/qwen", []).directory == str(outside)


def test_aliases_in_a_circle_are_refused(make_catalog: MakeCatalog) -> None:
    with pytest.raises(InvalidArgument, match="circle"):
        make_catalog(a="b", b="a").resolve("a", [])


def test_a_directory_below_a_model_root_may_be_named_and_any_other_not(
    make_catalog: MakeCatalog, outside: Path
) -> None:
    with pytest.raises(UnknownModel, match="not below a model root"):
        make_catalog().resolve(str(outside), [])
    inside = make_catalog(outside.parent)
    assert inside.resolve(str(outside), []).directory == str(outside)
    assert inside.resolve("accounts/local/models/mine", []).directory == str(outside)


def test_a_path_that_leaves_a_model_root_by_dots_or_a_link_is_refused(
    make_catalog: MakeCatalog, outside: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "link").symlink_to(outside)
    for path in (models / ".." / "elsewhere" / "mine", models / "link"):
        with pytest.raises(UnknownModel, match="not below a model root"):
            make_catalog().resolve(str(path), [])


def test_an_unknown_model_is_told_what_is_available_and_how_to_add_it(
    make_catalog: MakeCatalog,
) -> None:
    with pytest.raises(UnknownModel) as raised:
        make_catalog(accounts__x__models__a="tiny").resolve("accounts/fireworks/models/qwen", [])
    assert "accounts/local/models/tiny" in raised.value.message
    assert "accounts/x/models/a" in raised.value.message
    assert "--alias accounts/fireworks/models/qwen=" in raised.value.hint


def test_a_repository_that_is_not_in_the_cache_is_told_how_to_supply_it(
    make_catalog: MakeCatalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelUnavailable, match="hf download nobody/nothing"):
        make_catalog().resolve("nobody/nothing", [])


def test_a_cached_repository_gives_its_own_name_as_the_tokenizer(
    make_catalog: MakeCatalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    hub = tmp_path / "hub"
    repository = hub / "models--Qwen--Qwen3-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    snapshot = ensure_tiny(repository / "snapshots" / "c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    found = make_catalog().resolve("Qwen/Qwen3-8B", [])
    assert found.tokenizer_id == "Qwen/Qwen3-8B"
    assert found.directory == str(snapshot)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 513, "line\nbreak"])
def test_what_cannot_be_a_name_is_refused_before_any_path_is_looked_at(
    make_catalog: MakeCatalog, name: str
) -> None:
    with pytest.raises(InvalidArgument, match="not a name"):
        make_catalog().resolve(name, [])


@pytest.mark.parametrize(
    "name", ["..", "../..", "accounts/local/models/..", "~", "$HOME", "a" * 300]
)
def test_odd_names_are_unknown_models(make_catalog: MakeCatalog, name: str) -> None:
    with pytest.raises((UnknownModel, ModelUnavailable)):
        make_catalog().resolve(name, [])


def test_a_promoted_model_resolves_when_its_files_are_there(
    make_catalog: MakeCatalog, tmp_path: Path
) -> None:
    directory = ensure_tiny(tmp_path / "models" / "local" / "best")
    name = "accounts/local/models/best"
    ready = promoted(ModelKind.HF_BASE_MODEL, ModelState.READY)
    assert make_catalog().resolve(name, [ready]).directory == str(directory)
    with pytest.raises(FailedPrecondition, match="still being written"):
        make_catalog().resolve(name, [promoted(ModelKind.HF_BASE_MODEL, ModelState.UPLOADING)])
    with pytest.raises(Unsupported, match="is an adapter"):
        make_catalog().resolve(name, [promoted(ModelKind.HF_PEFT_ADDON, ModelState.READY)])


def test_aliases_are_read_from_the_homes_file(tmp_path: Path) -> None:
    assert read_aliases(tmp_path) == {}
    (tmp_path / "aliases.toml").write_text('"accounts/fireworks/models/qwen3-8b" = "tiny"\n')
    assert read_aliases(tmp_path) == {"accounts/fireworks/models/qwen3-8b": "tiny"}
    (tmp_path / "aliases.toml").write_text("a = [1]\n")
    with pytest.raises(InvalidArgument, match=r"aliases\.toml"):
        read_aliases(tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"num_experts": 128}, True),
        ({"num_local_experts": 8}, True),
        ({"text_config": {"n_routed_experts": 64}}, True),
    ],
)
def test_experts_in_the_configuration_make_a_model_moe(
    tmp_path: Path, fields: dict[str, object], expected: bool
) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode({"model_type": "x", **fields}))
    assert base_model_details(tmp_path).moe is expected


def test_a_directory_below_two_roots_is_listed_once(
    make_catalog: MakeCatalog, tmp_path: Path
) -> None:
    """`homefire up` gives the home's own models as a root, too."""
    ensure_tiny(tmp_path / "models" / "mine")
    names = [entry.name for entry in make_catalog(tmp_path / "models").entries([])]
    assert names == ["accounts/local/models/tiny", "accounts/local/models/mine"]
