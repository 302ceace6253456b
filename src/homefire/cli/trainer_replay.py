"""`homefire trainer replay JOB`: a job done again from its own journal, in a fresh process."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, print_table, short_digest

if TYPE_CHECKING:
    from homefire.foundation.home import Home
    from homefire.trainer.front.engine_process import Engine
    from homefire.trainer.front.replay import Replayed, Verified
    from homefire.wire.specs import TrainerSpec

_MOST_SHOWN = 10


def add_verb(verbs: Commands) -> None:
    leaf = verbs.add_parser(
        "replay",
        help="do a job again from its journal and compare",
        description="Replays every operation in a fresh engine, beside the job and without touching it,"
        " and compares each result with what was answered. It starts at the base model, or at the"
        " oldest recovery point where the journal was trimmed (`homefire up --keep-journals` never"
        " trims). It needs the memory of one more engine.",
    )
    leaf.add_argument("name", metavar="JOB", help="id of the trainer job, running or not")
    leaf.add_argument(
        "--verify",
        action="store_true",
        help="also recover from the newest recovery point, as after a crash, and compare masters,"
        " optimizer and gradients of both, bit for bit",
    )
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """1 when anything differs."""
    spec = _spec(home_of(arguments), last_segment(arguments.name))
    verified, replayed = asyncio.run(_replay(spec, verify=arguments.verify))
    if arguments.json:
        print_json(_fields(verified, replayed))
    else:
        _print(spec.job, verified, replayed)
    is_equal = not replayed.divergences if verified is None else verified.ok
    return 0 if is_equal else 1


async def _replay(spec: TrainerSpec, *, verify: bool) -> tuple[Verified | None, Replayed]:
    import tempfile

    from homefire.foundation.clock import SystemClock
    from homefire.trainer.front.replay import Replay

    with (
        tempfile.TemporaryDirectory(dir=spec.job_dir, prefix="replay-") as workspace,
        _Progress() as progress,
    ):
        replay = Replay(spec, Path(workspace), _start_engine, SystemClock())
        if not verify:
            return None, await replay.run(progress.show)
        verified = await replay.verify(progress.show)
        return verified, verified.replayed


async def _start_engine(spec: TrainerSpec) -> Engine:
    from homefire.trainer.front.engine_ranks import start_engine

    return await start_engine(spec)


class _Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("replaying", total=None)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)


def _spec(home: Home, job: str) -> TrainerSpec:
    from homefire.wire.errors import NotFound
    from homefire.wire.ids import check_name
    from homefire.wire.specs import TrainerSpec, read_spec

    try:
        return read_spec(home.job(check_name(job, field="job")) / "spec.json", TrainerSpec)
    except FileNotFoundError as exc:
        raise NotFound(
            f"job {job!r} has never run on {home.root}", hint="list them: `homefire trainer list`"
        ) from exc


def _fields(verified: Verified | None, replayed: Replayed) -> dict[str, object]:
    fields: dict[str, object] = {
        "start": replayed.start,
        "num_replayed": replayed.num_replayed,
        "divergences": replayed.divergences,
        "slots": {
            name: {"step": end.step, "digest": end.digest} for name, end in replayed.slots.items()
        },
    }
    if verified is not None:
        fields["recovered_from"] = verified.recovered_from
        fields["differences"] = verified.differences
    return fields


def _print(job: str, verified: Verified | None, replayed: Replayed) -> None:
    start = _place(replayed.start)
    same = "each gave what was answered the first time"
    if replayed.divergences:
        same = f"{len(replayed.divergences)} gave another result than the first time:"
    print(f"{job}: {replayed.num_replayed} operations replayed from {start}; {same}")
    _print_first(replayed.divergences)
    rows = [[name, str(end.step), short_digest(end.digest)] for name, end in replayed.slots.items()]
    print_table("where they end", ("slot", "step", "digest of the weights"), rows)
    if verified is None:
        return
    ending = "the same bits" if not verified.differences else "other bits:"
    print(f"a recovery from {_place(verified.recovered_from)} ends with {ending}")
    _print_first(verified.differences)


def _place(point: str | None) -> str:
    return "the base model" if point is None else f"recovery point {point}"


def _print_first(lines: list[str]) -> None:
    for line in lines[:_MOST_SHOWN]:
        print(f"  {line}")
    if len(lines) > _MOST_SHOWN:
        print(f"  and {len(lines) - _MOST_SHOWN} more")
