import io
import sys

import pytest
from rich.console import Console

from homefire.quickstart.report import PLOT_FILE, report


@pytest.fixture
def printed(tmp_path):
    def run(results):
        out = io.StringIO()
        report(results, tmp_path, Console(file=out, width=80))
        return out.getvalue()

    return run


def test_the_last_line_is_the_headline(printed, results):
    made = results()

    assert printed(made).rstrip("\n").splitlines()[-1] == made.headline


def test_the_headline_is_one_line_on_a_narrow_terminal(tmp_path, results):
    out = io.StringIO()

    report(results(), tmp_path, Console(file=out, width=20))

    assert out.getvalue().rstrip("\n").splitlines()[-1] == results().headline


def test_the_table_has_a_row_for_everything_that_was_served(printed, results):
    lines = printed(results()).splitlines()

    rows = [" ".join(line.split()) for line in lines if "9f86d081" in line]
    assert rows == [
        "0 step_00300 base 1700000 0.400 0.412 step_00300-4b50536f 9f86d081",
        "1 step_00304 delta 141220 0.500 step_00304-4b50536f 9f86d081",
        "2 step_00308 delta 141220 0.600 step_00308-4b50536f 9f86d081",
        "3 step_00312 delta 141220 0.700 step_00312-4b50536f 9f86d081",
        "step_00316 delta 141220 0.850 step_00316-aaaa0000 9f86d081",
    ]
    assert max(map(len, lines[:7])) <= 80


def test_the_plot_is_an_image(printed, results, tmp_path):
    pytest.importorskip("matplotlib")

    printed(results())

    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_report_says_how_to_get_a_plot(
    printed, results, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    text = printed(results())

    assert "pip install 'homefire[plot]'" in text
    assert not (tmp_path / PLOT_FILE).exists()
