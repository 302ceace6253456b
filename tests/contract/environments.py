"""Virtual environments of the real clients, layered on the project's own and built once.

Each holds only the client's wheels (`--no-deps`) and a `.pth` file that lets everything else come
from the project's environment, so that one costs seconds and a few megabytes. What a client needs
and the project lacks, or pins to another release, is listed with it.

    ENVIRONMENTS["tinker", "0.30.0"].python()
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

DIRECTORY = Path(__file__).parents[2] / ".venvs"


class EnvironmentUnavailable(Exception):
    """A wheel of a client could not be had; names the client, the wheels and what pip said."""


@dataclass(frozen=True)
class ClientEnvironment:
    client: str
    version: str
    needs: tuple[str, ...] = ()
    """Pinned wheels beside the client's own."""

    @property
    def name(self) -> str:
        return f"{self.client}-{self.version}"

    @property
    def wheels(self) -> tuple[str, ...]:
        return (f"{self.client}=={self.version}", *self.needs)

    def python(self) -> Path:
        """The environment's interpreter; builds the environment on first use."""
        DIRECTORY.mkdir(exist_ok=True)
        directory = DIRECTORY / f"{self.name}-{self._fingerprint()}"
        with (DIRECTORY / f"{directory.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "ready").exists():
                self._build(directory)
        return directory / "bin" / "python"

    def _fingerprint(self) -> str:
        parts = (*self.wheels, sys.version, sysconfig.get_path("purelib"))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]

    def _build(self, directory: Path) -> None:
        venv.create(directory, clear=True, with_pip=False, symlinks=True)
        self._install_into(directory / "bin" / "python")
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = directory / "lib" / version / "site-packages"
        (packages / "zz_project.pth").write_text(
            f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        )
        (directory / "ready").touch()

    def _install_into(self, python: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        command = [*pip, "install", "--quiet", "--no-deps", *self.wheels]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise EnvironmentUnavailable(
                f"the environment of {self.name} cannot be built: pip found no way to install "
                f"{' '.join(self.wheels)}\n{run.stdout}{run.stderr}"
            )


REQUESTS = ("requests==2.34.2", "urllib3==2.8.0", "charset-normalizer==3.5.2")
FIREWORKS = (*REQUESTS, "httpx-aiohttp==0.2.0")
# What the SDK pins from 1.2.20 on: `pydantic<2.13`, `pyqwest==0.10.0`.
FIREWORKS_PINS = ("pydantic==2.12.5", "pydantic_core==2.41.5")
PYQWEST = "pyqwest==0.10.0"
DATASETS = (
    *REQUESTS,
    "datasets==5.2.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "xxhash==4.1.0",
)
COOKBOOK = (
    *DATASETS,
    "tinker==0.38.0",
    "antlr4-python3-runtime==4.13.2",
    "blobfile==3.3.0",
    "chz==0.4.0",
    "cloudpickle==3.1.3",
    "latex2sympy2_extended==1.11.0",
    "lxml==6.1.3",
    "math-verify==0.9.0",
    "pycryptodomex==3.24.2",
    "pylatexenc==2.10",
    "termcolor==3.3.0",
    "tiktoken==0.14.0",
)
LM_EVAL = (
    *DATASETS,
    "absl-py==2.5.1",
    "chardet==6.0.0.post1",
    "cloudpickle==3.1.3",
    "colorama==0.4.6",
    "DataProperty==1.1.1",
    "defusedxml==0.7.1",
    "evaluate==0.4.6",
    "joblib==1.6.0",
    "lxml==6.1.3",
    "mbstrdecoder==1.1.5",
    "more-itertools==11.2.1",
    "narwhals==2.29.0",
    "nltk==3.10.4",
    "pathvalidate==3.3.1",
    "portalocker==4.4.2",
    "pytablewriter==1.2.1",
    "python-dateutil==2.9.0.post0",
    "pytz==2026.6",
    "rouge_score==0.1.2",
    "sacrebleu==2.6.0",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
    "six==1.17.0",
    "sqlitedict==2.1.0",
    "tabledata==1.3.5",
    "tabulate==0.10.0",
    "tcolorpy==0.1.7",
    "tenacity==9.2.1",
    "threadpoolctl==3.8.0",
    "tiktoken==0.14.0",
    "typepy==1.3.5",
    "word2number==1.1",
)
VERIFIERS = (
    *REQUESTS,
    "aiofiles==25.1.0",
    "anthropic==2.13.0",
    "antlr4-python3-runtime==4.13.2",
    "cffi==2.1.1",
    "connectrpc==0.11.1",
    "cryptography==50.0.2",
    "docstring_parser==0.18.0",
    "gepa==0.1.4",
    "jiter==0.19.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "latex2sympy2_extended==1.11.0",
    "loguru==0.7.3",
    "math-verify==0.9.0",
    "mcp==2.0.0",
    "mcp-types==2.0.0",
    "msgpack==1.2.4",
    "openai==2.54.0",
    "openai-harmony==0.0.8",
    "prime-pydantic-config==0.4.3",
    "prime-runs==0.1.4",
    "prime-sandboxes==0.5.1",
    "prime-traces==0.0.10",
    "prime-tunnel==0.1.15",
    "protobuf-py==0.1.1",
    "protobuf-py-ext==0.1.1",
    "pycparser==3.12",
    "PyJWT==2.15.1",
    "python-multipart==0.0.34",
    "pyzmq==27.3.0",
    "referencing==0.37.0",
    "renderers==0.1.12",
    "rpds-py==2026.9.1",
    "sse-starlette==3.7.0",
    "tenacity==9.2.1",
    "tiktoken==0.14.0",
    "tomli==2.5.0",
    "tomli_w==1.2.0",
)

_TABLE = (
    ClientEnvironment("tinker", "0.15.0"),
    ClientEnvironment("tinker", "0.16.1"),
    ClientEnvironment("tinker", "0.22.7"),
    ClientEnvironment("tinker", "0.26.2"),
    ClientEnvironment("tinker", "0.30.0"),
    ClientEnvironment("tinker", "0.38.0"),
    ClientEnvironment("tinker-cookbook", "0.6.1", COOKBOOK),
    ClientEnvironment("fireworks-ai", "1.0.0a52", (*FIREWORKS, "tinker==0.15.0")),
    ClientEnvironment("fireworks-ai", "1.2.0a68", (*FIREWORKS, *FIREWORKS_PINS, "tinker==0.16.1")),
    ClientEnvironment(
        "fireworks-ai", "1.2.20", (*FIREWORKS, *FIREWORKS_PINS, PYQWEST, "tinker==0.23.0")
    ),
    ClientEnvironment("fireworks-ai", "1.2.30", (*FIREWORKS, *FIREWORKS_PINS, PYQWEST)),
    ClientEnvironment("openai", "3.57.0", ("jiter==0.19.0",)),
    ClientEnvironment("lm-eval", "0.4.13", LM_EVAL),
    ClientEnvironment("verifiers", "0.4.0", VERIFIERS),
)
ENVIRONMENTS = {(each.client, each.version): each for each in _TABLE}
