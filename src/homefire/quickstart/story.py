"""Tells the user what is going on: chapters, and the progress of loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from homefire.foundation.clock import Clock, SystemClock

NUM_CHAPTERS = 7
_LINES_PER_LOOP = 8
"""Where the output is no terminal, a loop prints so many lines instead of a bar."""


class Advance(Protocol):
    """Counts one step of a loop; `text` is the newest figure, e.g. `reward 0.71`."""

    def __call__(self, text: str) -> None: ...


class Story:
    def __init__(self, console: Console, clock: Clock | None = None) -> None:
        self.console = console
        self._clock = clock or SystemClock()
        self._began = self._clock.monotonic()
        self._chapter = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock.monotonic() - self._began

    def chapter(self, title: str) -> None:
        self._chapter += 1
        number = f"[{self._chapter}/{NUM_CHAPTERS}]"
        self._line(f"{number} {title}  ({self.elapsed_s:.0f} s)", style="bold")

    def say(self, text: str) -> None:
        self._line(f"      {text}")

    @contextmanager
    def loop(self, title: str, total: int) -> Iterator[Advance]:
        """A bar on a terminal, else a few lines."""
        if self.console.is_terminal:
            with self._bar() as progress:
                task = progress.add_task(f"      {title}", total=total, text="")
                yield lambda text: progress.update(task, advance=1, text=text)
        else:
            yield self._lines(title, total)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self.console,
        )

    def _lines(self, title: str, total: int) -> Advance:
        done = 0
        stride = max(1, total // _LINES_PER_LOOP)

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            if done % stride == 0 or done == total:
                self.say(f"{title} {done}/{total}  {text}")

        return advance

    def _line(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
