"""The routes, as a JSON client uses them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.front import admission
from homefire.wire import tinker_public_pb2 as pb
from homefire.wire.engine import ForwardBackward, OptimStep
from homefire.wire.internal import ACCOUNT_HEADER, TrainerState


async def test_a_step_trains_and_is_counted(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        assert model.startswith("job-1-s")
        assert model.endswith(":train:0")
        losses = []
        for step in range(3):
            done = await client.forward_backward(model, 2 * step + 1)
            stepped = await client.optim_step(model, 2 * step + 2)
            losses.append((await client.result(done))["metrics"]["loss:sum"])
            assert (await client.result(stepped))["metrics"]["learning_rate"] == 0.01
        assert losses[0] > losses[1] > losses[2]
        status = await client.status()
        assert (status.state, status.step) == (TrainerState.READY, 3)
        assert status.num_accepted == status.num_applied == 7
        assert [event["step"] for event in client.events("optim_step")] == [1, 2, 3]


async def test_outputs_follow_the_order_and_shape_of_the_data(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        rows = [datum([1, 2]), datum([3, 4, 5, 6]), datum([1, 2, 3])]
        result = await client.result(await client.forward(model, 1, data=rows))
        shapes = [output["logprobs"]["shape"] for output in result["loss_fn_outputs"]]
        assert shapes == [[1], [3], [2]]
        alone = await client.result(await client.forward(model, 2, data=[rows[1]]))
        assert alone["loss_fn_outputs"][0] == result["loss_fn_outputs"][1]
        assert all(key.count(":") == 1 for key in result["metrics"])


async def test_the_same_step_comes_by_protobuf_and_its_result_too(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        by_json = await client.result(await client.forward(model, 1, data=[datum([1, 2, 3])]))
        message = pb.ForwardBackwardRequest(
            model_id=model, seq_id=2, loss_fn="cross_entropy", forward_only=True
        )
        row = message.data.add()
        row.model_input.add().encoded_text.tokens = b"\1\0\0\0\2\0\0\0"
        targets = row.loss_fn_inputs["target_tokens"]
        targets.dense, targets.dtype = b"\2" + bytes(7) + b"\3" + bytes(7), pb.DTYPE_INT64
        targets.shape.append(2)
        accepted = await client.http.post(
            "/api/v1/forward_backward",
            content=message.SerializeToString(),
            headers={"content-type": "application/x-protobuf"},
        )
        await client.result(accepted.json()["request_id"])
        answer = await client.http.post(
            "/api/v1/retrieve_future",
            json=accepted.json(),
            headers={"accept": "application/x-protobuf"},
        )
        assert answer.headers["content-type"] == "application/x-protobuf"
        output = pb.ForwardBackwardOutput.FromString(answer.content)
        assert dict(output.metrics) == by_json["metrics"]
        assert ForwardBackward not in {type(request) for request in client.orders.seen}


async def test_early_arrivals_are_accepted_at_once_and_run_in_order(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        third = await client.optim_step(model, 3)
        second = await client.forward_backward(model, 2)
        assert (await client.status()).num_applied == 1
        first = await client.forward_backward(model, 1)
        for request_id in (third, second, first):
            assert "error" not in await client.result(request_id)
        kinds = [event["event"] for event in _steps(client)]
        assert kinds == ["forward_backward", "forward_backward", "optim_step"]
        assert client.events("optim_step")[0]["metrics"]["num_backward_calls"] == 2


async def test_a_repeated_request_is_the_same_request(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        sends = [client.forward_backward(model, 1) for _ in range(4)]
        accepted = await asyncio.gather(*sends)
        await client.result(accepted[0])
        accepted.append(await client.forward_backward(model, 1))
        assert len(set(accepted)) == 1
        assert len(client.events("forward_backward")) == 1


async def test_a_reused_seq_with_another_payload_is_refused_and_nothing_happens(
    start_front, datum
) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.forward_backward(model, 1)
        given = {"data": [datum([7, 8])], "loss_fn": "cross_entropy"}
        again = await client.post(
            "forward_backward", model_id=model, seq_id=1, forward_backward_input=given
        )
        assert again.status_code == 400
        assert again.json()["error"]["code"] == "sequence_reused"
        assert (await client.status()).num_accepted == 2


async def test_bad_data_fails_its_future_and_not_the_engine(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        bad = await client.forward_backward(model, 1, data=[datum([1, 99])])
        failed = await client.result(bad)
        assert (failed["category"], failed["error_class"]) == ("user", "token_out_of_range")
        assert not [r for r in client.orders.seen if isinstance(r, ForwardBackward)]


async def test_a_tensor_that_contradicts_its_shape_leaves_no_hole_in_the_order(
    start_front, datum
) -> None:
    async with start_front() as client:
        model = await client.model()
        wrong = datum([1, 2, 3])
        wrong["loss_fn_inputs"]["target_tokens"]["shape"] = [5]
        failed = await client.result(await client.forward_backward(model, 1, data=[wrong]))
        assert (failed["category"], failed["error_class"]) == ("user", "invalid_argument")
        assert "error" not in await client.result(await client.forward_backward(model, 2))


async def test_a_failed_chunk_makes_the_next_step_fail_once_and_then_all_is_well(
    start_front, datum
) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.forward_backward(model, 1)
        await client.forward_backward(model, 2, data=[datum([1, 99])])
        failed = await client.result(await client.optim_step(model, 3))
        assert failed["error_class"] == "incomplete_gradient"
        assert "seq_id 2" in failed["error"]
        assert not [r for r in client.orders.seen if isinstance(r, OptimStep)]
        await client.forward_backward(model, 4)
        await client.result(await client.optim_step(model, 5))
        assert client.events("optim_step")[0]["metrics"]["num_backward_calls"] == 1


async def test_a_malformed_body_is_refused_at_once(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        for body in (b"{", b'{"model_id": 3}', b"[]"):
            answer = await client.http.post("/api/v1/optim_step", content=body)
            assert answer.status_code == 400
            assert answer.json()["error"]["category"] == "user"
        answer = await client.http.post(
            "/api/v1/forward_backward",
            content=b"\xff\xff",
            headers={"content-type": "application/x-protobuf"},
        )
        assert answer.status_code == 400
        assert (await client.post("optim_step", model_id=model, seq_id=0)).status_code == 400


async def test_an_unknown_future_is_a_failed_one(start_front) -> None:
    async with start_front() as client:
        answer = await client.post("retrieve_future", request_id="job-1.0123")
        assert answer.status_code == 200
        assert answer.json()["category"] == "user"


async def test_a_pending_future_is_told_to_try_again(start_front, orders, monkeypatch) -> None:
    from homefire.trainer.front import future_calls

    monkeypatch.setattr(future_calls, "POLL_S", 0.0)
    orders.holds = ForwardBackward
    async with start_front(orders=orders) as client:
        model = await client.model()
        request_id = await client.forward_backward(model, 1)
        await orders.reached.wait()
        answer = await client.post("retrieve_future", request_id=request_id)
        assert answer.status_code == 408
        assert answer.json() == {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "active",
        }
        orders.released.set()


async def test_states_are_saved_listed_described_and_loaded(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.train(model, 1, 2)
        saved = await client.digest()
        assert (await client.call("save_weights", model, 5, path="s-1"))["path"] == "s-1"
        await client.train(model, 6, 1)
        assert await client.digest() != saved
        loaded = await client.call("load_weights", model, 8, path="s-1", optimizer=True)
        assert (loaded["type"], loaded["path"], loaded["step"]) == ("load_weights", "s-1", 2)
        assert await client.digest() == saved
        listed = await client.http.get("/api/v1/list_checkpoints")
        assert listed.json() == {"checkpoints": ["s-1"]}
        info = await client.post("weights_info", tinker_path=f"tinker://{model}/weights/s-1")
        assert info.json() == {"base_model": "tiny", "is_lora": False}


async def test_another_jobs_state_is_loaded_by_cross_job(start_front) -> None:
    async with start_front(job="job-2") as source:
        model = await source.model()
        await source.train(model, 1, 2)
        await source.call("save_weights", model, 5, path="s")
        digest = await source.digest()
    async with start_front() as client:
        model = await client.model()
        loaded = await client.call(
            "load_weights", model, 1, path="cross_job://job-2/s", optimizer=True
        )
        assert loaded["step"] == 2
        assert await client.digest() == digest


async def test_a_sampler_snapshot_is_no_state_and_an_unknown_one_names_what_there_is(
    start_front,
) -> None:
    async with start_front() as client:
        model = await client.model()
        snapshot = await client.call("save_weights_for_sampler", model, 1, path="snap")
        assert (snapshot["path"], snapshot["kind"]) == ("snap", "base")
        await client.call("save_weights", model, 2, path="s-1")
        wrong = await client.call("load_weights", model, 3, path="snap")
        assert wrong["error_class"] == "wrong_checkpoint_kind"
        unknown = await client.call("load_weights", model, 4, path="s-9")
        assert unknown["error_class"] == "unknown_snapshot"
        assert "s-1" in unknown["error"]


async def test_a_model_is_created_from_a_state(start_front) -> None:
    async with start_front() as client:
        session = await client.session()
        model = (await client.create(session))["model_id"]
        await client.train(model, 1, 1)
        await client.call("save_weights", model, 3, path="s")
        await client.train(model, 4, 1)
        body = {"session_id": session, "model_seq_id": 1, "path": "s", "optimizer": True}
        accepted = await client.post("load_weights", **body)
        result = await client.result(accepted.json()["request_id"])
        assert (result["path"], result["model_id"]) == ("s", f"{session}:train:1")
        assert result["step"] == 1
        missing = await client.post("load_weights", **{**body, "model_seq_id": 2, "path": "no"})
        failed = await client.result(missing.json()["request_id"])
        assert failed["error_class"] == "unknown_snapshot"
        live = await client.result(await client.forward(result["model_id"], 1))
        assert "error" not in live, "a failed creation must not fence the live handle"


async def test_an_expired_state_is_not_loaded_but_by_a_replay(start_front) -> None:
    """A load that was accepted in time is repeated by a recovery after the state's end."""
    clock = ManualClock()
    patient = {"clock": clock, "recovery_interval_s": 1e9}
    async with start_front(**patient, crash=True) as client:
        model = await client.model()
        await client.call("save_weights", model, 1, path="s", ttl_seconds=3600)
        await client.train(model, 2, 1)
        await client.call("load_weights", model, 4, path="s", optimizer=True)
        digest = await client.digest()
        clock.advance(3600.0)
        late = await client.call("load_weights", model, 5, path="s", optimizer=True)
        assert late["error_class"] == "unknown_snapshot"
        assert "has expired" in late["error"]
    async with start_front(**patient) as client:
        await client.result(await client.forward(model, 6))
        assert await client.digest() == digest
        assert (await client.status()).error is None


async def test_a_load_without_seq_runs_at_the_end_of_what_was_accepted(start_front, orders) -> None:
    orders.holds = ForwardBackward
    async with start_front(orders=orders) as client:
        model = await client.model()
        await client.call("save_weights", model, 1, path="s")
        await client.forward_backward(model, 2)
        step = await client.optim_step(model, 3)
        load = await client.post("load_weights", model_id=model, path="s", optimizer=True)
        orders.released.set()
        loaded = await client.result(load.json()["request_id"])
        assert loaded["step"] == 0
        assert (await client.result(step))["step"] == 1
        await client.train(model, 4, 1)
        assert (await client.status()).step == 1


async def test_a_load_without_seq_is_refused_behind_a_gap_and_known_again_by_its_key(
    start_front,
) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.call("save_weights", model, 1, path="s")
        body, headers = {"model_id": model, "path": "s"}, {"x-idempotency-key": "k"}
        loads = [
            await client.http.post("/api/v1/load_weights", json=body, headers=headers)
            for _ in range(2)
        ]
        assert loads[0].json() == loads[1].json()
        await client.forward_backward(model, 3)
        held = await client.post("load_weights", model_id=model, path="s")
        assert held.status_code == 422
        assert held.json()["error"]["code"] == "sequence_gap"


async def test_sampling_and_unknown_calls_are_refused_by_name(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        sampling = await client.post("create_sampling_session", session_id="s")
        assert sampling.json()["error"]["code"] == "unsupported"
        ephemeral = await client.call(
            "save_weights_for_sampler", model, 1, sampling_session_seq_id=0
        )
        assert ephemeral["error_class"] == "unsupported"
        adapter = await client.call("load_adapter", model, 2, adapter_path="gs://bucket/a")
        assert adapter["error_class"] == "unsupported"
        direct = await client.post("weight_sync", model_id=model, transport="RDMA")
        assert direct.json()["error"]["code"] == "unsupported"
        assert "RDMA" in direct.json()["error"]["message"]
        unknown = await client.post("no_such_call")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


async def test_who_does_not_know_the_secret_or_comes_from_another_account_gets_nothing(
    start_front,
) -> None:
    async with start_front() as client:
        stranger = await client.http.get("/api/v1/healthz", headers={"x-homefire-secret": "no"})
        assert stranger.status_code == 401
        other = await client.http.get("/api/v1/healthz", headers={ACCOUNT_HEADER: "other"})
        assert other.status_code == 404
        own = await client.http.get("/api/v1/healthz", headers={ACCOUNT_HEADER: "local"})
        assert own.json() == {"status": "ok"}


async def test_the_small_calls_answer_as_clients_expect(start_front) -> None:
    async with start_front() as client:
        session = await client.session()
        model = (await client.create(session))["model_id"]
        assert (await client.post("client/config", sdk_version="1")).json() == {}
        assert (await client.post("client/dynamic_config")).json() == {}
        assert (await client.post("telemetry", events=[])).json() == {"status": "accepted"}
        beat = await client.post("session_heartbeat", session_id=session)
        assert beat.json() == {"type": "session_heartbeat"}
        assert (await client.post("session_heartbeat", session_id="no")).status_code == 404
        assert (await client.post(f"sessions/{session}/finish", detail=None)).status_code == 200
        known = (await client.http.get("/api/v1/get_server_capabilities")).json()
        names = [entry["model_name"] for entry in known["supported_models"]]
        assert names == ["tiny", "tiny-tokenizer"]
        info = (await client.post("get_info", model_id=model)).json()
        assert info["model_data"]["tokenizer_id"] == "tiny-tokenizer"
        assert (info["is_lora"], info["lora_rank"]) == (False, 0)
        health = (await client.http.get("/internal/health")).json()
        assert health["nonce"] == "nonce"


async def test_a_status_long_poll_wakes_when_the_state_changes(start_front) -> None:
    async with start_front() as client:
        await client.model()
        status = await client.status()
        path = f"/internal/status?after={status.version}&wait_s=20"
        poll = asyncio.create_task(client.http.get(path))
        await asyncio.sleep(0)
        client.front.status.enter(TrainerState.STOPPING)
        assert (await poll).json()["state"] == "stopping"


async def test_beyond_its_bounds_a_model_accepts_nothing_more(
    start_front, orders, monkeypatch
) -> None:
    monkeypatch.setattr(admission, "MAX_WAITING_REQUESTS", 2)
    orders.holds = ForwardBackward
    async with start_front(orders=orders) as client:
        model = await client.model()
        await client.forward_backward(model, 1)
        await client.optim_step(model, 2)
        shed = await client.post("optim_step", model_id=model, seq_id=3)
        assert (shed.status_code, shed.headers["retry-after"]) == (429, "1")
        orders.released.set()


@pytest.mark.parametrize(
    "adam", [{"learning_rate": -1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": -1e-8}]
)
async def test_optimizer_settings_out_of_range_fail_by_name(
    start_front, adam: dict[str, Any]
) -> None:
    async with start_front() as client:
        model = await client.model()
        request = await client.optim_step(model, 1, adam_params=adam)
        failed = await client.result(request)
        assert failed["error_class"] == "invalid_argument"
        assert next(iter(adam)) in failed["error"]


def _steps(client) -> list[dict[str, Any]]:
    return sorted(
        [*client.events("forward_backward"), *client.events("optim_step")],
        key=lambda event: event["at"],
    )
