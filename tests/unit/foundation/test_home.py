from __future__ import annotations

import os
import subprocess
import sys

import pytest

from homefire.foundation.home import Home, HomeLock, read_up_record
from homefire.wire.errors import HomeBusy, HomeTooNew


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


def test_first_use_makes_a_private_key_that_tinker_accepts(home):
    assert home.api_key().startswith("tml-")
    assert home.api_key_file.stat().st_mode & 0o777 == 0o600


def test_preparing_again_keeps_the_key(home):
    key = home.api_key()
    home.prepare()
    assert home.api_key() == key


def test_a_home_from_a_newer_version_is_refused_by_name(home):
    (home.root / "VERSION").write_text("99\n")
    with pytest.raises(HomeTooNew, match="format 99"):
        home.prepare()


def test_a_second_holder_is_told_who_holds_the_home(home):
    with HomeLock(home) as lock:
        lock.publish("http://127.0.0.1:8700")
        code = (
            "import sys; from pathlib import Path; from homefire.foundation.home import *\n"
            "with HomeLock(Home(Path(sys.argv[1]))): pass"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(home.root)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode != 0
    assert f"process {os.getpid()} at http://127.0.0.1:8700" in run.stderr


def test_the_lock_is_free_again_after_its_holder(home):
    with HomeLock(home):
        pass
    with HomeLock(home), pytest.raises(HomeBusy), HomeLock(home):
        pass


def test_the_up_record_says_where_homefire_listens(home):
    assert read_up_record(home) is None
    with HomeLock(home) as lock:
        lock.publish("http://x:1")
    record = read_up_record(home)
    assert record is not None
    assert record.url == "http://x:1"


def test_a_socket_below_a_deep_home_still_fits_the_kernels_limit(tmp_path):
    deep = Home(tmp_path / ("d" * 60) / ("e" * 60))
    deep.run.mkdir(parents=True)
    path = deep.socket("trainer-job-1")
    assert len(path) < 104
    assert os.stat(os.path.dirname(path)).st_mode & 0o077 == 0
    assert path != deep.socket("trainer-job-2")
