"""`homefire env`: what a shell must export so that every client finds this homefire."""

from __future__ import annotations

import argparse
import shlex
import sys

from homefire.cli.options import Commands, add_home, add_json, home_of


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "env",
        help="print `export` lines for the clients' URLs and keys",
        description='Use it as: eval "$(homefire env)"',
    )
    add_home(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the values of the last `homefire up` even when it stopped, but then fails."""
    from homefire.foundation.home import read_up_record
    from homefire.foundation.process import is_alive
    from homefire.wire.errors import Unavailable

    home = home_of(arguments)
    record = read_up_record(home)
    start = f"start it with `homefire up --home {shlex.quote(str(home.root))}`"
    if record is None:
        raise Unavailable(f"no `homefire up` has run on {home.root}", hint=start)
    values = variables(record.url, home.api_key())
    print(_as_json(values) if arguments.json else _as_exports(values))
    if not is_alive(record.process):
        sys.stdout.flush()
        raise Unavailable(
            f"`homefire up` is not running on {home.root}; these values are of its last run",
            hint=start,
        )
    return 0


def variables(url: str, key: str) -> dict[str, str]:
    """Example: {"FIREWORKS_BASE_URL": "http://127.0.0.1:8700", …}."""
    return {
        "FIREWORKS_BASE_URL": url,
        "FIREWORKS_API_KEY": key,
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": key,
        "OPENAI_BASE_URL": f"{url}/inference/v1",
        "OPENAI_API_KEY": key,
    }


def _as_exports(values: dict[str, str]) -> str:
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in values.items())


def _as_json(values: dict[str, str]) -> str:
    import json

    return json.dumps(values, indent=2)
