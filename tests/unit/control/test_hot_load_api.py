from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from homefire.checkpoints import CheckpointKey
from homefire.foundation.events import EventLog
from homefire.wire.internal import (
    CanaryVerdict,
    HotLoadRequest,
    HotLoadStage,
    SnapshotLocation,
    Transition,
)

PATH = "/hot_load/v1/models/hot_load"
HEADERS = {
    "fireworks-deployment": "accounts/local/deployments/d1",
    "fireworks-model": "accounts/local/models/tiny",
}
JOB = "accounts/local/rlorTrainerJobs/j1"


@pytest.fixture
async def serving(bench: Any, control: Any) -> Any:
    """A deployment that follows a trainer with the snapshots `step_1` and `step_2`."""
    await control.create_job()
    await control.create_deployment(hotLoadTrainerJob=JOB)
    await control.deployment_becomes("READY")
    base = bench.save_snapshot("step_1")
    bench.save_snapshot("step_2", parent=base, step=2)
    return control


async def load(control: Any, identity: Any, *, expect: int = 200, **body: Any) -> Any:
    return await control.call(
        "POST", PATH, {"identity": identity, **body}, headers=HEADERS, expect=expect
    )


async def status(control: Any) -> Any:
    return await control.call("GET", PATH, headers=HEADERS)


async def test_a_replica_is_told_where_the_snapshot_lies(bench: Any, serving: Any) -> None:
    await load(serving, "step_1", reset_prompt_cache=False)
    assert (await status(serving))["replicas"][0]["current_snapshot_identity"] == "step_1"
    assert bench.replica().loads == [
        HotLoadRequest(
            identity="step_1",
            location=SnapshotLocation("local", "j1"),
            digest=bench.store.list("local", "j1")[0].digest,
            reset_prompt_cache=False,
            transition=Transition.DRAIN,
        )
    ]


async def test_the_status_is_held_while_a_load_is_in_progress(bench: Any, serving: Any) -> None:
    replica = bench.replica()
    replica.on_load = lambda asked: replica.say(stage=HotLoadStage.LOADING, target=asked.identity)
    await load(serving, "step_1")
    held = asyncio.create_task(status(serving))

    async def is_loading() -> bool:
        return bool(replica.loads)

    await serving.eventually(is_loading)
    assert not held.done()
    replica.say(
        stage=HotLoadStage.IDLE, identity="step_1", digest=replica.loads[-1].digest, target=None
    )
    assert (await held)["replicas"][0]["loading_state"] == {"stage": "idle"}


async def test_without_patience_the_status_says_what_is_being_loaded(bench: Any) -> None:
    control = await bench.control(hold_s=0.0)
    await control.create_job()
    await control.create_deployment(hotLoadTrainerJob=JOB)
    await control.deployment_becomes("READY")
    bench.save_snapshot("step_1")
    replica = bench.replica()
    replica.on_load = lambda asked: replica.say(stage=HotLoadStage.DRAINING, target=asked.identity)
    await load(control, "step_1")

    async def is_draining() -> bool:
        (shown,) = (await status(control))["replicas"]
        assert shown["current_snapshot_identity"] is None
        assert shown["loading_state"]["target_snapshot_identity"] == "step_1"
        return shown["loading_state"]["stage"] == "draining"

    await control.eventually(is_draining)


async def test_a_failed_load_ends_in_an_error_for_that_snapshot_and_can_be_tried_again(
    bench: Any, serving: Any
) -> None:
    replica = bench.replica()
    replica.on_load = lambda asked: replica.say(
        stage=HotLoadStage.ERROR,
        target=asked.identity,
        error="damaged",
        error_code="digest_mismatch",
        digest="d0",
        canary=CanaryVerdict.PASS,
        attested_by="memory",
    )
    await load(serving, "step_1")
    (shown,) = (await status(serving))["replicas"]
    assert shown == {
        "current_snapshot_identity": None,
        "readiness": True,
        "loading_state": {
            "stage": "error",
            "target_snapshot_identity": "step_1",
            "error": "damaged",
            "error_code": "digest_mismatch",
        },
        "homefire": {"digest": "d0", "canary": "pass", "attested_by": "memory"},
    }
    assert serving.plane.routes.get().deployments["local/d1"].replicas
    report = await serving.call("GET", "/v1/homefire/status")
    assert report["deployments"][0]["replicas"][0]["error"] == "damaged"

    replica.on_load = lambda asked: replica.say(
        stage=HotLoadStage.IDLE, identity=asked.identity, digest=asked.digest, error="", target=None
    )
    await load(serving, "step_1")
    assert (await status(serving))["replicas"][0]["current_snapshot_identity"] == "step_1"
    assert [asked.identity for asked in replica.loads] == ["step_1", "step_1"]


async def test_an_error_from_before_is_not_taken_for_the_answer_to_a_new_signal(
    bench: Any, serving: Any
) -> None:
    replica = bench.replica()
    replica.on_load = lambda asked: replica.say(
        stage=HotLoadStage.ERROR, target=asked.identity, error="damaged"
    )
    await load(serving, "step_1")
    await status(serving)
    replica.on_load = lambda asked: None
    await load(serving, "step_1")
    held = asyncio.create_task(status(serving))

    async def was_told_again() -> bool:
        return len(replica.loads) == 2

    await serving.eventually(was_told_again)
    await serving.plane.reconciler.reconcile()
    assert not held.done()
    replica.say(
        stage=HotLoadStage.IDLE,
        identity="step_1",
        digest=replica.loads[-1].digest,
        error="",
        target=None,
    )
    assert (await held)["replicas"][0]["current_snapshot_identity"] == "step_1"


async def test_an_unknown_snapshot_is_refused_with_what_exists_and_nothing_changes(
    bench: Any, serving: Any
) -> None:
    await load(serving, "step_1")
    await status(serving)
    refused = await load(serving, "step_9", expect=400)
    assert refused["error"]["code"] == "unknown_snapshot"
    assert "'step_2'" in refused["error"]["hint"]
    assert (await status(serving))["replicas"][0]["current_snapshot_identity"] == "step_1"
    assert [asked.identity for asked in bench.replica().loads] == ["step_1"]


async def test_a_train_state_is_refused_as_what_it_is(bench: Any, serving: Any) -> None:
    bench.save_state("state_1")
    refused = await load(serving, "state_1", expect=400)
    assert refused["error"]["code"] == "wrong_checkpoint_kind"


@pytest.mark.parametrize("identity", ["../../etc/passwd", "a/b", "", "x" * 200, "a..b"])
async def test_what_cannot_be_an_identity_is_refused(serving: Any, identity: str) -> None:
    refused = await load(serving, identity, expect=400)
    assert refused["error"]["code"] == "invalid_argument"


async def test_null_and_base_go_back_to_the_base_model(bench: Any, serving: Any) -> None:
    await load(serving, "step_1")
    await status(serving)
    await load(serving, None)
    assert (await status(serving))["replicas"][0]["current_snapshot_identity"] is None
    await load(serving, "base")
    assert (await status(serving))["replicas"][0]["current_snapshot_identity"] is None


async def test_a_replica_that_starts_later_loads_the_desired_snapshot_before_it_is_routed_to(
    bench: Any, serving: Any
) -> None:
    await load(serving, "step_2")
    await status(serving)
    bench.services.replicas_start_ready = False
    first = bench.replica()
    first.process.exit(-9)

    async def is_replaced() -> bool:
        return bench.replica() is not first

    await serving.eventually(is_replaced)
    second = bench.replica()
    second.on_load = lambda asked: second.say(stage=HotLoadStage.LOADING, target=asked.identity)
    second.say(ready=True)

    async def was_told() -> bool:
        return bool(second.loads)

    await serving.eventually(was_told)
    route = serving.plane.routes.get().deployments["local/d1"]
    assert (route.state, route.replicas) == ("READY", [])
    second.say(
        stage=HotLoadStage.IDLE, identity="step_2", digest=second.loads[-1].digest, target=None
    )

    async def is_routed() -> bool:
        return bool(serving.plane.routes.get().deployments["local/d1"].replicas)

    await serving.eventually(is_routed)


async def test_a_late_replica_that_cannot_load_is_not_routed_to_and_the_route_says_why(
    bench: Any, serving: Any
) -> None:
    await load(serving, "step_2")
    await status(serving)
    bench.services.replicas_start_ready = False
    first = bench.replica()
    first.process.exit(-9)

    async def is_replaced() -> bool:
        return bench.replica() is not first

    await serving.eventually(is_replaced)
    second = bench.replica()
    second.on_load = lambda asked: second.say(
        stage=HotLoadStage.ERROR, target=asked.identity, error="the chain is broken"
    )
    second.say(ready=True)

    async def is_explained() -> bool:
        return "the chain is broken" in serving.plane.routes.get().deployments["local/d1"].detail

    await serving.eventually(is_explained)
    assert not serving.plane.routes.get().deployments["local/d1"].replicas


@pytest.mark.parametrize(
    ("configured", "sent"), [("SYNC", "SYNC"), ("ASYNC", "ASYNC"), (None, "DRAIN")]
)
async def test_the_deployments_transition_goes_with_the_signal(
    bench: Any, serving: Any, configured: Any, sent: str
) -> None:
    await serving.call(
        "PATCH",
        "/v1/accounts/local/deployments/d1?updateMask=hot_load_transition_type",
        {"hotLoadTransitionType": configured},
    )
    await load(serving, "step_1", reset_prompt_cache="none")
    await status(serving)
    assert bench.replica().loads[-1].transition == sent
    assert bench.replica().loads[-1].reset_prompt_cache is False


@pytest.mark.parametrize(
    ("signal", "headers", "told"),
    [
        ({}, {}, ("bounded", None)),
        ({"drain": "strict", "drain_timeout_s": 5}, {}, ("strict", 5.0)),
        ({}, {"x-fireworks-hot-load-drain-timeout": "7"}, ("bounded", 7.0)),
        ({"drain_timeout_s": 5}, {"x-fireworks-hot-load-drain-timeout": "7"}, ("bounded", 5.0)),
    ],
)
async def test_how_a_drain_ends_goes_with_the_signal(
    bench: Any, serving: Any, signal: Any, headers: Any, told: Any
) -> None:
    await serving.call("POST", PATH, {"identity": "step_1", **signal}, headers=HEADERS | headers)
    await status(serving)
    asked = bench.replica().loads[-1]
    assert (asked.drain, asked.drain_timeout_s) == told


@pytest.mark.parametrize(
    ("signal", "headers", "field"),
    [
        ({"drain": "never"}, {}, "drain"),
        ({"drain": "strict"}, {}, "drain"),
        ({"drain_timeout_s": -1}, {}, "drain_timeout_s"),
        ({"drain_timeout_s": 1e9}, {}, "drain_timeout_s"),
        ({}, {"x-fireworks-hot-load-drain-timeout": "nan"}, "x-fireworks-hot-load-drain-timeout"),
        ({}, {"x-fireworks-hot-load-drain-timeout": "soon"}, "x-fireworks-hot-load-drain-timeout"),
    ],
)
async def test_a_drain_that_makes_no_sense_is_refused_by_field(
    bench: Any, serving: Any, signal: Any, headers: Any, field: str
) -> None:
    await serving.call(
        "PATCH",
        "/v1/accounts/local/deployments/d1?updateMask=hot_load_transition_type",
        {"hotLoadTransitionType": "ASYNC"},
    )
    refused = await serving.call(
        "POST", PATH, {"identity": "step_1", **signal}, headers=HEADERS | headers, expect=400
    )
    assert field in (refused["error"]["param"] or refused["error"]["message"])
    assert not bench.replica().loads


async def test_a_deployment_that_never_existed_is_a_400_by_name(serving: Any) -> None:
    headers = {"fireworks-deployment": "accounts/local/deployments/nope"}
    for method in ("GET", "POST"):
        refused = await serving.call(
            method, PATH, {"identity": "step_1"}, headers=headers, expect=400
        )
        assert refused["error"]["code"] == "unknown_deployment"
        assert refused["error"]["hint"] == "deployments: d1"
    missing = await serving.call("GET", PATH, expect=400)
    assert missing["error"]["param"] == "fireworks-deployment"


async def test_a_deployment_without_a_trainer_has_nothing_to_load(control: Any) -> None:
    await control.create_deployment()
    refused = await load(control, "step_1", expect=400)
    assert refused["error"]["code"] == "failed_precondition"


async def test_a_trainer_may_name_its_deployment_instead(bench: Any, control: Any) -> None:
    await control.create_deployment()
    await control.create_job(hotLoadDeploymentId="accounts/local/deployments/d1")
    bench.save_snapshot("step_1")
    await load(control, "step_1")
    assert (await status(control))["replicas"][0]["current_snapshot_identity"] == "step_1"


async def test_hot_loading_that_was_switched_off_is_refused(serving: Any) -> None:
    await serving.call("PATCH", "/v1/accounts/local/deployments/d1", {"enableHotLoad": False})
    refused = await load(serving, "step_1", expect=400)
    assert "enableHotLoad" in refused["message"]


async def test_nothing_is_held_for_a_deployment_that_is_scaled_to_zero(serving: Any) -> None:
    await serving.call("PATCH", "/v1/accounts/local/deployments/d1", {"maxReplicaCount": 0})
    await serving.deployment_becomes("READY")
    assert await status(serving) == {"replicas": []}


async def test_a_hot_load_starts_a_deployment_that_was_scaled_to_zero(
    bench: Any, serving: Any
) -> None:
    one = "/v1/accounts/local/deployments/d1"
    await serving.call("PATCH", f"{one}:scale", {"replicaCount": 0})
    await serving.deployment_becomes("READY")
    assert [process.spec.name for process in bench.launcher.running()] == ["trainer j1"]
    await load(serving, "step_2")

    async def is_served() -> bool:
        replicas = (await status(serving))["replicas"]
        return [replica["current_snapshot_identity"] for replica in replicas] == ["step_2"]

    await serving.eventually(is_served)


async def test_the_ledger_is_what_replicas_wrote_and_can_be_cleared(
    bench: Any, serving: Any
) -> None:
    path = "/v1/accounts/local/deployments/d1/ledger"
    log = EventLog(bench.home.replica("d1", 0) / "events.jsonl", bench.clock)
    log.append("started", pid=1)
    log.append("hot_load", identity="step_1", digest="d", ok=True, load_ms=3.0, drain_ms=1.0)
    bench.clock.advance(1.0)
    log.append("hot_load", identity="step_2", digest="", ok=False, error="damaged")
    log.close()
    entries = (await serving.call("GET", path))["entries"]
    assert [(e["identity"], e["ok"], e["error"]) for e in entries] == [
        ("step_1", True, ""),
        ("step_2", False, "damaged"),
    ]
    bench.clock.advance(1.0)
    assert await serving.call("DELETE", path) == {}
    assert (await serving.call("GET", path))["entries"] == []


async def test_a_reply_holds_what_the_client_reads_and_how_far_it_is_proven(serving: Any) -> None:
    await load(serving, "step_1")
    reply = await status(serving)
    assert set(reply) == {"replicas"}
    assert msgspec.json.decode(msgspec.json.encode(reply)) == reply
    assert set(reply["replicas"][0]) == {
        "current_snapshot_identity",
        "readiness",
        "loading_state",
        "homefire",
    }


async def test_weights_of_another_job_under_the_same_name_are_loaded_over(
    bench: Any, serving: Any
) -> None:
    """Ready with the wanted name is what clients wait for, so it must not be said too early."""
    replica = bench.replica()
    replica.say(identity="step_1", digest="of another job")
    replica.on_load = lambda asked: None
    await load(serving, "step_1")

    async def was_told() -> bool:
        return bool(replica.loads)

    await serving.eventually(was_told)
    held = asyncio.create_task(status(serving))
    await serving.plane.reconciler.reconcile()
    assert not held.done()
    replica.say(identity="step_1", digest=replica.loads[-1].digest)
    (shown,) = (await held)["replicas"]
    assert shown["readiness"]
    assert shown["current_snapshot_identity"] == "step_1"


async def test_a_snapshot_that_has_expired_is_not_loaded_and_one_that_is_served_goes_on(
    bench: Any, serving: Any
) -> None:
    await load(serving, "step_1")
    for manifest in bench.store.list("local", "j1"):
        bench.store.expire_at(CheckpointKey.of(manifest), bench.clock.now())
    bench.clock.advance(3600.0)
    refused = await load(serving, "step_2", expect=400)
    assert "has expired" in refused["error"]["message"]
    assert (await status(serving))["replicas"][0]["current_snapshot_identity"] == "step_1"
    pruned = await serving.plane.deletion.prune()
    assert [key.name for key in pruned] == ["step_2"]
