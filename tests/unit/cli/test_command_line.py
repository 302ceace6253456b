"""Help, usage errors, `env`, `version`, and what an import of the command line costs."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from homefire import __version__
from homefire.cli.main import build_parser, main
from homefire.foundation.process import ProcessId

COMMANDS = {
    "up",
    "env",
    "status",
    "quickstart",
    "trainer",
    "deployment",
    "checkpoint",
    "model",
    "shape",
    "logs",
    "version",
}


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {command}" in shown for command in COMMANDS)
    assert 'eval "$(homefire env)"' in shown


def test_help_needs_nothing_but_the_standard_library():
    code = (
        "import sys; from homefire.cli.main import build_parser; build_parser().format_help();"
        "print([m for m in sys.modules if m.split('.')[0] in"
        " {'msgspec', 'httpx', 'rich', 'torch', 'transformers', 'numpy', 'starlette', 'uvicorn'}])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [[], ["nonsense"], ["trainer"], ["trainer", "frobnicate"], ["up", "--port", "many"]],
    ids=["nothing", "unknown command", "no verb", "unknown verb", "no number"],
)
def test_wrong_usage_is_status_2_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "usage: homefire" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["up", "env", "status", "logs", "version"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    assert f"usage: homefire {command}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"homefire {__version__}\n"


def test_env_prints_the_six_lines_a_shell_evaluates(homefire, home, publish):
    publish("http://127.0.0.1:8700")
    outcome = homefire("env")
    assert outcome.status == 0
    lines = [shlex.split(line) for line in outcome.out.splitlines()]
    assert [words[0] for words in lines] == ["export"] * 6
    values = dict(words[1].split("=", 1) for words in lines)
    assert values == {
        "FIREWORKS_BASE_URL": "http://127.0.0.1:8700",
        "FIREWORKS_API_KEY": home.api_key(),
        "TINKER_BASE_URL": "http://127.0.0.1:8700",
        "TINKER_API_KEY": home.api_key(),
        "OPENAI_BASE_URL": "http://127.0.0.1:8700/inference/v1",
        "OPENAI_API_KEY": home.api_key(),
    }


def test_env_quotes_what_a_shell_would_split(homefire, publish):
    publish("http://127.0.0.1:8700/$(touch x); y")
    first = homefire("env").out.splitlines()[0]
    assert shlex.split(first)[1] == "FIREWORKS_BASE_URL=http://127.0.0.1:8700/$(touch x); y"


def test_env_of_a_stopped_homefire_still_prints_but_fails(homefire, publish):
    publish("http://127.0.0.1:8700", ProcessId(2**22 + 1, 1))
    outcome = homefire("env")
    assert outcome.status == 1
    assert len(outcome.out.splitlines()) == 6
    assert "not running" in outcome.err
    assert "hint: start it with `homefire up" in outcome.err


def test_env_of_a_home_without_any_up_fails_with_the_way_out(homefire):
    outcome = homefire("env")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error: no `homefire up` has run on ")


def test_env_as_json(homefire, publish):
    publish("http://127.0.0.1:8700")
    assert homefire("env", "--json").json["OPENAI_BASE_URL"].endswith("/inference/v1")
