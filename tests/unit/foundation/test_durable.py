from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from homefire.foundation import durable, failpoints


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "f"
    durable.write_file(path, b"one")
    durable.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_secret_is_readable_by_its_owner_only(tmp_path):
    durable.write_private(tmp_path / "key", b"s")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_directory_appears_under_its_name_only_when_it_is_whole(tmp_path):
    temporary = tmp_path / ".tmp-1"
    (temporary / "sub").mkdir(parents=True)
    (temporary / "sub" / "f").write_bytes(b"x")
    durable.publish_directory(temporary, tmp_path / "final")
    assert (tmp_path / "final" / "sub" / "f").read_bytes() == b"x"
    assert not temporary.exists()


@pytest.mark.parametrize("place", ["durable.before_fsync", "durable.before_rename"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, place):
    path = tmp_path / "f"
    durable.write_file(path, b"old")
    monkeypatch.setattr(failpoints, "_actions", failpoints._parse(f"{place}=enospc"))
    monkeypatch.setattr(failpoints, "_reached", failpoints.Counter())
    with pytest.raises(OSError, match="failpoint"):
        durable.write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("place", ["durable.before_fsync", "durable.before_rename"])
def test_a_kill_in_the_middle_leaves_the_old_content(tmp_path, place):
    path = tmp_path / "f"
    durable.write_file(path, b"old")
    code = (
        "import sys; from pathlib import Path; from homefire.foundation.durable import write_file;"
    )
    code += "write_file(Path(sys.argv[1]), b'new')"
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, failpoints.VARIABLE: f"{place}=kill"},
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_failpoints_are_refused_off_loopback(monkeypatch):
    monkeypatch.setattr(failpoints, "_actions", failpoints._parse("x=kill"))
    failpoints.check_allowed("127.0.0.1")
    with pytest.raises(ValueError, match="loopback only"):
        failpoints.check_allowed("0.0.0.0")


def test_a_misspelt_failpoint_action_is_refused():
    with pytest.raises(ValueError, match="unknown action 'explode'"):
        failpoints._parse("journal.before_fsync=explode")


def test_a_failpoint_fires_the_time_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(failpoints, "_actions", failpoints._parse("x=eio@3"))
    monkeypatch.setattr(failpoints, "_reached", failpoints.Counter())
    failpoints.failpoint("x")
    failpoints.failpoint("x")
    with pytest.raises(OSError, match="x"):
        failpoints.failpoint("x")
    failpoints.failpoint("x")
