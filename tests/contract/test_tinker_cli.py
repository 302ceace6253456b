"""Managing runs and checkpoints: the command line of `tinker`, and `RestClient` of every release."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from safetensors.numpy import load, load_file

from contract.cells import versions
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS
from contract.references import PlainModel, checkpoint_directory, same_bits
from homefire.checkpoints import ensure_tiny

COMMAND_LINE = "0.38.0"
TOLERANCE = 1e-4
ROWS = [list(b"homefire trains "), list(b"what you own"), list(b"5271 -> 1725")]
"""Of `scripts/tinker_kit.py`."""
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}


def cli_cell(method: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker", version=COMMAND_LINE, method=method, **more)


def rest_cell(method: str, *, since: str = "", until: str = "", **more: str):
    """For the releases that have it."""
    marks = (
        pytest.mark.cell(client="tinker", method=f"RestClient.{method}", **more),
        pytest.mark.parametrize("version", versions("tinker", since=since, until=until)),
    )

    def mark(test):
        for each in marks:
            test = each(test)
        return test

    return mark


@pytest.fixture(scope="module")
def cli(tinker_root, tmp_path_factory) -> ClientFindings:
    """What the command line said about a run that was trained just before."""
    environment = ENVIRONMENTS["tinker", COMMAND_LINE]
    directory = tmp_path_factory.mktemp("downloads")
    return run_client(environment, "tinker_cli.py", tinker_root, directory)


@pytest.fixture
def rest(run_tinker, version) -> ClientFindings:
    return run_tinker(version, "tinker_rest.py")


# The command line ------------------------------------------------------------------------------


@cli_cell("cli: run list")
def test_the_newest_run_is_listed_first(cli):
    run = cli["trained"]["run"]
    listed = cli["run_list"]
    assert listed["json"][0]["training_run_id"] == run
    assert run in listed["table"]


@cli_cell("cli: run info")
def test_a_run_is_described_as_it_was_trained(cli):
    told, trained = cli["run_info"], cli["trained"]
    assert told["training_run_id"] == trained["run"]
    assert (told["base_model"], told["is_lora"], told["lora_rank"]) == ("tiny", True, 4)
    assert not told["corrupted"]
    assert told["last_checkpoint"]["tinker_path"] == trained["state"]
    assert told["last_sampler_checkpoint"]["tinker_path"] == trained["snapshot"]
    assert datetime.fromisoformat(told["last_request_time"]) > datetime.fromisoformat(
        told["last_sampler_checkpoint"]["time"]
    )
    assert cli.refusal("run_info_of_no_run") == "not_found"


@cli_cell("cli: checkpoint list")
def test_a_runs_checkpoints_are_listed_newest_first(cli):
    trained, listed = cli["trained"], cli["checkpoint_list"]
    order = [trained["external"], trained["snapshot"], trained["state"]]
    assert [each["tinker_path"] for each in listed["run"]] == order
    assert [each["tinker_path"] for each in listed["all"]][:3] == order
    shown = min(len(listed["all"]), 20)  # the default of --limit
    assert f"{shown} checkpoints" in listed["table"]


@cli_cell("cli: checkpoint info")
def test_a_checkpoint_is_described_by_what_lies_in_the_store(cli):
    for path, told in cli["checkpoint_info"].items():
        kind = {"w": "training", "s": "sampler", "e": "external"}[path.split("/")[3][0]]
        assert (told["checkpoint_type"], told["lora_rank"]) == (kind, 4)
        assert told["size_bytes"] > 0
        assert told["checkpoint_id"] == path.removeprefix("tinker://").partition("/")[2]


@cli_cell("cli: checkpoint publish, checkpoint unpublish")
def test_a_checkpoint_is_published_and_taken_back(cli):
    assert cli["publish"] == [True, False]


@cli_cell("cli: checkpoint set-ttl")
def test_an_end_is_set_and_removed(cli):
    ends, removed = cli["set_ttl"]
    left = datetime.fromisoformat(ends) - datetime.now(UTC)
    assert timedelta(0) < left <= timedelta(seconds=7200)
    assert removed is None


@cli_cell("cli: checkpoint set-ttl, below an hour", outcome="refused: invalid_argument")
def test_an_end_in_less_than_an_hour_is_refused(cli):
    assert cli.refusal("set_ttl_too_short") == "invalid_argument"
    assert "3600" in cli.error("set_ttl_too_short")["traceback"]


@cli_cell("cli: checkpoint download")
def test_a_download_holds_the_trained_weights_and_leaves_nothing_behind(cli, tinker_root):
    """The state's masters bit for bit; merged into an unmodified model they give the trainer's numbers."""
    trained = cli["trained"]
    snapshot = load_file(
        checkpoint_directory(tinker_root.home, trained["snapshot"]) / "adapter_model.safetensors"
    )
    assert any(value.any() for name, value in snapshot.items() if "lora_B" in name)
    for told in cli["download"]:
        directory = Path(told["destination"])
        assert {path.name for path in directory.iterdir()} == ADAPTER
        assert told["file_size_bytes"] == sum(p.stat().st_size for p in directory.iterdir())
        assert same_bits(load_file(directory / "adapter_model.safetensors"), snapshot)
    plain = PlainModel(ensure_tiny(tinker_root.home / "models/tiny"), adapter=directory)
    for row, logprobs in zip(ROWS, trained["logprobs"], strict=True):
        assert plain.of_targets(row) == pytest.approx(logprobs, abs=TOLERANCE)
    kept = [trained["external"], trained["snapshot"], trained["state"]]
    assert cli["checkpoints_after_the_downloads"][:3] == kept


@cli_cell("cli: checkpoint delete")
def test_what_is_deleted_is_gone_and_nothing_else(cli, tinker_root):
    trained, deleted = cli["trained"], cli["delete"]
    assert deleted["one"] == {"deleted_count": 1, "failed": []}
    assert deleted["rest"] == {"deleted_count": 1, "failed": []}
    assert deleted["left"] == [trained["snapshot"]]
    run = trained["run"]
    left = (tinker_root.home / "store").glob(f"*/*/{run}/*/*")
    assert [f"{path.parent.name}/{path.name}" for path in left] == ["sampler/mark"]
    assert cli["still_training"] == trained["logprobs"]


@cli_cell("cli: model list")
def test_the_base_models_are_listed(cli):
    (tiny,) = (each for each in cli["model_list"] if each["model_name"].endswith("/tiny"))
    assert tiny == {**tiny, "max_context_length": 2048, "trainable": True, "sampleable": True}


@cli_cell("cli: auth status")
def test_the_server_is_found_accessible(cli):
    assert cli["auth_status"] == ["Credentials available: yes", "Tinker accessible: yes"]


@cli_cell("cli: session export-trace", outcome="refused: unsupported")
def test_a_trace_is_refused_by_name(cli):
    assert cli.refusal("session_export_trace") == "unsupported"


@cli_cell("cli: billing usage", outcome="refused: not_found")
def test_there_is_no_billing(cli):
    assert cli.refusal("billing_usage") == "not_found"


# RestClient -------------------------------------------------------------------------------------


@rest_cell("list_training_runs")
def test_runs_come_in_pages(rest):
    page = rest["list_training_runs"]
    assert [run["training_run_id"] for run in page["runs"]] == [rest["trained"]["run"]]
    assert (page["cursor"]["offset"], page["cursor"]["limit"]) == (0, 1)
    assert page["cursor"]["total_count"] >= 1


@rest_cell("get_training_run")
def test_a_run_is_found_by_its_id_and_by_a_path(rest):
    by_id, by_path = rest["get_training_run"]
    assert by_id == by_path
    assert by_id["last_checkpoint"]["tinker_path"] == rest["trained"]["state"]
    assert (by_id["base_model"], by_id["lora_rank"]) == ("tiny", 4)
    assert rest.refusal("get_training_run_of_no_run") == "not_found"


@rest_cell("list_checkpoints")
def test_checkpoints_of_a_run_say_what_they_are(rest):
    trained = rest["trained"]
    snapshot, state = rest["list_checkpoints"]
    assert (snapshot["tinker_path"], snapshot["checkpoint_type"]) == (
        trained["snapshot"],
        "sampler",
    )
    assert (state["tinker_path"], state["checkpoint_type"]) == (trained["state"], "training")
    assert state["size_bytes"] > snapshot["size_bytes"] > 0


@rest_cell("list_user_checkpoints")
def test_checkpoints_of_all_runs_come_in_pages(rest):
    page = rest["list_user_checkpoints"]
    assert page["checkpoints"][0]["tinker_path"] == rest["trained"]["state"]
    assert page["cursor"]["total_count"] >= 2


@rest_cell("get_weights_info_by_tinker_path")
def test_weights_info_is_what_a_model_is_made_with(rest):
    for info in rest["get_weights_info_by_tinker_path"]:
        assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("tiny", True, 4)
        assert (info["train_attn"], info["train_mlp"], info["train_unembed"]) == (True,) * 3


@rest_cell("publish_checkpoint_from_tinker_path, unpublish_checkpoint_from_tinker_path")
def test_publishing_marks_one_checkpoint(rest):
    assert rest["publish_checkpoint_from_tinker_path"] == [False, True, False, False]


@rest_cell("set_checkpoint_ttl_from_tinker_path")
def test_an_end_is_set_in_seconds_from_now(rest):
    ends, removed = rest["set_checkpoint_ttl_from_tinker_path"]
    assert timedelta(0) < datetime.fromisoformat(ends) - datetime.now(UTC)
    assert removed is None
    assert rest.refusal("set_checkpoint_ttl_too_short") == "invalid_argument"


@rest_cell("get_checkpoint_archive_url_from_tinker_path", until="0.30.0")
def test_an_archive_is_an_adapter_with_the_trained_weights(rest):
    trained, archives = rest["trained"], rest["get_checkpoint_archive_url_from_tinker_path"]
    files = {
        path: {name: base64.b64decode(content) for name, content in members.items()}
        for path, members in archives.items()
    }
    for members in files.values():
        assert members.keys() == {*ADAPTER, "checkpoint_complete"}
        config = json.loads(members["adapter_config.json"])
        assert (config["peft_type"], config["r"]) == ("LORA", 4)
    of_state, of_snapshot = (
        load(files[trained[kind]]["adapter_model.safetensors"]) for kind in ("state", "snapshot")
    )
    assert any(value.any() for name, value in of_state.items() if "lora_B" in name)
    assert same_bits(of_state, of_snapshot)


@rest_cell("get_external_weights_urls", since="0.30.0")
def test_external_weights_are_fetched_file_by_file(rest):
    assert rest["get_external_weights_urls"].keys() == ADAPTER


@rest_cell("copy_weights", since="0.38.0")
def test_a_copy_holds_the_same_weights(rest):
    copied = rest["copy_weights"]
    first, second = copied["logprobs"]
    assert first == second
    assert copied["path"].endswith("/weights/mark")
    assert rest["trained"]["run"] not in copied["path"]


@rest_cell("list_sessions, get_session")
def test_a_session_knows_its_runs(rest):
    run = rest["trained"]["run"]
    found = rest["get_session"]
    assert run.partition(":")[0] in found["listed"]
    assert run in found["one"]["training_run_ids"]


@rest_cell("assign_session_project", since="0.22.7")
def test_a_session_is_put_into_a_project(rest):
    assert rest["trained"]["run"] in rest["assign_session_project"]


@rest_cell("search_sessions", since="0.38.0")
def test_a_session_is_found_by_search(rest):
    found = rest["search_sessions"]
    assert found["one"]["session_id"] == rest["trained"]["run"].partition(":")[0]
    assert found["one"]["checkpoints_count"] >= 2
    assert found["one"]["status"] == {"type": "active"}
    assert [len(page) for page in found["pages"]] == [1, 1]
    assert found["pages"][0] != found["pages"][1]


@rest_cell("export_session_trace", since="0.26.2", outcome="refused: unsupported")
def test_no_trace_is_exported(rest):
    assert rest.refusal("export_session_trace") == "unsupported"


@rest_cell("delete_checkpoint")
def test_checkpoints_are_deleted_by_id_and_by_path(rest):
    assert rest["delete_checkpoint"] == []
    assert rest.refusal("delete_checkpoint_by_a_bare_name") == "invalid_argument"
