"""A pool: many models on one base, each in a slot of its own, none of which ever notices another."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homefire.foundation.clock import ManualClock
from homefire.wire.engine import (
    AdoptSnapshot,
    CloseSlot,
    DiscardGradients,
    ForwardBackward,
    LoadState,
    OpenSlot,
    OptimStep,
    SaveSampler,
)
from homefire.wire.errors import InvalidArgument
from homefire.wire.pooled import pool_job_id, run_job_id
from homefire.wire.specs import TrainerMode
from unit.trainer.front.conftest import Orders, make_datum

SESSIONS = [f"ts-{n:016x}" for n in range(3)]
POOL = {"pooled": True, "mode": TrainerMode.LORA, "job": "pool-1"}
FULL = {"pooled": True, "mode": TrainerMode.FULL}
_INPUT = {"data": [make_datum([1, 2, 3])], "loss_fn": "cross_entropy"}


@pytest.fixture
def start_pool(start_front) -> Callable[..., Any]:
    return lambda **options: start_front(**{**POOL, **options})


async def create(client, session: str = SESSIONS[0], seq: int = 0, **more: Any) -> str:
    asked = {"lora_config": {"rank": 4}, "base_model": "org/any-name", **more}
    return (await client.create(session, seq, **asked))["model_id"]


async def create_from(client, path: str, *, session: str = SESSIONS[2], seq: int = 0) -> Any:
    body = {"session_id": session, "model_seq_id": seq, "path": path, "optimizer": True}
    accepted = await client.post("load_weights", **body)
    assert accepted.status_code == 200, accepted.text
    return await client.result(accepted.json()["request_id"])


# Slots -----------------------------------------------------------------------------------------


async def test_models_of_any_sessions_train_side_by_side_and_fence_nobody(start_pool) -> None:
    async with start_pool() as client:
        models = [await create(client, session) for session in SESSIONS]
        models.append(await create(client, SESSIONS[0], 1))
        for model in models:
            await client.train(model, 1, 2)
        assert len({await client.digest(model) for model in models}) == 4
        assert client.events("superseded") == []
        opened = [r.slot for r in client.orders.seen if isinstance(r, OpenSlot)]
        assert opened == models == [f"{s}:train:0" for s in SESSIONS] + [f"{SESSIONS[0]}:train:1"]
        assert (await client.status()).step == 8


async def test_a_model_keeps_the_name_rank_and_tokenizer_that_its_client_sees(start_pool) -> None:
    async with start_pool() as client:
        small = await create(client, base_model="org/qwen")
        large = await create(client, SESSIONS[1], lora_config={"rank": 16}, base_model="other")
        for model, name, rank in ((small, "org/qwen", 4), (large, "other", 16)):
            info = (await client.post("get_info", model_id=model)).json()
            assert (info["model_name"], info["lora_rank"], info["is_lora"]) == (name, rank, True)
            assert info["model_data"]["model_name"] == name
            assert info["model_data"]["tokenizer_id"] == "tiny-tokenizer"


async def test_a_repeated_creation_is_the_same_model_even_in_a_full_pool(start_pool) -> None:
    async with start_pool(max_open_models=1) as client:
        body = {
            "session_id": SESSIONS[0],
            "model_seq_id": 0,
            "base_model": "x",
            "lora_config": {"rank": 4},
        }
        accepted = [(await client.post("create_model", **body)).json() for _ in range(3)]
        assert accepted[0] == accepted[1] == accepted[2]
        await client.result(accepted[0]["request_id"])
        assert (await client.post("create_model", **body)).json() == accepted[0]
        assert len([r for r in client.orders.seen if isinstance(r, OpenSlot)]) == 1


async def test_a_full_pool_refuses_by_name_until_a_model_is_unloaded(start_pool) -> None:
    async with start_pool(max_open_models=2) as client:
        first = await create(client)
        await create(client, SESSIONS[1])
        asked = {"base_model": "x", "lora_config": {"rank": 4}}
        refused = await client.create(SESSIONS[2], **asked)
        assert (refused["error_class"], refused["category"]) == ("too_many_models", "user")
        assert "holds 2 open models" in refused["error"]
        assert "homefire session finish" in refused["error"]
        reference = await client.create(SESSIONS[2], 1, **asked, base_only=True)
        assert "error" not in reference, "the frozen base takes no room"
        await client.result(
            (await client.post("unload_model", model_id=first)).json()["request_id"]
        )
        assert "error" not in await client.create(SESSIONS[2], 2, **asked)


async def test_creations_that_arrive_together_do_not_overfill_a_pool(start_pool) -> None:
    async with start_pool(max_open_models=2) as client:
        asked = {"base_model": "x", "lora_config": {"rank": 4}}
        results = await asyncio.gather(
            *(client.create(SESSIONS[0], seq, **asked) for seq in range(5))
        )
        assert sorted("error" in result for result in results) == [False] * 2 + [True] * 3


async def test_an_unloaded_models_slot_is_closed_and_its_use_is_a_users_error(start_pool) -> None:
    async with start_pool() as client:
        model, other = await create(client), await create(client, SESSIONS[1])
        await client.train(model, 1, 1)
        await client.result(
            (await client.post("unload_model", model_id=model)).json()["request_id"]
        )
        assert [r.slot for r in client.orders.seen if isinstance(r, CloseSlot)] == [model]
        failed = await client.result(await client.forward_backward(model, 3))
        assert (failed["error_class"], failed["category"]) == ("failed_precondition", "user")
        assert "was unloaded" in failed["error"]
        await client.train(other, 1, 1)


async def test_a_closed_slot_is_closed_again_by_a_replay(start_pool) -> None:
    async with start_pool(crash=True) as client:
        model, other = await create(client), await create(client, SESSIONS[1])
        await client.train(model, 1, 1)
        await client.result(
            (await client.post("unload_model", model_id=model)).json()["request_id"]
        )
    async with start_pool() as client:
        await client.train(other, 1, 1)
        with pytest.raises(InvalidArgument, match="is not open"):
            await client.digest(model)


async def test_a_finished_session_takes_its_own_models_along_and_no_others(start_pool) -> None:
    async with start_pool() as client:
        gone = [await create(client, SESSIONS[0], seq) for seq in range(2)]
        stays = await create(client, SESSIONS[1])
        await client.train(gone[0], 1, 1)
        held = await client.optim_step(gone[0], 9)
        for _ in range(2):
            finished = await client.post(f"sessions/{SESSIONS[0]}/finish", detail=None)
            assert finished.status_code == 200
        await client.train(stays, 1, 1)
        assert (await client.result(held))["error_class"] == "sequence_gap"
        assert {r.slot for r in client.orders.seen if isinstance(r, CloseSlot)} == set(gone)
        assert len(client.events("model_unloaded")) == 2


async def test_models_that_are_over_are_forgotten_once_no_recovery_needs_them(start_pool) -> None:
    clock = ManualClock()
    async with start_pool(clock=clock, crash=True) as client:
        over, stays = await create(client), await create(client, SESSIONS[1])
        await client.train(over, 1, 1)
        await client.result(await client.forward(over, 3))
        await client.post(f"sessions/{SESSIONS[0]}/finish")
        for step in range(4):
            assert over in client.front.ledger.handles or step > 2
            clock.advance(7 * 3600)
            await client.train(stays, 2 * step + 1, 1)
            await client.settled()
        assert set(client.front.ledger.handles) == {stays}
        gone = await client.post("forward", model_id=over, seq_id=4, forward_input=_INPUT)
        assert gone.status_code == 404
        digest = await client.digest(stays)
    async with start_pool(clock=clock) as client:
        await client.result(await client.forward(stays, 9))
        assert await client.digest(stays) == digest
        assert (await client.status()).error is None


async def test_a_reference_runs_forward_on_the_base_and_survives_an_unload_of_another(
    start_pool,
) -> None:
    async with start_pool() as client:
        trained = await create(client)
        await client.train(trained, 1, 2)
        references = [await create(client, SESSIONS[1], seq, base_only=True) for seq in range(2)]
        unloaded = await client.post("unload_model", model_id=references[0])
        await client.result(unloaded.json()["request_id"])
        base = await client.result(await client.forward(references[1], 1))
        policy = await client.result(await client.forward(trained, 5))
        assert base["metrics"]["loss:sum"] > policy["metrics"]["loss:sum"]
        refused = await client.result(await client.forward_backward(references[1], 2))
        assert refused["error_class"] == "failed_precondition"


async def test_sessions_of_a_pool_are_not_its_own(start_pool) -> None:
    async with start_pool() as client:
        made = await client.post("create_session", tags=[])
        assert made.json()["error"]["code"] == "unsupported"
        beat = await client.post("session_heartbeat", session_id=SESSIONS[0])
        assert beat.status_code == 200
        wrong = await client.post("session_heartbeat", session_id="../x")
        assert wrong.status_code == 400


async def test_a_full_parameter_run_has_a_slot_named_after_it_too(start_front) -> None:
    async with start_front(**FULL) as client:
        model = await create(client, lora_config={"rank": 0})
        await client.train(model, 1, 2)
        info = (await client.post("get_info", model_id=model)).json()
        assert (info["is_lora"], info["lora_rank"]) == (False, 0)
        for seq, name in ((5, "a"), (6, "b")):
            saved = await client.call("save_weights_for_sampler", model, seq, path=name)
            assert (saved["kind"], saved["step"]) == ("base", 2)
            assert saved["path"] == f"tinker://{model}/sampler_weights/{name}"


# Isolation -------------------------------------------------------------------------------------


async def test_a_failed_step_clears_its_own_gradient_and_no_other(start_pool, datum) -> None:
    async with start_pool() as client:
        failing, waiting = await create(client), await create(client, SESSIONS[1])
        await client.result(await client.forward_backward(waiting, 1))
        await client.result(await client.forward_backward(failing, 1))
        bad = await client.forward_backward(failing, 2, data=[datum([1, 99])])
        assert "error" in await client.result(bad)
        failed = await client.result(await client.optim_step(failing, 3))
        assert failed["error_class"] == "incomplete_gradient"
        assert [r.slot for r in client.orders.seen if isinstance(r, DiscardGradients)] == [failing]
        stepped = await client.result(await client.optim_step(waiting, 2))
        assert stepped["metrics"]["num_backward_calls"] == 1
        again = await client.result(await client.optim_step(failing, 4))
        assert again["metrics"]["num_backward_calls"] == 0


Tenant = list[str]
"""What one client does, in order."""
_OPERATIONS = ("backward", "bad_backward", "step", "snapshot", "save", "load")
_DEATHS = (ForwardBackward, OptimStep, SaveSampler, AdoptSnapshot, LoadState)
_numbers = itertools.count()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tenants=st.lists(
        st.lists(st.sampled_from(_OPERATIONS), min_size=2, max_size=8), min_size=2, max_size=3
    ),
    order=st.randoms(use_true_random=False),
    deaths=st.lists(st.sampled_from(_DEATHS), max_size=3, unique=True),
    crash_after=st.integers(0, 12),
)
def test_each_tenant_ends_bit_for_bit_as_if_alone_whatever_dies_between(
    start_pool, tenants: list[Tenant], order, deaths, crash_after: int
) -> None:
    """Adapter, optimizer and gradient: all that a last backward and step depend on. No request dies
    twice: that one would be given up."""
    schedule = [number for number, tenant in enumerate(tenants) for _ in tenant]
    order.shuffle(schedule)
    together = asyncio.run(_run(start_pool, tenants, schedule, deaths, crash_after))
    for number, tenant in enumerate(tenants):
        alone = [[] for _ in tenants]
        alone[number] = tenant
        undisturbed = asyncio.run(_run(start_pool, alone, [number] * len(tenant), [], None))
        assert together[number] == undisturbed[number]


async def _run(
    start_pool,
    tenants: list[Tenant],
    schedule: list[int],
    deaths: list[Any],
    crash_after: int | None,
) -> list[str]:
    """The digest of each tenant's adapter in the end."""
    options = {"job": f"pool-{next(_numbers)}", "clock": ManualClock()}
    models = [f"{SESSIONS[number]}:train:0" for number in range(len(tenants))]
    done = [0] * len(tenants)
    first = len(schedule) if crash_after is None else min(crash_after, len(schedule))
    async with start_pool(orders=Orders(dies_at=list(deaths)), crash=True, **options) as client:
        for number in range(len(tenants)):
            await create(client, SESSIONS[number])
        for number in schedule[:first]:
            await _do(client, models[number], tenants[number][done[number]], done[number] + 1)
            done[number] += 1
    async with start_pool(orders=Orders(), **options) as client:
        for number in schedule[first:]:
            await _do(client, models[number], tenants[number][done[number]], done[number] + 1)
            done[number] += 1
        for number, model in enumerate(models):
            await client.forward_backward(model, done[number] + 1)
            await client.result(await client.optim_step(model, done[number] + 2))
        status = await client.status()
        assert status.error is None
        return [await client.digest(model) for model in models]


async def _do(client, model: str, operation: str, seq: int) -> None:
    match operation:
        case "backward":
            data = [make_datum([seq, 2, 3 + len(model), 4])]
            request = await client.forward_backward(model, seq, data=data)
        case "bad_backward":
            request = await client.forward_backward(model, seq, data=[make_datum([1, 99])])
        case "step":
            request = await client.optim_step(model, seq, adam_params={"weight_decay": 0.1})
        case "snapshot":
            await client.call("save_weights_for_sampler", model, seq, path=f"s{seq}")
            return
        case "save":
            await client.call("save_weights", model, seq, path="kept", overwrite=True)
            return
        case _:
            await client.call("load_weights", model, seq, path="kept", optimizer=True)
            return
    await client.result(request)


# Saving and loading ----------------------------------------------------------------------------


async def test_checkpoints_have_the_names_of_the_protocol(start_pool) -> None:
    async with start_pool() as client:
        model = await create(client)
        await client.train(model, 1, 1)
        state = await client.call("save_weights", model, 3, path="s")
        assert state["path"] == f"tinker://{model}/weights/s"
        snapshot = await client.call("save_weights_for_sampler", model, 4, path="p")
        assert snapshot["path"] == f"tinker://{model}/sampler_weights/p"
        assert (Path(client.front.spec.store_root) / "local/pool-1" / model / "state/s").is_dir()


async def test_a_model_is_made_from_another_runs_state_with_its_adapter(start_pool) -> None:
    async with start_pool() as client:
        source = await create(client, lora_config={"rank": 6, "train_mlp": False, "seed": 5})
        await client.train(source, 1, 2)
        path = (await client.call("save_weights", source, 5, path="s"))["path"]
        digest = await client.digest(source)
        made = await create_from(client, path)
        assert (made["path"], made["step"]) == (path, 2)
        assert made["model_id"] == f"{SESSIONS[2]}:train:0"
        assert await client.digest(made["model_id"]) == digest
        info = (await client.post("get_info", model_id=made["model_id"])).json()
        assert info["lora_rank"] == 6
        await client.train(made["model_id"], 1, 1)
        assert await client.digest(source) == digest


async def test_a_new_model_loads_another_runs_state_as_old_clients_do(start_pool) -> None:
    async with start_pool() as client:
        source = await create(client)
        await client.train(source, 1, 1)
        path = (await client.call("save_weights", source, 3, path="s"))["path"]
        model = await create(client, SESSIONS[1])
        loaded = await client.call("load_weights", model, 1, path=path, optimizer=True)
        assert loaded["digest"] == await client.digest(source)
        wider = await create(client, SESSIONS[1], 1, lora_config={"rank": 8})
        refused = await client.call("load_weights", wider, 1, path=path, optimizer=True)
        assert refused["error_class"] == "invalid_argument"
        assert "rank 4" in refused["error"]
        assert "has 8" in refused["error"]


async def test_what_cannot_be_loaded_says_so_and_leaves_no_slot_behind(start_pool) -> None:
    async with start_pool(max_open_models=2) as client:
        source = await create(client)
        await client.call("save_weights_for_sampler", source, 1, path="p")
        await client.call("save_weights", source, 2, path="s")
        for number, (path, code) in enumerate(
            {
                f"tinker://{source}/sampler_weights/p": "wrong_checkpoint_kind",
                f"tinker://{source}/weights/p": "wrong_checkpoint_kind",
                f"tinker://{source}/weights/q": "unknown_snapshot",
                f"tinker://{SESSIONS[1]}:train:9/weights/s": "unknown_snapshot",
                "s": "unknown_snapshot",
            }.items()
        ):
            failed = await create_from(client, path, seq=number)
            assert (failed["error_class"], failed["category"]) == (code, "user"), path
        assert [r.slot for r in client.orders.seen if isinstance(r, OpenSlot)] == [source]


async def test_a_creation_that_breaks_closes_what_it_opened_and_stays_failed(
    start_pool, orders
) -> None:
    """The state is damaged, which only the engine notices."""
    async with start_pool(crash=True) as client:
        source = await create(client)
        path = (await client.call("save_weights", source, 1, path="s"))["path"]
        state = Path(client.front.spec.store_root) / "local/pool-1" / source / "state/s"
        (state / "weights.safetensors").write_bytes(b"damage")
        failed = await create_from(client, path)
        assert failed["error_class"] == "digest_mismatch"
        slot = f"{SESSIONS[2]}:train:0"
        assert [r.slot for r in client.orders.seen if isinstance(r, CloseSlot)] == [slot]
        used = await client.result(await client.forward(slot, 1))
        assert "was never made" in used["error"]
    async with start_pool() as client:
        assert (await create_from(client, path)) == failed
        await client.train(source, 2, 1)


async def test_a_state_of_another_base_model_is_refused_naming_both(start_pool) -> None:
    async with start_pool(job="pool-2", base_model="base-b") as client:
        source = await create(client, SESSIONS[1])
        path = (await client.call("save_weights", source, 1, path="s"))["path"]
    async with start_pool(base_model="base-a") as client:
        model = await create(client)
        refused = await client.call("load_weights", model, 1, path=path, optimizer=True)
        assert refused["error_class"] == "invalid_argument"
        assert "base-a" in refused["error"]
        assert "base-b" in refused["error"]


async def test_a_full_parameter_run_goes_on_from_another_ones_state(start_front) -> None:
    runs = [f"{session}:train:0" for session in SESSIONS[:2]]
    jobs = [run_job_id("local", run) for run in runs]
    async with start_front(**FULL, job=jobs[0]) as client:
        source = await create(client, SESSIONS[0], lora_config={"rank": 0})
        await client.train(source, 1, 2)
        path = (await client.call("save_weights", source, 5, path="s"))["path"]
        digest = await client.digest(source)
    async with start_front(**FULL, job=jobs[1]) as client:
        made = await create_from(client, path, session=SESSIONS[1])
        assert made["step"] == 2
        assert await client.digest(runs[1]) == digest
    async with start_front(**POOL) as client:
        refused = await create_from(client, path)
        assert "holds all parameters" in refused["error"]


async def test_pools_and_dedicated_jobs_load_each_others_adapters(start_front, make_spec) -> None:
    pool = {**POOL, "job": pool_job_id("local", make_spec().model_dir)}
    async with start_front(mode=TrainerMode.LORA) as client:
        source = (await client.create(await client.session(), lora_config={"rank": 4}))["model_id"]
        await client.train(source, 1, 1)
        await client.call("save_weights", source, 3, path="s")
        digest = await client.digest()
    async with start_front(**pool) as client:
        for number, path in enumerate((f"tinker://{source}/weights/s", "cross_job://job-1/s")):
            made = await create_from(client, path, seq=number)
            assert await client.digest(made["model_id"]) == digest
        await client.train(made["model_id"], 1, 1)
        back = (await client.call("save_weights", made["model_id"], 3, path="t"))["path"]
        digest = await client.digest(made["model_id"])
    async with start_front(mode=TrainerMode.LORA) as client:
        model = (await client.create(await client.session(), lora_config={"rank": 4}))["model_id"]
        loaded = await client.call("load_weights", model, 1, path=back, optimizer=True)
        assert (loaded["step"], loaded["digest"]) == (2, digest)
