"""Virtual environments of the real clients, layered on the project's own and built once.

Each holds only the client's wheels (`--no-deps`) and a `.pth` file that lets everything else come
from the project's environment, so that one costs seconds and a few megabytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[2] / ".venvs"


@dataclass(frozen=True)
class ClientEnvironment:
    name: str
    wheels: tuple[str, ...]

    def python(self) -> Path:
        """The environment's interpreter; builds the environment on first use."""
        ENVIRONMENTS.mkdir(exist_ok=True)
        directory = ENVIRONMENTS / f"{self.name}-{self._fingerprint()}"
        with (ENVIRONMENTS / f"{directory.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "ready").exists():
                self._build(directory)
        return directory / "bin" / "python"

    def _fingerprint(self) -> str:
        parts = (*self.wheels, sys.version, sysconfig.get_path("purelib"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]

    def _build(self, directory: Path) -> None:
        venv.create(directory, clear=True, with_pip=False, symlinks=True)
        python = directory / "bin" / "python"
        install = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"]
        install += [str(python), "install", "--quiet", "--no-deps", *self.wheels]
        subprocess.run(install, check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = directory / "lib" / version / "site-packages"
        (packages / "zz_project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (directory / "ready").touch()


FIREWORKS_1_2_0A68 = ClientEnvironment(
    "fireworks-ai-1.2.0a68",
    (
        "fireworks-ai==1.2.0a68",
        "tinker==0.16.1",
        "requests==2.32.5",
        "urllib3==2.5.0",
        "charset-normalizer==3.4.4",
    ),
)
