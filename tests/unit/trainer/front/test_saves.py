"""What is saved for whom: by name, for a sampling session, and to be taken elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey, Manifest
from homefire.foundation.clock import ManualClock
from homefire.wire.engine import SaveSampler
from homefire.wire.pooled import ephemeral_name, is_ephemeral, parse_sampling_session
from homefire.wire.specs import TrainerMode

SESSION = "ts-0123456789abcdef"
RUN = f"{SESSION}:train:0"
SAMPLER = "pool-1-sampler"
POOL = {"pooled": True, "mode": TrainerMode.LORA, "job": "pool-1", "sampler": SAMPLER}


@pytest.fixture
def start_pool(start_front) -> Callable[..., Any]:
    return lambda **options: start_front(**{**POOL, **options})


async def create(client, seq: int = 0, *, rank: int = 4) -> str:
    return (await client.create(SESSION, seq, lora_config={"rank": rank}))["model_id"]


def manifest(client, family: CheckpointFamily, name: str, *, slot: str = RUN) -> Manifest:
    spec = client.front.spec
    return client.front.store.manifest(CheckpointKey(spec.account, spec.job, slot, family, name))


async def test_an_ephemeral_save_answers_a_session_that_says_what_it_samples(start_pool) -> None:
    clock = ManualClock()
    async with start_pool(clock=clock) as client:
        model = await create(client)
        await client.train(model, 1, 1)
        saved = await client.call(
            "save_weights_for_sampler", model, 3, sampling_session_seq_id=7, kind="inflight"
        )
        assert "path" not in saved
        session = parse_sampling_session(saved["sampling_session_id"])
        assert (session.sampler, session.run) == (SAMPLER, model)
        assert is_ephemeral(session.snapshot)
        kept = manifest(client, CheckpointFamily.SAMPLER, session.snapshot)
        assert kept.digest == saved["digest"] == await client.digest(model)
        assert kept.expires_at == clock.now() + 24 * 3600
        (event,) = client.events("sampling_session_created")
        assert event["sampling_session_id"] == session.id
        assert (event["session_id"], event["model_id"]) == (SESSION, model)
        assert event["identity"] == session.snapshot


async def test_a_repeated_ephemeral_save_is_one_snapshot_and_one_session(
    start_pool, orders
) -> None:
    """Also when the engine dies behind the commit."""
    body = {"model_id": RUN, "seq_id": 1, "sampling_session_seq_id": 0}
    async with start_pool() as client:
        await create(client)
        posts = [(await client.post("save_weights_for_sampler", **body)).json() for _ in range(3)]
        assert posts[0] == posts[1] == posts[2]
        first = await client.result(posts[0]["request_id"])
    orders.dies_at = [SaveSampler]
    async with start_pool(job="pool-again", orders=orders) as client:
        await create(client)
        again = await client.call("save_weights_for_sampler", RUN, 1, sampling_session_seq_id=0)
        assert again["sampling_session_id"] == first["sampling_session_id"]
        assert len(client.events("sampling_session_created")) == 1


async def test_a_client_gives_no_snapshot_a_name_that_no_list_shows(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        name = ephemeral_name(1, "0123abcd")
        refused = await client.call("save_weights_for_sampler", model, 1, path=name)
        assert refused["error_class"] == "invalid_argument"
        assert name in refused["error"]


async def test_each_ephemeral_save_keeps_what_the_weights_were_then(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        digests = []
        for number in range(3):
            await client.train(model, 3 * number + 1, 1)
            saved = await client.call(
                "save_weights_for_sampler",
                model,
                3 * number + 3,
                sampling_session_seq_id=number,
                ttl_seconds=3600,
            )
            session = parse_sampling_session(saved["sampling_session_id"])
            digests.append(manifest(client, CheckpointFamily.SAMPLER, session.snapshot).digest)
        assert len(set(digests)) == 3


async def test_a_full_run_saves_a_base_for_every_session(start_front) -> None:
    async with start_front(**{**POOL, "mode": TrainerMode.FULL}) as client:
        model = await create(client, rank=0)
        for number in range(2):
            saved = await client.call(
                "save_weights_for_sampler", model, number + 1, sampling_session_seq_id=number
            )
            assert saved["kind"] == "base"


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        ({}, "invalid_argument", "neither path nor sampling_session_seq_id"),
        ({"path": "a", "kind": "live"}, "invalid_argument", "kind 'live'"),
        ({"path": "a", "ttl_seconds": 0}, "invalid_argument", "ttl_seconds is 0"),
        ({"path": "a/b"}, "invalid_argument", "path 'a/b'"),
        ({"path": "a", "checkpoint_type": "odd"}, "invalid_argument", "'odd'"),
    ],
)
async def test_a_save_that_cannot_be_meant_fails_in_its_place(
    start_pool, asked: dict[str, Any], code: str, message: str
) -> None:
    async with start_pool() as client:
        model = await create(client)
        failed = await client.call("save_weights_for_sampler", model, 1, **asked)
        assert (failed["error_class"], failed["category"]) == (code, "user")
        assert message in failed["error"]
        await client.train(model, 2, 1)


async def test_a_name_is_taken_once_unless_overwrite_is_asked_for(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        await client.call("save_weights", model, 1, path="s", user_metadata={"round": "1"})
        await client.train(model, 2, 1)
        refused = await client.call("save_weights", model, 4, path="s")
        assert (refused["error_class"], refused["category"]) == ("duplicate_checkpoint", "user")
        kept = manifest(client, CheckpointFamily.STATE, "s")
        assert (kept.step, kept.metadata) == (0, {"round": "1"})
        taken = {"path": "s", "overwrite": True, "user_metadata": {"round": "2"}}
        assert "error" not in await client.call("save_weights", model, 5, **taken)
        kept = manifest(client, CheckpointFamily.STATE, "s")
        assert (kept.step, kept.metadata) == (1, {"round": "2"})


async def test_a_state_without_a_path_is_named_after_its_number(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        saved = await client.call("save_weights", model, 1, ttl_seconds=3600)
        assert saved["path"] == f"tinker://{model}/weights/state-000001"


async def test_an_expired_state_makes_no_new_model(start_pool) -> None:
    clock = ManualClock()
    async with start_pool(clock=clock) as client:
        model = await create(client)
        path = (await client.call("save_weights", model, 1, path="s", ttl_seconds=60))["path"]
        clock.advance(61)
        body = {"session_id": SESSION, "model_seq_id": 1, "path": path, "optimizer": False}
        accepted = await client.post("load_weights", **body)
        failed = await client.result(accepted.json()["request_id"])
        assert failed["error_class"] == "unknown_snapshot"
        assert "expired" in failed["error"]


async def test_an_adapter_is_exported_as_a_peft_directory(start_pool) -> None:
    clock = ManualClock()
    async with start_pool(clock=clock) as client:
        model = await create(client)
        await client.train(model, 1, 1)
        saved = await client.call("save_weights_external", model, 3, path="x", ttl_seconds=60)
        assert saved["type"] == "save_weights_external"
        assert saved["path"] == f"tinker://{model}/external_weights/x"
        found = manifest(client, CheckpointFamily.EXTERNAL, "x")
        assert (found.external, found.kind, found.expires_at) == (True, "lora", clock.now() + 60)
        assert (found.digest, found.size_bytes) == (await client.digest(model), saved["size_bytes"])
        key = CheckpointKey("local", "pool-1", model, CheckpointFamily.EXTERNAL, "x")
        directory = client.front.store.directory(key)
        assert {path.name for path in directory.iterdir()} == {
            "manifest.json",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        config = json.loads((directory / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("LORA", 4)
        again = await client.call("save_weights_external", model, 4, path="x")
        assert again["path"] == saved["path"]
        await client.train(model, 5, 1)
        taken = await client.call("save_weights_external", model, 7, path="x")
        assert taken["error_class"] == "duplicate_checkpoint"


async def test_a_full_run_is_exported_as_a_model_directory_and_no_delta_descends_from_it(
    start_front,
) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.call("save_weights_for_sampler", model, 1, path="base")
        await client.train(model, 2, 1)
        saved = await client.call("save_weights_external", model, 4, path="x")
        assert saved["path"] == "x"
        found = manifest(client, CheckpointFamily.EXTERNAL, "x", slot="policy")
        assert found.kind == "base"
        assert Path(
            client.front.spec.store_root, "local/job-1/policy/external/x/config.json"
        ).exists()
        await client.train(model, 5, 1)
        delta = {"path": "d", "checkpoint_type": "delta"}
        assert (await client.call("save_weights_for_sampler", model, 7, **delta))[
            "parent"
        ] == "base"


async def test_encrypted_exports_are_refused_by_name(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        asked = {"path": "x", "age_encryption_recipients": ["age1abc"]}
        refused = await client.call("save_weights_external", model, 1, **asked)
        assert (refused["error_class"], refused["category"]) == ("unsupported", "user")
        assert "age_encryption_recipients" in refused["error"]
        empty = {"path": "x", "age_encryption_recipients": []}
        assert "error" not in await client.call("save_weights_external", model, 2, **empty)


async def test_an_export_and_a_snapshot_are_no_training_states(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        for seq, (call, segment) in enumerate(
            {
                "save_weights_external": "external_weights",
                "save_weights_for_sampler": "sampler_weights",
            }.items()
        ):
            saved = await client.call(call, model, 2 * seq + 1, path="x")
            assert saved["path"] == f"tinker://{model}/{segment}/x"
            loaded = await client.call("load_weights", model, 2 * seq + 2, path=saved["path"])
            assert (loaded["error_class"], loaded["category"]) == ("wrong_checkpoint_kind", "user")
