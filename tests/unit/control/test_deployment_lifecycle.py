"""The deployment's transition table, its replicas and their weights, as pure decisions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from homefire.control.db.rows import (
    BaseModel,
    DeploymentConfig,
    DeploymentRow,
    DesiredWeights,
    Need,
    ReplicaRow,
    Supervision,
)
from homefire.control.lifecycle import (
    DEPLOYMENT_TRANSITIONS,
    AdmitReplica,
    AdvanceDeployment,
    Bury,
    DeploymentEvent,
    Dismiss,
    Launch,
    MarkCaughtUp,
    MarkReady,
    OnReplica,
    RemoveReplica,
    SeenReplica,
    SignalHotLoad,
    Stop,
    WaitUntil,
    decide_deployment,
    deployment_after,
    has_settled_weights,
    hot_load_error,
    serves,
)
from homefire.control.supervision import CRASH_LIMIT
from homefire.foundation.process import ProcessId
from homefire.launch import ProcessRecord
from homefire.wire.errors import FailedPrecondition
from homefire.wire.internal import HotLoadStage, ReplicaStatus
from homefire.wire.resources import DeploymentState
from homefire.wire.specs import Upstream

NOW = 1000.0
RECORD = ProcessRecord(
    name="replica d1/0",
    nonce="n",
    listen=Upstream("s", "x"),
    spec_file="spec.json",
    log_file="log",
    process=ProcessId(1, 1),
    boot="b",
    started_at=0.0,
)
WANTED = DesiredWeights(identity="step_1", generation=3)
MakeDeployment = Callable[..., DeploymentRow]


@pytest.fixture
def make_deployment() -> MakeDeployment:
    def make(
        state: DeploymentState, *, num_replicas: int = 1, desired: DesiredWeights | None = None
    ) -> DeploymentRow:
        model = BaseModel(name="m", directory="/m", tokenizer_id="/m", max_context_length=8)
        config = DeploymentConfig(
            base_model=model,
            need=Need(1, 1),
            num_replicas=num_replicas,
            min_replica_count=0,
            max_replica_count=num_replicas,
            max_context_length=8,
        )
        return DeploymentRow(
            id="d1",
            account="local",
            state=state,
            message="",
            config=config,
            desired=desired or DesiredWeights(),
            purge=False,
            ledger_since=0.0,
            created_at=0.0,
            updated_at=0.0,
        )

    return make


def replica(number: int = 0, *, leaving: bool = False, **supervision: Any) -> ReplicaRow:
    return ReplicaRow(
        deployment="d1",
        number=number,
        supervision=Supervision(**supervision),
        leaving=leaving,
    )


def seen(identity: str | None = None, *, version: int = 1, **fields: Any) -> SeenReplica:
    view = {
        name: fields.pop(name)
        for name in ("signalled", "signalled_at_version", "refusal", "signal_after")
        if name in fields
    }
    status = {"ready": True, "digest": "", **fields}
    return SeenReplica(
        status=ReplicaStatus(version=version, nonce="n", identity=identity, **status), **view
    )


def decide(deployment: DeploymentRow, *pairs: tuple[ReplicaRow, SeenReplica]) -> list[Any]:
    replicas = [row for row, _ in pairs]
    views = {row.number: view for row, view in pairs}
    return list(decide_deployment(deployment, replicas, views, now=NOW))


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(DeploymentState, DeploymentEvent))
)
def test_every_pair_of_state_and_event_is_a_transition_or_refused(
    make_deployment: MakeDeployment, state: DeploymentState, event: DeploymentEvent
) -> None:
    row = make_deployment(state)
    if (state, event) in DEPLOYMENT_TRANSITIONS:
        assert deployment_after(row, event) is DEPLOYMENT_TRANSITIONS[state, event]
    else:
        with pytest.raises(FailedPrecondition):
            deployment_after(row, event)


@pytest.mark.parametrize(
    "state", [DeploymentState.CREATING, DeploymentState.READY, DeploymentState.UPDATING]
)
def test_missing_replicas_are_admitted(
    make_deployment: MakeDeployment, state: DeploymentState
) -> None:
    row = make_deployment(state, num_replicas=2)
    assert [a for a in decide(row) if isinstance(a, AdmitReplica)] == [
        AdmitReplica(0),
        AdmitReplica(1),
    ]


def test_an_admitted_replica_is_started_watched_and_caught_up_before_the_deployment_is_ready(
    make_deployment: MakeDeployment,
) -> None:
    creating = make_deployment(DeploymentState.CREATING)
    assert decide(creating, (replica(), SeenReplica())) == [OnReplica(0, Launch())]
    started = replica(process=RECORD)
    assert decide(creating, (started, SeenReplica())) == []
    assert decide(creating, (started, seen(ready=False))) == []
    assert decide(creating, (started, seen())) == [OnReplica(0, MarkReady())]
    ready = replica(process=RECORD, ready_at=NOW)
    assert decide(creating, (ready, seen())) == [MarkCaughtUp(0)]
    serving = replica(process=RECORD, ready_at=NOW, caught_up=True)
    assert decide(creating, (serving, seen())) == [AdvanceDeployment(DeploymentEvent.SETTLED)]


def test_a_replica_that_comes_late_is_told_the_desired_weights_before_it_counts(
    make_deployment: MakeDeployment,
) -> None:
    row = make_deployment(DeploymentState.READY, desired=WANTED)
    late = replica(process=RECORD, ready_at=NOW)
    assert decide(row, (late, seen(None))) == [SignalHotLoad(0)]
    assert decide(row, (late, seen(None, signalled=3))) == []
    assert decide(row, (late, seen("step_1", signalled=3))) == [MarkCaughtUp(0)]


def test_a_new_signal_is_passed_on_even_to_a_replica_that_was_told_an_older_one(
    make_deployment: MakeDeployment,
) -> None:
    row = make_deployment(DeploymentState.READY, desired=WANTED)
    serving = replica(process=RECORD, ready_at=NOW, caught_up=True)
    assert decide(row, (serving, seen("step_0", signalled=2))) == [SignalHotLoad(0)]


def test_a_replica_on_its_way_to_other_weights_is_told_even_if_it_still_serves_the_wanted_ones(
    make_deployment: MakeDeployment,
) -> None:
    row = make_deployment(DeploymentState.READY, desired=WANTED)
    serving = replica(process=RECORD, ready_at=NOW, caught_up=True)
    loading = seen("step_1", stage=HotLoadStage.LOADING, target="step_9", signalled=2)
    assert decide(row, (serving, loading)) == [SignalHotLoad(0)]


def test_a_replica_that_could_not_be_told_is_told_again_later(
    make_deployment: MakeDeployment,
) -> None:
    row = make_deployment(DeploymentState.READY, desired=WANTED)
    serving = replica(process=RECORD, ready_at=NOW, caught_up=True)
    assert decide(row, (serving, seen(None, signal_after=NOW + 1))) == [WaitUntil(NOW + 1)]


def test_an_error_counts_only_for_this_snapshot_this_signal_and_after_it() -> None:
    def failed(**changes: Any) -> SeenReplica:
        fields = {
            "stage": HotLoadStage.ERROR,
            "target": "step_1",
            "error": "damaged",
            "version": 8,
            "signalled": 3,
            "signalled_at_version": 7,
        }
        return seen("step_0", **{**fields, **changes})

    assert hot_load_error(WANTED, failed()) == "damaged"
    assert has_settled_weights(WANTED, failed())
    for other in ({"target": "step_0"}, {"signalled": 2}, {"version": 7}):
        assert hot_load_error(WANTED, failed(**other)) is None, other
        assert not has_settled_weights(WANTED, failed(**other)), other


def test_a_replica_that_refuses_the_signal_has_failed_to_load() -> None:
    view = seen("step_0", signalled=3, refusal="not in the store")
    assert hot_load_error(WANTED, view) == "not in the store"


def test_dead_replicas_are_buried_and_started_again(make_deployment: MakeDeployment) -> None:
    row = make_deployment(DeploymentState.READY)
    dead = SeenReplica(ended="exited with 1")
    assert decide(row, (replica(process=RECORD), dead)) == [OnReplica(0, Bury("exited with 1"))]
    assert decide(row, (replica(not_before=NOW + 2), SeenReplica())) == [WaitUntil(NOW + 2)]


def test_a_deployment_fails_when_its_only_replica_gave_up_but_not_while_another_serves(
    make_deployment: MakeDeployment,
) -> None:
    lost = replica(restarts=CRASH_LIMIT, failure="exited with 1:\nboom")
    alone = make_deployment(DeploymentState.CREATING)
    (action,) = decide(alone, (lost, SeenReplica()))
    assert action.event is DeploymentEvent.FAILED
    assert "boom" in action.message
    pair = make_deployment(DeploymentState.UPDATING, num_replicas=2)
    serving = replica(1, process=RECORD, ready_at=NOW, caught_up=True)
    assert decide(pair, (lost, SeenReplica()), (serving, seen())) == [
        AdvanceDeployment(DeploymentEvent.SETTLED)
    ]


@pytest.mark.parametrize("state", [DeploymentState.DELETING, DeploymentState.FAILED])
def test_replicas_of_a_deployment_that_is_not_live_are_dismissed_stopped_and_removed(
    make_deployment: MakeDeployment, state: DeploymentState
) -> None:
    row = make_deployment(state)
    assert decide(row, (replica(process=RECORD), seen())) == [Dismiss(0)]
    assert decide(row, (replica(leaving=True, process=RECORD), seen())) == [OnReplica(0, Stop())]
    assert decide(row, (replica(leaving=True), SeenReplica())) == [RemoveReplica(0)]


def test_deletion_is_over_when_no_replica_is_left(make_deployment: MakeDeployment) -> None:
    row = make_deployment(DeploymentState.DELETING)
    assert decide(row) == [AdvanceDeployment(DeploymentEvent.STOPPED)]


def test_scaled_to_zero_is_ready_with_nothing(make_deployment: MakeDeployment) -> None:
    row = make_deployment(DeploymentState.UPDATING, num_replicas=0)
    assert decide(row) == [AdvanceDeployment(DeploymentEvent.SETTLED)]


def test_only_replicas_beyond_the_wanted_number_are_dismissed(
    make_deployment: MakeDeployment,
) -> None:
    row = make_deployment(DeploymentState.UPDATING, num_replicas=1)
    first = replica(0, process=RECORD, ready_at=NOW, caught_up=True)
    second = replica(1, process=RECORD, ready_at=NOW, caught_up=True)
    assert decide(row, (first, seen()), (second, seen())) == [Dismiss(1)]


def test_other_weights_under_the_wanted_name_are_not_the_wanted_weights():
    wanted = DesiredWeights(identity="step_1", digest="right", generation=3)
    for digest, settled in (("right", True), ("of another job", False)):
        view = seen("step_1", digest=digest)
        assert view.status is not None
        assert serves(wanted, view.status) is settled
        assert has_settled_weights(wanted, view) is settled
