"""Where each service's log lies, by the name that `homefire logs NAME` takes."""

from __future__ import annotations

from pathlib import Path

from homefire.foundation.home import Home
from homefire.launch.protocol import tail_of

SERVICES = ("gateway", "control")


def service_log(home: Home, service: str, *, lines: int) -> list[str]:
    return tail_of(home.run / f"{service}.log", lines=lines)


def job_log(home: Home, job_id: str, *, lines: int) -> list[str]:
    """The front's log, then its engine's; each line says whose it is."""
    return _labelled(sorted(home.job(job_id).glob("*.log"), reverse=True), lines=lines)


def deployment_log(home: Home, deployment_id: str, *, lines: int) -> list[str]:
    """Every replica's log, one after the other."""
    root = home.replica(deployment_id, 0).parent
    return _labelled(sorted(root.glob("*/*.log")), lines=lines)


def _labelled(paths: list[Path], *, lines: int) -> list[str]:
    labelled: list[str] = []
    for path in paths:
        label = f"{path.parent.name}/{path.stem}" if path.parent.name.isdigit() else path.stem
        labelled += [f"[{label}] {line}" for line in tail_of(path, lines=lines)]
    return labelled
