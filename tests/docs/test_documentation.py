"""What the documentation claims: every code, state and command is in it, every local link resolves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from homefire.wire.errors import ERRORS_BY_CODE
from homefire.wire.internal import HotLoadStage, TrainerState
from homefire.wire.resources import DeploymentState, JobState

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
