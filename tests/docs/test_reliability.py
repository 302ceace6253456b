"""The tables of what was found and what is looked for: every test that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize(("module", "test"), NAMED)
def test_a_test_that_is_named_exists(module, test):
    path = ROOT / module
    assert path.is_file()
    assert not test or re.search(rf"^(async )?def {test}\(", path.read_text(), re.MULTILINE)


def test_every_bug_names_what_would_catch_it():
    rows = [line for line in PAGE.partition("## Bugs of this class")[2].splitlines() if "|" in line]
    bugs = [row for row in rows if not row.startswith(("|---", "| what happened"))]
    assert len(bugs) >= 20
    assert all("::test_" in row or row.endswith("| the same |") for row in bugs)
