"""Resource commands, status and logs against a scripted control plane."""

from __future__ import annotations

import json
import re

import pytest

from homefire.cli.tables import size

JOB = {
    "name": "accounts/local/rlorTrainerJobs/job-1",
    "state": "JOB_STATE_RUNNING",
    "trainingConfig": {"baseModel": "tiny"},
    "trainerMode": "POLICY_TRAINER",
    "createTime": "2026-01-31T12:00:00.123456Z",
    "status": {"message": "[not markup]"},
}
STATUS = {
    "version": "0.1.0",
    "home": "/home",
    "url": "http://127.0.0.1:8700",
    "jobs": [
        {
            "name": JOB["name"],
            "state": "JOB_STATE_PENDING",
            "message": "needs 2 threads",
            "baseModel": "tiny",
            "mode": "POLICY_TRAINER",
            "pid": None,
            "step": 7,
        }
    ],
    "deployments": [
        {
            "name": "accounts/local/deployments/serving",
            "state": "READY",
            "message": "",
            "baseModel": "tiny",
            "desiredIdentity": "step_2",
            "replicas": [
                {
                    "replica": 0,
                    "pid": 5,
                    "ready": True,
                    "identity": "step_1",
                    "digest": "0123456789abcdef",
                    "stage": "loading",
                }
            ],
        },
        {
            "name": "accounts/local/deployments/empty",
            "state": "CREATING",
            "message": "starting",
            "baseModel": "tiny",
            "desiredIdentity": None,
            "replicas": [],
        },
    ],
    "capacity": {
        "threadsTotal": 4,
        "threadsUsed": 3,
        "memoryTotalBytes": 2**30,
        "memoryUsedBytes": 1536,
        "waiting": [JOB["name"]],
    },
}


def test_a_list_follows_pages_and_shows_a_table(homefire, control):
    def page(query):
        token = query.get("pageToken", "")
        rows = {"": JOB, "next": {**JOB, "name": "accounts/local/rlorTrainerJobs/job-2"}}
        return {"rlorTrainerJobs": [rows[token]], "nextPageToken": "" if token else "next"}

    control.answers["GET /v1/accounts/local/rlorTrainerJobs"] = page
    outcome = homefire("trainer", "list")
    assert outcome.status == 0
    rows = [line.split() for line in outcome.out.splitlines() if "job-" in line]
    assert [row[:4] for row in rows] == [
        ["job-1", "RUNNING", "tiny", "POLICY_TRAINER"],
        ["job-2", "RUNNING", "tiny", "POLICY_TRAINER"],
    ]
    assert "[not markup]" in outcome.out


def test_a_list_as_json_has_every_field(homefire, control):
    control.answers["GET /v1/accounts/local/rlorTrainerJobs"] = {"rlorTrainerJobs": [JOB]}
    assert homefire("trainer", "list", "--json").json == {"rlorTrainerJobs": [JOB]}


def test_a_job_is_created_with_what_was_asked_and_waited_for(homefire, control):
    states = iter(["CREATING", "RUNNING"])
    created = {**JOB, "state": "JOB_STATE_PENDING", "engineRanks": 2}
    control.answers["POST /v1/accounts/local/rlorTrainerJobs"] = lambda query: {
        **created,
        "status": {"message": f"needs 2 threads for {query['trainingShape']}"},
    }
    control.answers[f"GET /v1/{JOB['name']}"] = lambda query: {
        **created,
        "state": f"JOB_STATE_{next(states)}",
        "status": {"message": ""},
    }
    words = ("--shape", "tiny-full", "--ranks", "2", "--wait")
    outcome = homefire("trainer", "create", "job-1", "--base-model", "tiny", *words)
    assert outcome.out == "trainer job job-1 is RUNNING, 2 engine ranks\n"
    assert outcome.err == "needs 2 threads for accounts/local/trainingShapes/tiny-full\n"
    assert outcome.status == 0
    sent = json.loads(control.bodies[-1])
    assert sent == {"trainingConfig": {"baseModel": "tiny", "loraRank": 0, "acceleratorCount": 2}}


def test_a_job_that_was_waited_for_and_failed_is_an_error(homefire, control):
    control.answers["POST /v1/accounts/local/rlorTrainerJobs"] = {
        **JOB,
        "state": "JOB_STATE_FAILED",
    }
    outcome = homefire("trainer", "create", "--base-model", "tiny", "--wait")
    assert (outcome.status, "FAILED" in outcome.out) == (1, True)


def test_an_empty_list_says_so(homefire, control):
    control.answers["GET /v1/accounts/local/deployments"] = {"deployments": []}
    assert homefire("deployment", "list").out == "deployments: none\n"


@pytest.mark.parametrize("name", ["job-1", JOB["name"]])
def test_get_takes_an_id_or_a_resource_name(homefire, control, name):
    control.answers[f"GET /v1/{JOB['name']}"] = JOB
    assert homefire("trainer", "get", name).json == JOB


def test_an_error_of_the_server_is_shown_with_its_hint_once(homefire, control):
    outcome = homefire("deployment", "get", "nope")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "error: no such thing\nhint: look\n"


def test_delete_needs_a_yes_from_somebody(homefire, control):
    outcome = homefire("trainer", "delete", "job-1")
    assert outcome.status == 1
    assert "hint: add --yes" in outcome.err
    assert not [seen for seen in control.seen if seen.startswith("DELETE")]


def test_delete_with_yes(homefire, control):
    control.answers[f"DELETE /v1/{JOB['name']}"] = {}
    assert homefire("trainer", "delete", "job-1", "--yes").out == "trainer job job-1 deleted\n"
    assert control.seen[-1] == f"DELETE /v1/{JOB['name']}"


def test_a_checkpoint_is_deleted_when_asked_twice(homefire, control):
    path = f"/v1/{JOB['name']}/checkpoints/step_1"
    control.answers[f"DELETE {path}"] = {}
    words = ("checkpoint", "delete", "step_1", "--job", "job-1")
    assert "add --yes" in homefire(*words).err
    assert homefire(*words, "--yes").out == "checkpoint step_1 deleted\n"
    assert [seen for seen in control.seen if seen.startswith("DELETE")] == [f"DELETE {path}"]


def test_what_cannot_be_deleted_says_why(homefire, control):
    outcome = homefire("shape", "delete", "tiny-full", "--yes")
    assert outcome.status == 1
    assert "generated from what this machine has" in outcome.err
    assert control.seen == []


def row(name: str, kind: str, parent: str | None = None) -> dict:
    return {
        "name": f"{JOB['name']}/checkpoints/{name}",
        "createTime": "2026-01-31T12:00:00Z",
        "updateTime": "2026-01-31T12:00:00Z",
        "checkpointType": "CHECKPOINT_TYPE_INFERENCE_BASE",
        "promotable": True,
        "step": 3,
        "sizeBytes": 2048,
        "digest": "f" * 64,
        "parent": parent,
        "kind": kind,
    }


@pytest.fixture
def checkpoints(control):
    control.answers[f"GET /v1/{JOB['name']}/checkpoints"] = {
        "checkpoints": [row("step_1", "base"), row("step_2", "delta", "step_1")]
    }
    control.answers[f"GET /v1/{JOB['name']}/lineage"] = {
        "job": "job-1",
        "nodes": [
            {"id": "snapshot:step_1", "kind": "snapshot"},
            {"id": "h1", "kind": "hot_load", "attributes": {"deployment": "serving", "ok": True}},
            {"id": "h2", "kind": "hot_load", "attributes": {"deployment": "broken", "ok": False}},
            {
                "id": "e1",
                "kind": "evaluation",
                "attributes": {"name": "held-out", "scores": {"reward": 0.7812}},
            },
        ],
        "edges": [
            {"source": "snapshot:step_1", "target": "h1", "kind": "loaded"},
            {"source": "snapshot:step_1", "target": "h2", "kind": "loaded"},
            {"source": "snapshot:step_1", "target": "e1", "kind": "evaluated"},
        ],
    }
    return control


def test_checkpoints_show_what_became_of_them(homefire, checkpoints):
    lines = homefire("checkpoint", "list", "--job", "job-1").out.splitlines()
    (first,) = [line for line in lines if line.split()[:1] == ["step_1"]]
    (second,) = [line for line in lines if line.split()[:1] == ["step_2"]]
    assert first.split()[1:6] == ["base", "3", "-", "2.0", "KiB"]
    assert "serving, broken (failed)" in first
    assert "held-out: reward 0.781" in first
    assert second.split()[1:4] == ["delta", "3", "step_1"]


def test_checkpoints_as_json_carry_the_lineage(homefire, checkpoints):
    shown = homefire("checkpoint", "list", "--job", "job-1", "--json").json
    assert [row["kind"] for row in shown["checkpoints"]] == ["base", "delta"]
    assert len(shown["lineage"]["edges"]) == 3


def test_a_checkpoint_that_does_not_exist_lists_those_that_do(homefire, checkpoints):
    assert homefire("checkpoint", "get", "step_2", "--job", "job-1").json["parent"] == "step_1"
    outcome = homefire("checkpoint", "get", "nope", "--job", "job-1")
    assert outcome.err.endswith("hint: it has: step_1, step_2\n")


def test_checkpoint_list_without_a_job_is_wrong_usage(homefire):
    outcome = homefire("checkpoint", "list")
    assert outcome.status == 2
    assert "--job" in outcome.err


def test_status_shows_jobs_weights_and_capacity(homefire, control):
    control.answers["GET /v1/homefire/status"] = STATUS
    shown = homefire("status").out
    assert "PENDING" in shown
    assert "needs 2 threads" in shown
    assert "step_1" in shown
    assert "0123456789ab" in shown
    assert "loading step_2" in shown
    assert "3 of 4 engine threads, 1.5 KiB of 1.0 GiB memory" in shown
    assert f"waiting for room: {JOB['name']}" in shown


def test_status_shows_training_runs_and_whether_their_clients_are_there(homefire, control):
    run = {"job": "pool-1", "baseModel": "tiny", "sessionName": "mine"}
    runs = [
        {**run, "run": "ts-a:train:0", "loraRank": 8, "silentS": 5.0},
        {**run, "run": "ts-b:train:0", "loraRank": 0, "silentS": 500.0},
    ]
    control.answers["GET /v1/homefire/status"] = {**STATUS, "runs": runs}
    shown = homefire("status").out
    assert re.search(r"ts-a:train:0 .*mine .*pool-1 .*tiny .*8 .*there", shown)
    assert re.search(r"ts-b:train:0 .*full .*silent for 500 s", shown)


@pytest.mark.parametrize("named", ["ts-0a", "ts-0a:train:3"])
def test_a_session_is_finished_when_asked_twice(homefire, control, named):
    path = "/api/v1/sessions/ts-0a/finish"
    control.answers[f"POST {path}"] = {}
    assert "add --yes" in homefire("session", "finish", named).err
    assert homefire("session", "finish", named, "--yes").out == "session ts-0a finished\n"
    assert [seen for seen in control.seen if seen.startswith("POST")] == [f"POST {path}"]


def test_status_as_json_is_the_report(homefire, control):
    control.answers["GET /v1/homefire/status"] = STATUS
    assert homefire("status", "--json").json == STATUS


def test_a_server_that_does_not_answer_is_named_with_the_way_to_start_it(homefire, publish):
    publish("http://127.0.0.1:1")
    outcome = homefire("status")
    assert outcome.status == 1
    assert "nothing answers at http://127.0.0.1:1" in outcome.err
    assert "hint: start it with `homefire up" in outcome.err


def test_logs_of_a_job_come_from_control(homefire, control):
    control.answers["GET /v1/homefire/logs/job-1"] = lambda query: {
        "name": "job-1",
        "lines": [f"the last {query['tail']} lines"],
    }
    assert homefire("logs", "job-1", "--tail", "3").out == "the last 3 lines\n"


def test_logs_of_control_are_read_without_it(homefire, home):
    (home.run / "control.log").write_text("one\ntwo\nthree\n")
    assert homefire("logs", "control", "--tail", "2").out == "two\nthree\n"
    assert homefire("logs", "gateway", "--json").json == {"name": "gateway", "lines": []}


def test_sizes_are_written_for_people():
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.0 TiB",
    ]


def status_with(pid: int | None) -> dict:
    return {**STATUS, "jobs": [{**STATUS["jobs"][0], "pid": pid}]}


def test_pause_waits_until_the_processes_have_ended(homefire, control):
    paused = {**JOB, "state": "JOB_STATE_PAUSED"}
    pids = iter([7, None])
    control.answers[f"POST /v1/{JOB['name']}:pause"] = paused
    control.answers[f"GET /v1/{JOB['name']}"] = paused
    control.answers["GET /v1/homefire/status"] = lambda _: status_with(next(pids))
    outcome = homefire("trainer", "pause", "job-1")
    assert (outcome.status, outcome.out) == (0, "job-1: PAUSED ([not markup])\n")
    assert next(pids, "asked twice") == "asked twice"


def test_resume_waits_until_the_trainer_runs_and_says_when_it_does_not(homefire, control):
    states = iter(["JOB_STATE_CREATING", "JOB_STATE_RUNNING", "JOB_STATE_FAILED"])
    control.answers[f"POST /v1/{JOB['name']}:resume"] = {**JOB, "state": "JOB_STATE_PENDING"}
    control.answers[f"GET /v1/{JOB['name']}"] = lambda _: {**JOB, "state": next(states)}
    assert homefire("trainer", "resume", JOB["name"]).status == 0
    assert homefire("trainer", "resume", "job-1").status == 1


def scaled(state: str, ready: int, wanted: int, maximum: int = 1) -> dict[str, object]:
    return {
        "name": "accounts/local/deployments/serving",
        "state": state,
        "maxReplicaCount": maximum,
        "desiredReplicaCount": wanted,
        "replicaStats": {"readyReplicaCount": ready},
        "status": {"message": "no room: 3 of 2 threads"},
    }


def test_scaling_raises_the_maximum_where_needed_and_waits(homefire, control):
    path = "/v1/accounts/local/deployments/serving"
    looks = iter([scaled("READY", 1, 1), scaled("UPDATING", 1, 3), scaled("READY", 3, 3)])
    control.answers[f"GET {path}"] = lambda query: next(looks)
    control.answers[f"PATCH {path}"] = scaled("READY", 1, 1, maximum=3)
    control.answers[f"PATCH {path}:scale"] = scaled("UPDATING", 1, 3)
    outcome = homefire("deployment", "scale", "serving", "3")
    assert (outcome.status, outcome.out) == (0, "serving: READY, 3 of 3 replicas ready\n")
    assert [json.loads(body) for body in control.bodies] == [
        {"maxReplicaCount": 3},
        {"replicaCount": 3},
    ]


def test_scaling_without_waiting_says_what_is_missing(homefire, control):
    path = "/v1/accounts/local/deployments/serving"
    control.answers[f"GET {path}"] = scaled("READY", 1, 1, maximum=2)
    control.answers[f"PATCH {path}:scale"] = scaled("UPDATING", 1, 2)
    outcome = homefire("deployment", "scale", "serving", "2", "--no-wait")
    assert outcome.out == "serving: UPDATING, 1 of 2 replicas ready (no room: 3 of 2 threads)\n"
