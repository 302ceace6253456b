"""`homefire quickstart`: options, a server of its own unless one is named, the lifecycle, the report."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from homefire.foundation.home import Home
from homefire.quickstart.chaos import Chaos, schedule, verify_replay
from homefire.quickstart.server import Address, own_server
from homefire.quickstart.settings import BUILT_IN_MODEL, QuickstartSettings
from homefire.quickstart.story import Story
from homefire.quickstart.task import HELD_OUT_FILE, held_out_json
from homefire.wire.errors import HomefireError, InvalidArgument

if TYPE_CHECKING:
    from homefire.quickstart.records import Results

SERVER_LOG = "server.log"
_INTERRUPTED = 130

_DESCRIPTION = """\
Run the whole lifecycle: teach a model a task, improve it by reinforcement learning through a
deployment that hot-loads every step, reconnect in the middle, and branch the result. Starts homefire
for it, and stops everything again.
"""
_EPILOG = """\
examples:
  homefire quickstart
  homefire quickstart --chaos                               (kills everything on the way)
  homefire quickstart --seed 3 --out /tmp/run
  homefire quickstart --base-model Qwen/Qwen3-0.6B
  homefire quickstart --base-url http://127.0.0.1:8700      (a running `homefire up`)
"""


class QuickstartFailed(RuntimeError):
    """The lifecycle ended early; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every promise held, 1 when something failed, 130 after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    console = Console()
    try:
        with _sigterm_as_interrupt():
            _run(arguments, console)
    except KeyboardInterrupt:
        return _complain("interrupted; what the quickstart started is stopped", _INTERRUPTED)
    except (HomefireError, ValueError, QuickstartFailed) as exc:
        return _complain(str(exc), 1)
    return 0


def _run(arguments: argparse.Namespace, console: Console) -> None:
    settings = _settings(arguments)
    folder: Path = arguments.out.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HELD_OUT_FILE).write_bytes(held_out_json())
    console.print(f"homefire quickstart: {settings.base_model}, seed {settings.seed}", style="bold")
    story = Story(console)
    results = _lifecycle(arguments, settings, folder, story)
    story.say(f"everything is stopped again after {story.elapsed_s:.0f} s")
    _report(results, folder, console)


def _lifecycle(
    arguments: argparse.Namespace, settings: QuickstartSettings, folder: Path, story: Story
) -> Results:
    named = _named_server(arguments)
    if named is not None and arguments.chaos:
        raise InvalidArgument(
            "--chaos kills processes, so it only runs on a homefire of its own",
            hint="leave out --base-url and unset FIREWORKS_BASE_URL",
            field="chaos",
        )
    if named is not None:
        story.say(f"on the homefire at {named.base_url}")
        return _lifecycle_at(named, settings, folder, story)
    log = folder / SERVER_LOG
    story.say(f"starting a homefire of its own (log: {log})")
    roots = [Path(settings.base_model).parent] if Path(settings.base_model).is_dir() else []
    with own_server(
        arguments.home, log, model_roots=roots, keep_journals=arguments.chaos
    ) as server:
        # Importing the SDK and torch takes as long as the start of the server: both at once.
        import homefire.quickstart.lifecycle  # noqa: F401

        address = server.wait_ready()
        if not arguments.chaos:
            return _lifecycle_at(address, settings, folder, story)
        with Chaos(server.home, schedule(settings), story) as chaos:
            results = _lifecycle_at(address, settings, folder, story)
        story.say(f"chaos: {len(chaos.killed)} processes were killed; the loop noticed none of it")
        story.say(verify_replay(server.home, chaos.job))
        return results


def _lifecycle_at(
    address: Address, settings: QuickstartSettings, folder: Path, story: Story
) -> Results:
    from homefire.quickstart.lifecycle import run_lifecycle
    from homefire.quickstart.records import RunLog
    from homefire.sdk.training import DATA_PLANE_ERRORS

    try:
        return run_lifecycle(settings, address, RunLog(folder), story)
    except DATA_PLANE_ERRORS as exc:
        raise QuickstartFailed(f"{type(exc).__name__}: {exc}") from exc


def _report(results: Results, folder: Path, console: Console) -> None:
    from homefire.quickstart.report import report

    report(results, folder, console)


def _named_server(arguments: argparse.Namespace) -> Address | None:
    """A server that the user named by option or environment; None starts one of our own."""
    url = arguments.base_url
    if url is None and arguments.home is None:
        url = os.environ.get("FIREWORKS_BASE_URL")
    if url is None:
        return None
    home = Home(arguments.home or Home.default())
    key = os.environ.get("FIREWORKS_API_KEY")
    if not key and home.api_key_file.exists():
        key = home.api_key()
    if not key:
        raise InvalidArgument(
            f"there is no API key for {url}",
            hint='set FIREWORKS_API_KEY (`eval "$(homefire env)"`), or name its --home',
        )
    return Address(url.rstrip("/"), key)


def _settings(arguments: argparse.Namespace) -> QuickstartSettings:
    settings = QuickstartSettings.for_model(arguments.base_model)
    return replace(
        settings,
        seed=arguments.seed,
        rl_steps=settings.rl_steps if arguments.steps is None else arguments.steps,
        supervised_steps=(
            settings.supervised_steps
            if arguments.supervised_steps is None
            else arguments.supervised_steps
        ),
        shuffle_rewards=arguments.shuffle_rewards,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="homefire quickstart",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--base-model",
        default=BUILT_IN_MODEL,
        metavar="M",
        help="catalog name, Hugging Face repository or directory (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of prompts and demonstrations (default: %(default)s)")
    add("--steps", type=int, metavar="N", help="RL steps")
    add("--supervised-steps", type=int, metavar="N", help="steps of imitation before")
    add(
        "--out",
        type=Path,
        default=Path("quickstart-out"),
        metavar="DIR",
        help="metrics, evaluations and plot go there (default: ./%(default)s)",
    )
    add("--home", type=Path, metavar="DIR", help="run on this home (default: a temporary one)")
    add(
        "--base-url",
        metavar="URL",
        help="use this homefire (default: $FIREWORKS_BASE_URL, else its own)",
    )
    add(
        "--chaos",
        action="store_true",
        help="kill every process at least once meanwhile, and in the end replay the job from step 0"
        " and compare",
    )
    add("--shuffle-rewards", action="store_true", help=argparse.SUPPRESS)
    return parser


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM stops the run as Ctrl-C does: by way of every cleanup."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(text: str, status: int) -> int:
    sys.stderr.write(f"error: {text}\n")
    return status
