import pytest

from homefire.foundation.home import Home
from homefire.quickstart import main as quickstart
from homefire.quickstart.main import main
from homefire.quickstart.server import Address
from homefire.quickstart.settings import QuickstartSettings


@pytest.fixture
def lifecycle(monkeypatch, tmp_path, results):
    """Replaces the lifecycle by one that remembers address and settings; runs in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FIREWORKS_BASE_URL", raising=False)
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    monkeypatch.setenv("HOMEFIRE_HOME", str(tmp_path / "none"))
    seen = {}

    def stand_in(address, settings, folder, story):
        seen.update(address=address, settings=settings, folder=folder)
        if "raises" in seen:
            raise seen["raises"]
        return results()

    monkeypatch.setattr(quickstart, "_lifecycle_at", stand_in)
    return seen


def test_a_named_server_is_used_with_the_key_of_the_environment(lifecycle, monkeypatch, capsys):
    monkeypatch.setenv("FIREWORKS_BASE_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("FIREWORKS_API_KEY", "tml-secret")

    assert main(["--seed", "5"]) == 0

    assert lifecycle["address"] == Address("http://127.0.0.1:9", "tml-secret")
    assert lifecycle["settings"] == QuickstartSettings(seed=5)
    out = capsys.readouterr().out
    assert "seed 5" in out
    assert out.splitlines()[-1] == "held-out reward 0.412 -> 0.850 over 2 prompts"


def test_the_key_comes_from_the_home_when_the_environment_has_none(lifecycle, tmp_path):
    home = Home(tmp_path / "mine")
    home.prepare()

    assert main(["--base-url", "http://127.0.0.1:9", "--home", str(home.root)]) == 0

    assert lifecycle["address"].api_key == home.api_key()


def test_a_named_server_without_a_key_is_an_error_that_says_where_keys_come_from(lifecycle, capsys):
    assert main(["--base-url", "http://127.0.0.1:9"]) == 1

    assert "homefire env" in capsys.readouterr().err


def test_numbers_of_the_command_line_replace_those_of_the_model(lifecycle, monkeypatch):
    monkeypatch.setenv("FIREWORKS_API_KEY", "tml-secret")
    words = "--base-url http://127.0.0.1:9 --steps 4 --supervised-steps 9 --shuffle-rewards"

    assert main(words.split()) == 0

    assert lifecycle["settings"] == QuickstartSettings(
        rl_steps=4, supervised_steps=9, shuffle_rewards=True
    )


def test_a_number_that_makes_no_sense_is_refused_before_anything_starts(lifecycle, capsys):
    assert main(["--steps", "1"]) == 1

    assert "rl_steps is 1" in capsys.readouterr().err
    assert "address" not in lifecycle


def test_the_prompt_set_is_left_in_the_output_folder(lifecycle, monkeypatch, tmp_path):
    monkeypatch.setenv("FIREWORKS_API_KEY", "tml-secret")

    main(["--base-url", "http://127.0.0.1:9", "--out", "there"])

    assert b'"prompts"' in (tmp_path / "there" / "held_out.json").read_bytes()


def test_ctrl_c_ends_with_the_status_of_an_interrupt(lifecycle, monkeypatch, capsys):
    monkeypatch.setenv("FIREWORKS_API_KEY", "tml-secret")
    lifecycle["raises"] = KeyboardInterrupt()

    assert main(["--base-url", "http://127.0.0.1:9"]) == 130

    assert "interrupted" in capsys.readouterr().err


def test_chaos_only_kills_a_homefire_of_its_own(lifecycle, monkeypatch, capsys):
    monkeypatch.setenv("FIREWORKS_API_KEY", "tml-secret")

    assert main(["--chaos", "--base-url", "http://127.0.0.1:9"]) == 1

    assert "leave out --base-url" in capsys.readouterr().err
    assert lifecycle == {}
