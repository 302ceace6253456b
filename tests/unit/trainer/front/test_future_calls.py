"""Results, their sizes, and the calls about futures that a trainer refuses."""

from __future__ import annotations

from typing import Any

import pytest

from homefire.trainer.front import future_calls

BINARY = {"accept": "application/x-protobuf"}


@pytest.fixture
def small_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results above 100 bytes are large."""
    monkeypatch.setattr(future_calls, "INLINE_BYTES", 100)


async def ask(client, request_id: str, headers: dict[str, str], **more: Any) -> Any:
    body = {"request_id": request_id, **more}
    return await client.http.post("/api/v1/retrieve_future", json=body, headers=headers)


@pytest.mark.parametrize("headers", [{}, BINARY])
async def test_a_large_result_is_announced_once_and_then_sent(
    start_front, small_inline, headers: dict[str, str]
) -> None:
    async with start_front() as client:
        request = await client.forward_backward(await client.model(), 1)
        announced = await ask(client, request, headers, allow_metadata_only=True)
        sent = await ask(client, request, headers, allow_metadata_only=False)
        assert announced.json() == {
            "status": "complete_metadata",
            "response_payload_size": len(sent.content),
        }
        assert sent.headers["content-type"] == headers.get("accept", "application/json")
        assert (await ask(client, request, headers)).content == sent.content


async def test_a_small_result_and_a_failure_come_at_once(start_front, datum) -> None:
    async with start_front() as client:
        model = await client.model()
        small = await client.forward_backward(model, 1)
        answer = await ask(client, small, {}, allow_metadata_only=True)
        assert "metrics" in answer.json()
        failing = await client.forward_backward(model, 2, data=[datum([1, 99])])
        answer = await ask(client, failing, {}, allow_metadata_only=True)
        assert answer.json()["category"] == "user"


async def test_a_training_request_is_not_cancelled_and_keeps_its_place(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        held = await client.optim_step(model, 2)
        refused = await client.post("cancel_future", request_id=held)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported")
        assert "runs in its order" in refused.json()["error"]["message"]
        await client.forward_backward(model, 1)
        assert (await client.result(held))["step"] == 1
        unknown = await client.post("cancel_future", request_id="job-1.0")
        assert unknown.status_code == 404


@pytest.mark.parametrize(
    "call", ["create_sampling_session", "asample", "join_sampling_session", "retrieve_futures"]
)
async def test_what_a_trainer_does_not_do_is_refused_by_name(start_front, call: str) -> None:
    async with start_front() as client:
        refused = await client.post(call, session_id="s")
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["code"], error["category"]) == ("unsupported", "user")
        assert error["message"].startswith(f"{call}: ")


async def test_a_server_side_loss_is_a_failed_future_of_the_user(start_front) -> None:
    async with start_front() as client:
        body = {"session_id": await client.session(), "custom_loss_seq_id": 0, "name": "mine"}
        accepted = await client.post("create_custom_loss", **body, inputs=[], graph={})
        failed = await client.result(accepted.json()["request_id"])
        assert (failed["category"], failed["error_class"]) == ("user", "unsupported")
        assert "forward_backward_custom" in failed["error"]
