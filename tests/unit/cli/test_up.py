"""`homefire up` as processes: what it says, what it refuses, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import msgspec
import pytest

from homefire.cli.leftovers import end, find_leftovers
from homefire.cli.main import main
from homefire.foundation.home import Home, read_up_record
from homefire.foundation.process import identify, is_alive
from homefire.wire.specs import ControlSpec, GatewaySpec, Upstream, read_spec


@pytest.fixture(scope="module")
def server(homefire_up):
    return homefire_up(
        engine="fake",
        arguments=[
            *("--alias", "accounts/a/models/m=tiny"),
            *("--pool-idle", "90", "--held-graphs", "0.5", "--keep-journals"),
        ],
    )


def ask(server, path: str) -> dict:
    request = urllib.request.Request(server.url + path, headers={"X-API-Key": server.api_key})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def pid_of(server, service: str) -> int:
    return json.loads((server.home / "run" / f"{service}.json").read_text())["process"]["pid"]


def try_up(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "homefire.cli.main", "up", "--home", str(home), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_when_it_says_ready_all_planes_answer(server):
    assert ask(server, "/v1/accounts?pageSize=2")["accounts"][0]["name"] == "accounts/local"
    assert ask(server, "/inference/v1/models")
    assert ask(server, "/healthz") == {"status": "ok"}


def test_the_record_says_who_runs_and_where(server):
    record = read_up_record(Home(server.home))
    assert record is not None
    assert (record.process.pid, record.url) == (server.process.pid, server.url)


def test_options_reach_the_services(server):
    control = read_spec(server.home / "run" / "control.spec.json", ControlSpec)
    assert control.aliases == {"accounts/a/models/m": "tiny"}
    assert control.public_url == server.url
    assert control.model_roots == [str(server.home / "models")]
    assert control.pool_idle_s == 90.0
    assert control.keep_journals is True
    assert control.held_graph_bytes == 1 << 29


def test_secrets_are_in_private_files_and_on_no_command_line(server):
    secrets = set()
    for name, kind in (("control", ControlSpec), ("gateway", GatewaySpec)):
        file = server.home / "run" / f"{name}.spec.json"
        assert file.stat().st_mode & 0o077 == 0
        secrets.add(read_spec(file, kind).listen.secret)
    secrets.add(server.api_key)
    for pid in server.processes():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        assert not [secret for secret in secrets if secret in command]


def test_a_second_up_names_the_process_that_holds_the_home(server):
    run = try_up(server.home, "--port", "0")
    assert run.returncode == 1
    assert f"is held by process {server.process.pid} at {server.url}" in run.stderr
    assert "hint: stop that process, or choose another home with --home" in run.stderr
    assert ask(server, "/healthz") == {"status": "ok"}


def test_the_commands_find_it(server, capsys):
    def homefire(*words: str) -> str:
        assert main([*words, "--home", str(server.home)]) == 0
        return capsys.readouterr().out

    assert f"FIREWORKS_BASE_URL={server.url}" in server.cli("env").stdout
    status = json.loads(homefire("status", "--json"))
    assert (status["jobs"], status["url"]) == ([], server.url)
    assert "tiny-full" in homefire("shape", "list")
    assert "models/tiny" in homefire("model", "list")
    assert homefire("trainer", "list") == "trainer jobs: none\n"
    assert main(["deployment", "get", "nope", "--home", str(server.home)]) == 1
    assert capsys.readouterr().err.startswith("error: deployment 'nope' does not exist")


@pytest.mark.parametrize("service", ["gateway", "control"])
def test_a_service_that_is_killed_is_started_again_on_the_same_port(server, service):
    before = pid_of(server, service)
    other = pid_of(server, "control" if service == "gateway" else "gateway")
    os.kill(before, signal.SIGKILL)
    # The request waits, in the listening socket or in the gateway, for the new process.
    assert ask(server, "/v1/accounts?pageSize=2")["accounts"]
    assert pid_of(server, service) != before
    assert pid_of(server, "control" if service == "gateway" else "gateway") == other


def test_an_up_that_was_killed_is_taken_over(server):
    stale = [pid_of(server, name) for name in ("gateway", "control")]
    server.stop(signal.SIGKILL)
    assert all(identify(pid) for pid in stale)
    server.start()
    assert "taking over" in server.messages()
    assert not any(identify(pid) for pid in stale)
    assert ask(server, "/v1/accounts?pageSize=2")["accounts"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything_and_the_home_starts_again(server, number):
    assert server.stop(number) == 0
    assert server.processes() == []
    assert f"{number.name}: saving the state of running jobs" in server.messages()
    assert "homefire has stopped\n" in server.messages()
    server.start()


def test_a_second_signal_hurries(server):
    control = pid_of(server, "control")
    os.kill(control, signal.SIGSTOP)  # a control that would take for ever to stop
    server.process.send_signal(signal.SIGTERM)
    while "again to hurry" not in server.messages():
        assert server.process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        server.process.wait(0.6)  # signals closer together than half a second count as one
    assert server.stop(signal.SIGTERM) == 1
    assert server.processes() == []
    assert "not waiting for control any longer" in server.messages()


def test_a_port_in_use_is_refused_naming_port_and_option(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = try_up(tmp_path / "home", "--port", str(port))
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: port {port} of 127.0.0.1 is in use")
    assert "--port" in run.stderr


def test_a_home_of_a_newer_version_is_refused(tmp_path):
    (tmp_path / "VERSION").write_text("99\n")
    run = try_up(tmp_path, "--port", "0")
    assert run.returncode == 1
    assert "has format 99" in run.stderr
    assert "hint: upgrade homefire" in run.stderr


def test_off_loopback_in_clear_text_is_refused(tmp_path):
    run = try_up(tmp_path / "home", "--host", "0.0.0.0", "--port", "0")
    assert run.returncode == 1
    assert "--insecure-http" in run.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf"])
def test_an_idle_time_that_cannot_be_is_refused(tmp_path, seconds):
    run = try_up(tmp_path / "home", "--port", "0", f"--pool-idle={seconds}")
    assert run.returncode == 1
    assert "--pool-idle" in run.stderr
    assert "use 0 to park nothing" in run.stderr


@pytest.mark.parametrize("gib", ["-1", "nan", "inf"])
def test_memory_that_cannot_be_is_refused(tmp_path, gib):
    run = try_up(tmp_path / "home", "--port", "0", f"--held-graphs={gib}")
    assert run.returncode == 1
    assert "--held-graphs" in run.stderr
    assert "use 0 to keep none" in run.stderr


def test_a_service_that_cannot_start_is_shown_with_the_end_of_its_log(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    home.database.write_bytes(b"this is no database, and long enough to be seen as one" * 100)
    run = try_up(home.root, "--port", "0", "--engine", "fake")
    assert run.returncode == 1
    assert "error: control ended with status" in run.stderr
    assert "the end of its log:" in run.stderr
    assert "not a database" in run.stderr
    assert find_leftovers(home) == []


def test_leftovers_of_this_home_only_are_found_and_ended(tmp_path):
    home, other = Home(tmp_path / "home"), Home(tmp_path / "home-too")
    for each in (home, other):
        each.prepare()
    nowhere = Upstream(str(home.run / "nowhere.sock"), "secret")
    spec = GatewaySpec(
        home=str(home.root), nonce="n", host="127.0.0.1", port=0, listen=nowhere, control=nowhere
    )
    file = home.run / "gateway.spec.json"
    file.write_bytes(msgspec.json.encode(spec))
    left = subprocess.Popen(
        [sys.executable, "-m", "homefire.gateway", str(file)], stderr=subprocess.DEVNULL
    )
    process = identify(left.pid)
    assert process is not None
    assert find_leftovers(home) == [process]
    assert find_leftovers(other) == []
    end([process], grace_s=30.0)
    left.wait()
    assert not is_alive(process)
