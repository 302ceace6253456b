import io

import pytest
from rich.console import Console

from homefire.foundation.clock import ManualClock
from homefire.quickstart.story import Story


@pytest.fixture
def told():
    """A story that is written to a file, what was written so far, and its clock."""
    out = io.StringIO()
    clock = ManualClock()
    return Story(Console(file=out, width=60), clock), out.getvalue, clock


def test_chapters_are_numbered_and_say_how_long_it_took_until_there(told):
    story, text, clock = told

    story.chapter("Request")
    clock.advance(12.4)
    story.chapter("Connect, and teach the format by supervised steps to the model")

    assert text().splitlines() == [
        "[1/7] Request  (0 s)",
        "[2/7] Connect, and teach the format by supervised steps to the model  (12 s)",
    ]


def test_without_a_terminal_a_long_loop_prints_a_few_lines(told):
    story, text, _ = told

    with story.loop("supervised", 100) as advance:
        for step in range(100):
            advance(f"loss {step}")

    lines = text().splitlines()
    assert 8 <= len(lines) <= 10
    assert lines[-1].strip() == "supervised 100/100  loss 99"


def test_on_a_terminal_a_loop_is_a_bar():
    out = io.StringIO()
    story = Story(Console(file=out, width=100, force_terminal=True))

    with story.loop("supervised", 2) as advance:
        advance("loss 5.0")
        advance("loss 4.0")

    assert "2/2" in out.getvalue()
    assert "loss 4.0" in out.getvalue()
