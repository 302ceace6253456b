from __future__ import annotations

import pytest

from homefire.foundation import memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose /proc/meminfo and cgroup say what the test wrote."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_what_is_available_is_read_from_the_kernel(machine):
    (machine / "meminfo").write_text("MemTotal: 2048 kB\nMemAvailable: 1024 kB\n")
    assert memory.available_bytes() == 1 << 20


def test_nothing_is_known_where_nothing_says_so(machine):
    assert memory.available_bytes() is None


def test_a_container_sees_its_own_limit(machine):
    (machine / "meminfo").write_text("MemAvailable: 1024 kB\n")
    (machine / "memory.max").write_text("500000\n")
    (machine / "memory.current").write_text("450000\n")
    (machine / "memory.stat").write_text("anon 1\ninactive_file 30000\n")
    assert memory.total_bytes() == 500_000
    assert memory.available_bytes() == 80_000


def test_a_container_without_a_limit_is_the_machine(machine):
    (machine / "meminfo").write_text("MemAvailable: 1024 kB\n")
    (machine / "memory.max").write_text("max\n")
    (machine / "memory.current").write_text("450000\n")
    assert memory.total_bytes() > 1 << 20
    assert memory.available_bytes() == 1 << 20
