"""`homefire checkpoint import DIR|HF-REPO`: a model from elsewhere as a base of this home."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.progress_line import progress_line
from homefire.cli.tables import print_json, short_digest, size

if TYPE_CHECKING:
    from homefire.wire.engine_check import EngineCheck

_RESERVED = ("tiny", "local")
"""The built-in model, and where the account's promoted models lie."""
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""What is downloaded of a repository: never pickles, never code."""
_EPILOG = """\
The model is copied to HOME/models/NAME with a manifest of every tensor's digest, checked on the way:
safetensors only, no code of its own, not quantized, finite values, a fast tokenizer, weights that fit
the configuration, and an engine that computes it exactly. Train and serve it as
accounts/local/models/NAME; a running `homefire up` sees it at once.

examples:
  homefire checkpoint import ./my-model --as my-model
  homefire checkpoint import Qwen/Qwen3-0.6B
"""


def add_verb(verbs: Commands) -> None:
    leaf = verbs.add_parser(
        "import",
        help="make a base model of a local or Hugging Face directory",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    leaf.add_argument(
        "source", metavar="DIR|REPO", help="a directory, or a Hugging Face repository"
    )
    leaf.add_argument("--as", dest="name", metavar="NAME", help="default: the source's last part")
    leaf.add_argument("--revision", metavar="REV", help="of a repository: branch, tag or commit")
    leaf.add_argument(
        "--no-engine-check",
        action="store_true",
        help="do not load the model in the engine (where torch is not installed, or memory is short)",
    )
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run_import)


def run_import(arguments: argparse.Namespace) -> int:
    from homefire.checkpoints.model_import import import_model
    from homefire.foundation.clock import SystemClock
    from homefire.wire.ids import model_name

    home = home_of(arguments)
    home.prepare()
    source, origin = _source(arguments.source, arguments.revision)
    name = _name(arguments.name or _default_name(arguments.source))
    report = progress_line(quiet=arguments.json)
    checked = None
    if not arguments.no_engine_check:
        report("loading in the engine", 0, 0)
        checked = engine_check(source)
    made = import_model(
        source,
        home.models / name,
        origin=origin,
        created_at=SystemClock().now(),
        report=report,
    )
    manifest = made.manifest
    if arguments.json:
        print_json(
            {
                "model": model_name("local", name),
                "directory": str(made.directory),
                "origin": origin,
                "digest": manifest.digest,
                "size_bytes": manifest.size_bytes,
                "was_there": made.was_there,
                "architecture": checked.architecture if checked else None,
            }
        )
        return 0
    engine = f", {checked.architecture} in {checked.layout} rows" if checked else ""
    state = "was imported before" if made.was_there else "imported"
    digest = short_digest(manifest.digest)
    print(
        f"{model_name('local', name)} {state}: {size(manifest.size_bytes)}{engine}, digest {digest}"
    )
    return 0


def engine_check(directory: Path) -> EngineCheck:
    """The engine's verdict, from a process of its own: the command line never loads torch."""
    import msgspec

    from homefire.wire.engine_check import EngineCheck
    from homefire.wire.errors import ModelUnavailable

    command = [sys.executable, "-m", "homefire.model", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False)
    try:
        found = msgspec.json.decode(done.stdout.strip().rpartition(b"\n")[2], type=EngineCheck)
    except msgspec.DecodeError as exc:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ModelUnavailable(
            f"the engine could not look at {directory}: {' '.join(tail) or 'it gave no reason'}",
            hint="install homefire[engine], or give --no-engine-check",
        ) from exc
    if found.error is not None:
        raise found.error.exception()
    return found


def _source(source: str, revision: str | None) -> tuple[Path, str]:
    """The directory, and what is recorded as its origin."""
    from homefire.wire.errors import InvalidArgument

    directory = Path(source).expanduser()
    if directory.is_dir():
        if revision:
            raise InvalidArgument(
                "--revision belongs to a repository, not to a directory", field="revision"
            )
        return directory.resolve(), str(directory.resolve())
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise InvalidArgument(
            f"{source!r} is no directory",
            hint="give a directory that exists, or a repository such as Qwen/Qwen3-0.6B",
            field="source",
        )
    return _download(source, revision)


def _download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Into the Hugging Face cache; what is there already is not fetched again."""
    from homefire.wire.errors import ModelUnavailable

    try:
        from huggingface_hub import (
            snapshot_download,  # pyright: ignore[reportUnknownVariableType]
        )
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError as exc:
        raise ModelUnavailable(
            "huggingface_hub is missing", hint="install homefire[engine], or give a directory"
        ) from exc
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ModelUnavailable(
            f"{repository!r} could not be downloaded: {reason}",
            hint="check its name and your connection; a gated one needs HF_TOKEN",
        ) from exc
    directory = Path(found)
    return directory, f"{repository}@{directory.name}"


def _default_name(source: str) -> str:
    return (
        Path(source).expanduser().resolve().name if Path(source).is_dir() else source.split("/")[1]
    )


def _name(name: str) -> str:
    from homefire.wire.errors import InvalidArgument
    from homefire.wire.ids import check_name

    if name in _RESERVED:
        raise InvalidArgument(
            f"the name {name!r} is taken by homefire itself",
            hint="choose one with --as",
            field="as",
        )
    return check_name(name, field="as")
