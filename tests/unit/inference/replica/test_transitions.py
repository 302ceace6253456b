"""Hot loads while completions run: what runs goes on or ends, and each answer says which weights made it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homefire.checkpoints.canary import canary_tokens
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish, WeightSet
from homefire.wire.internal import CanaryVerdict, HotLoadStage
from homefire.wire.specs import ReplicaSpec
from unit.inference.caller import Answered
from unit.inference.canaries import Snapshots, canary_of

OTHER, OWN = canary_tokens(320, 32)[1:3]
"""Canary snapshots of these two tokens are told apart by the canary's text."""
ASK = {
    "prompt": [1, 2],
    "max_tokens": 6,
    "temperature": 0,
    "raw_output": True,
    "ignore_eos": True,
}


def labelled(answered: Answered) -> list[tuple[int, str]]:
    """Each token with the weights that the answer names for it, of the only choice."""
    parts = (
        answered.events()
        if answered.headers["content-type"].startswith("text/event-stream")
        else [answered.json()]
    )
    info = parts[-1]["homefire"]
    tokens = parts[-1]["choices"][0]["raw_output"]["completion_token_ids"]
    whole = {"start": 0, "end": len(tokens), **info["weights"]}
    (spans,) = info.get("spans", [[whole]])
    named = [span["identity"] for span in spans for _ in range(span["start"], span["end"])]
    return list(zip(tokens, named, strict=True))


@pytest.mark.parametrize("stream", [False, True])
async def test_an_async_load_moves_what_runs_over_and_names_every_token(
    start_replica: Any, snapshots: Snapshots, stream: bool
) -> None:
    async with start_replica(max_context_length=1 << 22) as caller:
        await caller.hot_load(snapshots.base(5))
        ask = {**ASK, "max_tokens": 20_000, "stream": stream}
        running = asyncio.create_task(caller.complete(**ask))
        await caller.until_running()
        status = await caller.hot_load(snapshots.base(6), transition="ASYNC")
        answered = await running
    assert status.ledger[-1].num_stragglers == 1
    named = labelled(answered)
    assert len(named) == 20_000
    assert {identity for _, identity in named} == {"step-5", "step-6"}
    assert all(identity == f"step-{token}" for token, identity in named)
    assert answered.headers["x-homefire-weights"].startswith("step-5; sha=")
    if stream:
        models = [event["model"].rpartition("@")[2] for event in answered.events()]
        assert models == sorted(models)
        assert set(models) == {"step-5", "step-6"}


async def test_a_drain_out_of_time_moves_the_stragglers_over_and_the_ledger_counts_them(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica(max_context_length=1 << 22) as caller:
        running = asyncio.create_task(caller.complete(**{**ASK, "max_tokens": 20_000}))
        await caller.until_running()
        status = await caller.hot_load(snapshots.base(6), drain_timeout_s=0)
        assert {identity for _, identity in labelled(await running)} == {"base", "step-6"}
    (entry,) = status.ledger
    assert (entry.ok, entry.num_stragglers) == (True, 1)


@pytest.mark.parametrize("named", [{"expect_identity": "step-5"}, {"model": "d@step-5"}])
async def test_who_names_an_identity_gets_tokens_of_no_other(
    start_replica: Any, snapshots: Snapshots, named: dict[str, str]
) -> None:
    async with start_replica(max_context_length=1 << 22) as caller:
        early = await caller.complete(**ASK, **named)
        assert (early.status, early.json()["error"]["param"]) == (412, next(iter(named)))
        assert early.json()["error"]["current_identity"] == "base"
        await caller.hot_load(snapshots.base(5))
        assert labelled(await caller.complete(**ASK, **named)) == [(5, "step-5")] * 6
        long = asyncio.create_task(caller.complete(**{**ASK, "max_tokens": 1 << 21}, **named))
        await caller.until_running()
        await caller.hot_load(snapshots.base(6), transition="ASYNC")
        cut = await long
    assert (cut.status, cut.json()["error"]["code"]) == (412, "weights_mismatch")


async def test_two_names_that_differ_are_refused_by_field(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(5))
        refused = await caller.complete(**ASK, model="d@step-5", expect_identity="step-6")
    assert (refused.status, refused.json()["error"]["param"]) == (412, "expect_identity")


async def test_the_status_says_what_the_canary_said(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        told = await caller.hot_load(snapshots.base(OWN, canary_of(OWN, parent=OTHER)))
        same = await caller.hot_load(snapshots.base(OTHER, canary_of(OTHER, parent=OTHER)))
        none = await caller.hot_load(snapshots.base(7))
        await caller.hot_load("step-404")
        after = await caller.status()
    assert told.canary is CanaryVerdict.PASS
    assert same.canary is CanaryVerdict.INCONCLUSIVE
    assert none.canary is after.canary is CanaryVerdict.ABSENT
    assert {status.attested_by for status in (told, same, none)} == {"memory"}
    assert [entry.canary for entry in after.ledger] == ["pass", "inconclusive", "absent", "absent"]


async def test_weights_that_answer_otherwise_are_never_served(
    start_replica: Any, snapshots: Snapshots
) -> None:
    """The store's bytes are right by every digest, and its canary is another's: what a broken kernel gives."""
    wrong = canary_of(OTHER, parent=None)
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(5))
        status = await caller.hot_load(snapshots.base(OWN, wrong))
        assert labelled(await caller.complete(**ASK)) == [(5, "step-5")] * 6
    assert (status.stage, status.error_code) == (HotLoadStage.ERROR, "canary_mismatch")
    assert (status.ready, status.identity, status.target) == (True, "step-5", f"step-{OWN}")
    tries = [(e.ok, e.canary, e.reseeded, e.error_code) for e in status.ledger[1:]]
    mismatch = (False, CanaryVerdict.MISMATCH)
    assert tries == [
        (*mismatch, False, "canary_mismatch"),
        (*mismatch, True, "canary_mismatch"),
    ]


async def test_what_was_wrong_in_place_is_read_again_from_its_base(
    start_replica: Any, snapshots: Snapshots
) -> None:
    def open_forgetful(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
        """Its second installation leaves the weights as they were."""
        engine: Any = open_engine(spec, publish)
        install, asked = engine._network.install, list[WeightSet]()

        def forgetting(weights: WeightSet) -> str:
            asked.append(weights)
            return install(asked[0] if len(asked) == 2 else weights)

        engine._network.install = forgetting
        return engine

    snapshots.base(5)
    async with start_replica(engine=open_forgetful) as caller:
        await caller.hot_load("step-5")
        status = await caller.hot_load(snapshots.delta(6, parent=5))
        assert labelled(await caller.complete(**ASK)) == [(6, "step-6")] * 6
    assert (status.stage, status.error) == (HotLoadStage.IDLE, "")
    assert [(entry.ok, entry.reseeded) for entry in status.ledger] == [
        (True, False),
        (False, False),
        (True, True),
    ]
    assert "should have digest" in status.ledger[1].error
