from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from homefire.foundation.clock import ManualClock
from homefire.foundation.process import ProcessId, identify
from homefire.launch import ProcessSpec
from homefire.launch.local import LocalLauncher
from homefire.wire.errors import StorageFailed

PROGRAMS = {
    "ends": "import sys; print('read', open(sys.argv[-1]).read()); sys.exit(3)",
    "stays": "import os, signal; print(os.environ['OMP_NUM_THREADS'], flush=True); signal.pause()",
    "deaf": (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('deaf', flush=True); [signal.pause() for _ in iter(int, 1)]"
    ),
}
MakeSpec = Callable[..., ProcessSpec]


@pytest.fixture
def make_spec(tmp_path: Path) -> MakeSpec:
    def make(program: str, **changes: object) -> ProcessSpec:
        spec = ProcessSpec(
            name=program,
            module=f"program_{program}",
            spec_file=str(tmp_path / program / "spec.json"),
            spec=b'{"secret": "s"}',
            log_file=str(tmp_path / program / "log"),
            threads=1,
            nonce="n",
        )
        return msgspec.structs.replace(spec, **changes)

    return make


@pytest.fixture
def launcher(tmp_path: Path) -> LocalLauncher:
    for name, text in PROGRAMS.items():
        (tmp_path / f"program_{name}.py").write_text(text)
    return make_launcher(tmp_path)


def make_launcher(programs: Path) -> LocalLauncher:
    environment = {**os.environ, "PYTHONPATH": str(programs)}
    return LocalLauncher(clock=ManualClock(), environment=environment)


async def test_a_process_gets_its_spec_file_writes_its_log_and_its_exit_is_seen(
    launcher: LocalLauncher, make_spec: MakeSpec
) -> None:
    record = await launcher.start(make_spec("ends"))
    exit_ = await launcher.wait(record)
    assert exit_.code == 3
    assert str(exit_) == "exited with 3"
    assert launcher.poll(record) == exit_
    assert await launcher.logs(record, lines=5) == ['read {"secret": "s"}']
    assert stat.S_IMODE(Path(record.spec_file).stat().st_mode) == 0o600


async def test_a_process_runs_in_a_session_of_its_own_until_it_is_stopped(
    launcher: LocalLauncher, make_spec: MakeSpec
) -> None:
    record = await launcher.start(make_spec("stays"))
    assert record.process is not None
    assert launcher.poll(record) is None
    assert os.getsid(record.process.pid) == record.process.pid
    exit_ = await launcher.stop(record, grace_s=30.0)
    assert str(exit_) == "was killed by signal 15"
    assert await launcher.stop(record, grace_s=30.0) == exit_
    assert identify(record.process.pid) is None


async def test_a_process_that_ignores_sigterm_is_killed(
    launcher: LocalLauncher, make_spec: MakeSpec
) -> None:
    record = await launcher.start(make_spec("deaf"))
    while not await launcher.logs(record, lines=1):
        assert launcher.poll(record) is None
    assert str(await launcher.stop(record, grace_s=0.0)) == "was killed by signal 9"


async def test_another_launcher_finds_watches_and_stops_what_the_first_one_started(
    launcher: LocalLauncher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec("stays")
    record = await launcher.start(spec)
    second = make_launcher(tmp_path)
    assert second.poll(record) is None
    assert await second.find(record) == record
    intended = spec.record(process=None, boot="", started_at=0.0)
    found = await second.find(intended)
    assert found is not None
    assert found.process == record.process
    await second.stop(record, grace_s=30.0)
    assert (await launcher.wait(record)).code == -15
    assert await second.find(record) is None
    assert await second.find(intended) is None


async def test_a_reused_pid_is_another_process_and_is_never_signalled(
    launcher: LocalLauncher, make_spec: MakeSpec
) -> None:
    record = await launcher.start(make_spec("stays"))
    assert record.process is not None
    reused = ProcessId(record.process.pid, record.process.start_ticks + 1)
    other_boot = msgspec.structs.replace(record, boot="another boot")
    for stale in (msgspec.structs.replace(record, process=reused), other_boot):
        assert await launcher.find(stale) is None
        assert (await launcher.stop(stale, grace_s=0.0)).code is None
    assert launcher.poll(record) is None
    await launcher.stop(record, grace_s=30.0)


async def test_a_spec_that_cannot_be_written_starts_nothing(
    launcher: LocalLauncher, make_spec: MakeSpec, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    spec = make_spec("stays", spec_file=str(tmp_path / "file" / "spec.json"))
    with pytest.raises(StorageFailed, match="stays cannot be started"):
        await launcher.start(spec)


async def test_only_the_end_of_a_long_log_is_read(
    launcher: LocalLauncher, make_spec: MakeSpec
) -> None:
    spec = make_spec("ends")
    Path(spec.log_file).parent.mkdir()
    Path(spec.log_file).write_text("\n".join(str(n) for n in range(200_000)) + "\n")
    record = await launcher.start(spec)
    await launcher.wait(record)
    assert await launcher.logs(record, lines=2) == ["199999", 'read {"secret": "s"}']
    assert await launcher.logs(record, lines=0) == []
