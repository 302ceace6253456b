"""What the documentation claims: every code, state and command is in it, every local link resolves."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from homefire.cli.main import build_parser
from homefire.control.app import ENDPOINTS
from homefire.inference.replica.app import replica_app
from homefire.trainer.front.api import TrainerApi
from homefire.wire.errors import ERRORS_BY_CODE
from homefire.wire.internal import HotLoadStage, TrainerState
from homefire.wire.records import EdgeKind, NodeKind
from homefire.wire.resources import DeploymentState, JobState
from homefire.wire.specs import Upstream

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("code", sorted(ERRORS_BY_CODE))
def test_every_error_code_is_documented_with_its_status_and_category(code):
    cls = ERRORS_BY_CODE[code]
    row = f"| `{code}` | {cls.http_status} | {cls.category.value} |"
    assert row in text("docs/errors.md")


@pytest.mark.parametrize("state", [*JobState, *DeploymentState, *HotLoadStage, *TrainerState])
def test_every_state_is_documented(state):
    assert f"`{state.value}`" in text("docs/lifecycle.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_local_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", text("README.md")))
    assert named
    assert named <= targets


def test_every_python_block_of_the_readme_compiles():
    blocks = re.findall(r"```python\n(.*?)```", text("README.md"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_names_that_the_readme_imports_exist():
    import homefire.sdk as sdk

    imported = re.search(r"from homefire\.sdk import \((.*?)\)", text("README.md"), re.DOTALL)
    assert imported
    names = [name.strip() for name in imported.group(1).split(",") if name.strip()]
    assert [name for name in names if name not in sdk.__all__] == []


def front_routes() -> list[str]:
    """The trainer's routes as Starlette knows them; the handlers are never called."""
    spec = SimpleNamespace(account="local")
    front = SimpleNamespace(spec=spec, admission=None)
    return spelled(TrainerApi(cast(Any, front)).routes())


def replica_routes(tmp_path: Path) -> list[str]:
    listen = Upstream(socket=str(tmp_path / "socket"), secret="secret")
    replica = SimpleNamespace(spec=SimpleNamespace(listen=listen))
    shell = cast(Any, replica_app(cast(Any, replica)))
    return spelled(shell._app.routes)


def spelled(routes: Iterable[Any]) -> list[str]:
    return [
        f"{method} {route.path}" for route in routes for method in sorted(route.methods - {"HEAD"})
    ]


def test_every_route_is_documented(tmp_path):
    page = text("docs/api.md")
    control = [f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS]
    routes = [*control, *front_routes(), *replica_routes(tmp_path)]
    assert len(routes) > 60
    assert [route for route in routes if f"`{route}`" not in page] == []


def test_no_route_is_documented_that_does_not_exist(tmp_path):
    routes = {f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS}
    routes |= {*front_routes(), *replica_routes(tmp_path), "GET /healthz"}
    documented = set(
        re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) /[^`]+)`", text("docs/api.md"), re.M)
    )
    assert documented - routes == set()


def commands() -> list[str]:
    """Every command of the command line."""
    parser = build_parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(subparsers.choices)


def test_every_command_is_documented_in_the_readme():
    rows = [
        row.replace("\\|", " ") for row in text("README.md").splitlines() if "`homefire " in row
    ]
    named = {word for row in rows for word in re.findall(r"[a-z]+", row)}
    assert len(commands()) >= 10
    assert [command for command in commands() if command not in named] == []


@pytest.mark.parametrize("kind", [*NodeKind, *EdgeKind])
def test_every_part_of_a_lineage_is_documented(kind):
    assert f"`{kind.value}`" in text("docs/records.md")
