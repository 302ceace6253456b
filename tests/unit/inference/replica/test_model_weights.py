"""What a completion's `model` may name of a root job: the base model and everything that it saved."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homefire.control.lifecycle import SeenReplica
from homefire.control.tinker.parking import replica_activity
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.wire.specs import ReplicaSpec
from unit.inference.canaries import Snapshots, adapter_canary
from unit.inference.tinker_caller import SAMPLER, sampled, session

RUN = "ts-1:train:0"
OTHER = "ts-2:train:0"
FIELDS = {"prompt": [1, 2], "max_tokens": 4, "temperature": 0, "return_token_ids": True}


def path_of(run: str, name: str) -> str:
    return f"tinker://{run}/sampler_weights/{name}"


def tokens_of(answered: Any) -> list[int]:
    assert answered.status == 200, answered.body
    return answered.json()["choices"][0]["token_ids"]


async def test_the_base_and_snapshots_of_two_runs_answer_together_each_its_own(
    start_replica: Any, snapshots: Snapshots
) -> None:
    manifest = snapshots.adapter(11, run=RUN, name="step_1")
    snapshots.adapter(22, run=OTHER, name="step_1")
    async with start_replica(**SAMPLER) as caller:
        base = tokens_of(await caller.complete(model="m@base", **FIELDS))
        models = ["job-1-sampler", path_of(RUN, "step_1"), path_of(OTHER, "step_1")] * 3
        answers = await asyncio.gather(*(caller.complete(model=m, **FIELDS) for m in models))
        tinker = await sampled(
            caller, [1, 2], sampling_session_id=session(run=RUN, name="step_1"), seq_id=0
        )
    assert [tokens_of(answer) for answer in answers] == [base, [11] * 4, [22] * 4] * 3
    one = answers[1]
    assert one.json()["model"] == path_of(RUN, "step_1")
    assert one.headers["x-homefire-weights"] == f"step_1; sha={manifest.digest}"
    assert tinker["homefire"]["weights"]["digest"] == manifest.digest


@pytest.mark.parametrize("kind", ["complete", "chat", "generate", "stream"])
async def test_every_route_serves_a_full_snapshot_and_the_base_again(
    start_replica: Any, snapshots: Snapshots, kind: str
) -> None:
    snapshots.full(65, run=RUN, name="step_1")
    model = path_of(RUN, "step_1")
    async with start_replica(**SAMPLER) as caller:
        match kind:
            case "complete":
                answered = await caller.complete(model=model, **FIELDS)
            case "chat":
                messages = [{"role": "user", "content": "hi"}]
                answered = await caller.chat(model=model, **(FIELDS | {"messages": messages}))
            case "generate":
                body = {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 4}}
                answered = await caller.post("/inference/v1/generate", body)
            case _:
                answered = await caller.complete(model=model, stream=True, **FIELDS)
        base = await caller.complete(model="job-1-sampler", **FIELDS)
    if kind == "stream":
        events = answered.events()
        assert [t for e in events for c in e["choices"] for t in c["token_ids"]] == [65] * 4
        assert {event["model"] for event in events} == {model}
    else:
        assert tokens_of(answered) == [65] * 4
    assert base.json()["homefire"]["weights"]["identity"] == "base"


async def test_a_snapshot_saved_again_under_its_name_is_the_new_one(
    start_replica: Any, snapshots: Snapshots
) -> None:
    model = path_of(RUN, "latest")
    async with start_replica(**SAMPLER) as caller:
        for token in (11, 22):
            manifest = snapshots.adapter(token, run=RUN, name="latest")
            answered = await caller.complete(model=model, **FIELDS)
            assert tokens_of(answered) == [token] * 4
            assert answered.json()["homefire"]["weights"]["digest"] == manifest.digest
            snapshots.store.delete(snapshots.run_key(RUN, "latest"))


async def test_an_identity_names_the_one_snapshot_that_has_it(
    start_replica: Any, snapshots: Snapshots
) -> None:
    snapshots.adapter(11, run=RUN, name="step_1")
    for run in (RUN, OTHER):
        snapshots.adapter(22, run=run, name="step_2")
    model = "accounts/local/models/tiny"
    async with start_replica(**SAMPLER) as caller:
        found = await caller.complete(model=f"{model}@step_1", **FIELDS)
        several = await caller.complete(model=f"{model}@step_2", **FIELDS)
        none = await caller.complete(model=f"{model}@step_3", **FIELDS)
    assert tokens_of(found) == [11] * 4
    assert found.json()["model"] == f"{model}@step_1"
    assert several.json()["error"]["code"] == "invalid_argument"
    assert path_of(OTHER, "step_2") in several.json()["error"]["hint"]
    assert none.json()["error"]["code"] == "unknown_snapshot"


async def test_a_sampler_that_is_asked_between_two_looks_is_seen_to_be_in_use(
    start_replica: Any,
) -> None:
    async with start_replica(**SAMPLER) as caller:
        before = await caller.status()
        await caller.complete(model="job-1-sampler", **FIELDS)
        after = await caller.status()
    assert (before.running, after.running) == (0, 0)
    seen = [replica_activity([SeenReplica(status=status)]) for status in (before, after)]
    assert seen[0].count != seen[1].count


async def test_a_client_that_leaves_lets_go_of_the_weights(
    start_replica: Any, snapshots: Snapshots
) -> None:
    """Full weights serve in turns: one that was never left would keep the next from its own."""
    snapshots.full(65, run=RUN, name="step_1")
    endless = FIELDS | {"max_tokens": 1 << 21, "ignore_eos": True, "stream": True}
    async with start_replica(**SAMPLER, max_context_length=1 << 22) as caller:
        body = {"model": path_of(RUN, "step_1"), **endless}
        await caller.post("/v1/completions", body, hang_up=lambda received: len(received) > 0)
        base = await caller.complete(model="job-1-sampler", **FIELDS)
    assert base.json()["homefire"]["weights"]["identity"] == "base"


@pytest.mark.parametrize(
    ("model", "code"),
    [
        (path_of(RUN, "none"), "unknown_snapshot"),
        (f"tinker://{RUN}/weights/step_1", "wrong_checkpoint_kind"),
        ("tinker://nonsense", "invalid_argument"),
    ],
)
async def test_what_is_no_snapshot_is_refused_by_name(
    start_replica: Any, model: str, code: str
) -> None:
    async with start_replica(**SAMPLER) as caller:
        answered = await caller.complete(model=model, **FIELDS)
    assert (answered.status, answered.json()["error"]["code"]) == (400, code)


async def test_an_ordinary_deployment_samples_no_run(start_replica: Any) -> None:
    async with start_replica() as caller:
        answered = await caller.complete(model=path_of(RUN, "step_1"), **FIELDS)
    assert (answered.status, answered.json()["error"]["code"]) == (400, "invalid_argument")


def open_unadapted(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
    """Computes without the first adapter that it is given, whose digest is right."""
    engine: Any = open_engine(spec, publish)
    network, seen = engine._network, []
    add = network.add_adapter

    def add_adapter(weights: Any) -> str:
        digest = add(weights)
        if not seen:
            network._adapted[weights.served] = network._base
        seen.append(weights.served)
        return digest

    network.add_adapter = add_adapter
    return engine


@pytest.mark.parametrize("kind", ["completion", "tinker"])
async def test_an_adapter_that_does_not_stand_its_canary_is_read_again_for_the_same_request(
    start_replica: Any, snapshots: Snapshots, kind: str
) -> None:
    snapshots.adapter(11, run=RUN, name="step_1", canary=adapter_canary(11))
    async with start_replica(engine=open_unadapted, **SAMPLER) as caller:
        if kind == "completion":
            found = tokens_of(await caller.complete(model=path_of(RUN, "step_1"), **FIELDS))
        else:
            named = session(run=RUN, name="step_1")
            answer = await sampled(caller, [1, 2], sampling_session_id=named, seq_id=0)
            found = answer["sequences"][0]["tokens"]
    assert set(found) == {11}
