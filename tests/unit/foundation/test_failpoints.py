from __future__ import annotations

from pathlib import Path

import pytest

from homefire.foundation import failpoints


@pytest.fixture
def armed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that arms failpoints in this process."""
    path = tmp_path / "armed"
    monkeypatch.setattr(failpoints, "_armed", failpoints._armed_by(str(path)))
    return path


def test_one_that_is_armed_by_a_file_goes_off_once_at_its_count(armed: Path) -> None:
    failpoints.failpoint("a")
    armed.write_text("a=eio@2")
    failpoints.failpoint("a")
    failpoints.failpoint("b")
    with pytest.raises(OSError, match="failpoint a"):
        failpoints.failpoint("a")
    assert not armed.exists()
    failpoints.failpoint("a")


def test_it_counts_from_when_its_file_came(armed: Path) -> None:
    armed.write_text("a=eio@2")
    failpoints.failpoint("a")
    armed.unlink()
    armed.with_name("next").write_text("a=eio@2")
    failpoints.failpoint("a")
    armed.with_name("next").rename(armed)
    failpoints.failpoint("a")
    assert armed.exists()
    with pytest.raises(OSError, match="failpoint a"):
        failpoints.failpoint("a")


def test_what_may_be_armed_listens_on_loopback_only(armed: Path) -> None:
    failpoints.check_allowed("127.0.0.1")
    with pytest.raises(ValueError, match="loopback only"):
        failpoints.check_allowed("0.0.0.0")
