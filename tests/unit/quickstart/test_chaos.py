"""Chaos as it follows a job's record: what it kills, when, and what it says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from homefire.foundation.clock import SystemClock
from homefire.foundation.events import EventLog
from homefire.foundation.home import Home
from homefire.foundation.process import identify
from homefire.quickstart.chaos import Chaos, Strike, Victim, schedule
from homefire.quickstart.settings import QuickstartSettings
from homefire.quickstart.story import Story
from homefire.wire.errors import InvalidArgument


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    (home.root / "jobs" / "job-of-before").mkdir()
    return home


@pytest.fixture
def make_process():
    """A process that waits to be killed; its pid."""
    running = []

    def make() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        running.append(process)
        return process

    yield make
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture
def story():
    return Story(Console(file=StringIO(), force_terminal=False))


def test_every_process_is_killed_twice_once_with_all_the_others():
    strikes = schedule(QuickstartSettings())
    counts = {victim: sum(victim in strike.victims for strike in strikes) for victim in Victim}
    assert counts == dict.fromkeys(Victim, 2)
    assert strikes[-1].victims == tuple(Victim)
    steps = [strike.after_steps for strike in strikes]
    assert steps == sorted(steps)
    assert steps[-1] < 300 + 20 * 4, "the loop goes on after the last of them"


def test_the_engine_and_the_gateway_of_the_new_job_are_killed(home, story, make_process):
    engine, gateway = make_process(), make_process()
    strikes = [Strike(1, (Victim.ENGINE,)), Strike(2, (Victim.GATEWAY,))]
    record = {"process": {"pid": gateway.pid, "start_ticks": 0}}
    (home.run / "gateway.json").write_text(json.dumps(record))
    with Chaos(home, strikes, story) as chaos:
        events = EventLog(home.job("job-1") / "events.jsonl", SystemClock())
        events.append("engine_started", pid=engine.pid)
        events.append("optim_step", step=1)
        assert engine.wait() == -9
        assert identify(gateway.pid) is not None
        events.append("optim_step", step=2)
        assert gateway.wait() == -9
        events.close()
    assert chaos.killed == [Victim.ENGINE, Victim.GATEWAY]
    assert chaos.job == "job-1"
    said = story.console.file.getvalue()
    assert "killed engine after optimizer step 1" in said
    assert "killed gateway after optimizer step 2" in said


def test_a_strike_waits_until_all_its_victims_live(home, story, make_process):
    """The front is dead, so the engine is spared, and the run ends first: that is said."""
    engine, front = make_process(), make_process()
    front.kill()
    front.wait()
    chaos = Chaos(home, [Strike(1, (Victim.ENGINE, Victim.FRONT))], story)
    events = EventLog(home.job("job-1") / "events.jsonl", SystemClock())
    chaos._job = home.job("job-1")
    events.append("started", pid=front.pid)
    events.append("engine_started", pid=engine.pid)
    events.append("optim_step", step=1)
    events.close()
    assert chaos._steps_applied() == 1
    chaos._strike()
    assert chaos.killed == []
    assert engine.poll() is None


def test_strikes_that_were_not_made_are_named_with_the_remedy(home, story):
    strikes = [Strike(10**6, (Victim.FRONT,))]
    with pytest.raises(InvalidArgument, match=r"killed: trainer front .*more --steps"):
        _run_nothing(Chaos(home, strikes, story))


def _run_nothing(chaos: Chaos) -> None:
    with chaos:
        pass


def test_a_loop_that_failed_is_not_blamed_on_missing_kills(home, story):
    with pytest.raises(ZeroDivisionError), Chaos(home, [], story):
        raise ZeroDivisionError
