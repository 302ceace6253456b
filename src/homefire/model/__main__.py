"""`python -m homefire.model DIR`: does the engine take this model? One line of JSON says so, or why not.

For those who may not import torch themselves, such as the command line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from homefire.model.loading import load_model
from homefire.wire.engine_check import EngineCheck
from homefire.wire.errors import ErrorRecord, HomefireError


def main(arguments: list[str] | None = None) -> int:
    """0 when the model can be trained and served."""
    parser = argparse.ArgumentParser(prog="python -m homefire.model")
    parser.add_argument("directory", type=Path, help="a Hugging Face model")
    found = check(parser.parse_args(arguments).directory)
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    return 0 if found.error is None else 1


def check(directory: Path) -> EngineCheck:
    """Loads the model and measures what its rule measures: rows apart, attention and head exact."""
    try:
        model = load_model(directory)
    except HomefireError as exc:
        return EngineCheck(error=ErrorRecord.of(exc))
    return EngineCheck(
        architecture=model.architecture,
        max_context_length=model.max_context_length,
        layout=model.layout.value,
    )


if __name__ == "__main__":
    sys.exit(main())
