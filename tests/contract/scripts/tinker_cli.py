"""The command line of `tinker`, command by command, on a run that this script trains.

Every command goes through the entry point's own group, in one process: each start of the command
line costs seconds.

python tinker_cli.py DIRECTORY
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

import tinker
from findings import Findings
from tinker.cli.__main__ import main_cli
from tinker_kit import finish, forward, trained_adapter

found = Findings()
directory = sys.argv[1]
service = tinker.ServiceClient()
client = trained_adapter(service, steps=2)
state = client.save_state("mark").result().path
snapshot = client.save_weights_for_sampler("mark").result().path
external = client.save_weights_external("out").result().path


def cli(*words: str) -> str:
    """What the command prints; raises what it fails with."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main_cli(args=list(words), standalone_mode=False)
    return output.getvalue()


def cli_json(*words: str):
    return json.loads(cli("--format", "json", *words))


@found.step
def trained():
    return {
        "run": client.model_id,
        "state": state,
        "snapshot": snapshot,
        "external": external,
        "logprobs": forward(client),
    }


@found.step
def run_list():
    return {"json": cli_json("run", "list")["runs"], "table": cli("run", "list", "--limit", "1")}


@found.step
def run_info():
    return cli_json("run", "info", client.model_id)


@found.step
def run_info_of_no_run():
    cli("run", "info", "ts-0000000000000000:train:0")


@found.step
def checkpoint_list():
    return {
        "run": cli_json("checkpoint", "list", "--run-id", client.model_id)["checkpoints"],
        "all": cli_json("checkpoint", "list", "--limit", "0")["checkpoints"],
        "table": cli("checkpoint", "list"),
    }


@found.step
def checkpoint_info():
    return {path: cli_json("checkpoint", "info", path) for path in (state, snapshot, external)}


@found.step
def publish():
    cli("checkpoint", "publish", state)
    published = cli_json("checkpoint", "info", state)["public"]
    cli("checkpoint", "unpublish", state)
    return [published, cli_json("checkpoint", "info", state)["public"]]


@found.step
def set_ttl():
    cli("checkpoint", "set-ttl", state, "--ttl", "7200")
    ends = cli_json("checkpoint", "info", state)["expires_at"]
    cli("checkpoint", "set-ttl", state, "--remove")
    return [ends, cli_json("checkpoint", "info", state)["expires_at"]]


@found.step
def set_ttl_too_short():
    cli("checkpoint", "set-ttl", state, "--ttl", "60")


@found.step
def download():
    """Of a state: loaded into a training run of its own and exported. Of an export: as it is."""
    return [
        cli_json("checkpoint", "download", path, "--output", directory)
        for path in (state, external)
    ]


@found.step
def checkpoints_after_the_downloads():
    return [c["tinker_path"] for c in cli_json("checkpoint", "list", "--limit", "0")["checkpoints"]]


@found.step
def delete():
    """One by its path, then what is left of one kind."""
    one = cli_json("checkpoint", "delete", state, "--yes")
    rest = cli_json(
        "checkpoint", "delete", "--run-id", client.model_id, "--type", "external_weights", "--yes"
    )
    left = cli_json("checkpoint", "list", "--run-id", client.model_id)["checkpoints"]
    return {"one": one, "rest": rest, "left": [each["tinker_path"] for each in left]}


@found.step
def model_list():
    return cli_json("model", "list")["models"]


@found.step
def auth_status():
    return cli("auth", "status").splitlines()


@found.step
def session_export_trace():
    cli("session", "export-trace", client.model_id.partition(":")[0])


@found.step
def billing_usage():
    cli("billing", "usage", "2026-11-01", "2026-11-02")


@found.step
def still_training():
    return forward(client)


finish(client)
found.report()
