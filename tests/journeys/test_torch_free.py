"""Torch stays in the engines: after an import, and after a whole loop was served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from journeys.loop import start_loop

ENTRY_POINTS = [
    "homefire.sdk",
    "homefire.gateway.__main__",
    "homefire.control.__main__",
    "homefire.trainer.front.__main__",
    "homefire.cli.main",
]


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_importing_an_entry_point_loads_no_torch(module):
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_sdk_loads_tinker_only_for_names_that_need_it():
    code = (
        "import sys, homefire.sdk; from homefire.sdk import TrainerJobManager, DeploymentSampler;"
        "print('tinker' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def mapped_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_after_a_served_loop_only_the_engines_have_torch_in_memory(homefire_up):
    server = homefire_up()
    loop = start_loop(server)
    loop.train()
    loop.syncer.save_and_hotload("s0")
    server.cli("status", "--json")
    services = {
        name: json.loads((server.home / "run" / f"{name}.json").read_text())["process"]["pid"]
        for name in ("gateway", "control")
    }
    services["supervisor"] = server.process.pid
    services["front"] = loop.events("started")[-1]["pid"]
    assert {name: mapped_torch(pid) for name, pid in services.items()} == dict.fromkeys(
        services, False
    )
    assert mapped_torch(loop.events("engine_started")[-1]["pid"])
