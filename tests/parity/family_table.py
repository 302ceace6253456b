"""Writes docs/models.md: what the verdict says of each family, and how far its numbers are off.

python tests/parity/family_table.py             prints the table
python tests/parity/family_table.py --update    writes the page
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from homefire.inference.engine.embedded import EmbeddedNetwork  # noqa: E402
from homefire.model.loading import load_model  # noqa: E402
from homefire.wire.errors import Unsupported  # noqa: E402
from parity.families import FAMILIES, made  # noqa: E402
from parity.family_measures import decoded, packed  # noqa: E402

PAGE = HERE.parents[1] / "docs/models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
_HEADER = (
    "| family | `model_type` | what it shows | training | sampling | logprobs | gradients | sampled"
    " | Hugging Face |",
    "|---|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class FamilyVerdict:
    training: str
    """The layout of its rows, or why it is refused."""
    sampling: str


def verdict_of(directory: Path) -> FamilyVerdict:
    training = _said(lambda: load_model(directory).layout.value)
    return FamilyVerdict(training, training if "refused" in training else _sampling(directory))


def _sampling(directory: Path) -> str:
    def opened() -> str:
        EmbeddedNetwork(directory, max_running=2, max_context_length=64, threads=1)
        return "exact"

    return _said(opened)


def _said(answer: Callable[[], str]) -> str:
    try:
        return answer()
    except Unsupported as refused:
        return f"refused: {refused.message.split(': ', 1)[1]}"


def row_of(name: str, directory: Path) -> str:
    family, verdict = FAMILIES[name], verdict_of(directory)
    figures = ["", "", "", ""]
    if "refused" not in verdict.training:
        measured = packed(directory)
        sampled = decoded(directory) if verdict.sampling == "exact" else None
        errors = (measured.logprob, measured.gradient, sampled, measured.floor)
        figures = ["" if error is None else _figure(error) for error in errors]
    cells = [name, f"`{family.model_type}`", family.shows, verdict.training, verdict.sampling]
    return f"| {' | '.join([*cells, *figures])} |"


def _figure(error: float) -> str:
    """One digit: 4e-6."""
    return "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


def page_verdicts() -> dict[str, FamilyVerdict]:
    table = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[len(_HEADER) :]]
    return {row[0]: FamilyVerdict(row[3].strip(), row[4].strip(" |")) for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write docs/models.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(_HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        for name in FAMILIES:
            lines.append(row_of(name, made(name, Path(scratch))))
            print(lines[-1], flush=True)
    if arguments.update:
        before, rest = PAGE.read_text().split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main()
