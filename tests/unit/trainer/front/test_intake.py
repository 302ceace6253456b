"""Many large bodies at once: all accepted, in order, and only a few in memory."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from homefire.trainer.front.future_calls import OFF_LOOP_ABOVE
from homefire.trainer.front.intake import MAX_LARGE_BODIES, Intake

MANY = 40


def request(*, num_bytes: int | None) -> Request:
    length = [] if num_bytes is None else [(b"content-length", str(num_bytes).encode())]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": length})


class Counted:
    """A call that says how many of it run at once, at most."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.release = asyncio.Event()

    async def __call__(self, request: Request) -> Response:
        self.running += 1
        self.most = max(self.most, self.running)
        await self.release.wait()
        self.running -= 1
        return Response()


async def most_at_once(num_bytes: int | None) -> int:
    call = Counted()
    bounded = Intake().bounded(call)
    calls = [asyncio.create_task(bounded(request(num_bytes=num_bytes))) for _ in range(MANY)]
    for _ in range(MANY):
        await asyncio.sleep(0)
    call.release.set()
    await asyncio.gather(*calls)
    return call.most


async def test_large_bodies_and_those_of_unknown_length_wait_unread() -> None:
    assert await most_at_once(OFF_LOOP_ABOVE + 1) == MAX_LARGE_BODIES
    assert await most_at_once(None) == MAX_LARGE_BODIES


async def test_small_bodies_wait_for_none_of_them() -> None:
    assert await most_at_once(OFF_LOOP_ABOVE) == MANY


async def test_a_body_that_is_refused_gives_its_place_back() -> None:
    async def refuse(request: Request) -> Response:
        raise ValueError("refused")

    bounded = Intake().bounded(refuse)
    calls = [bounded(request(num_bytes=1 << 20)) for _ in range(2 * MAX_LARGE_BODIES)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, ValueError) for outcome in outcomes)


async def test_a_crowd_of_large_bodies_is_accepted_whole_while_heartbeats_are_answered(
    start_front, datum
) -> None:
    """Backwards, as if the first chunk came last: nothing is lost and nothing runs out of order."""
    rows = [datum([1 + n % 60 for n in range(start, start + 31)]) for start in range(300)]
    async with start_front() as client:
        session = await client.session()
        model = (await client.create(session))["model_id"]
        posts = [client.forward_backward(model, seq, data=rows) for seq in range(24, 0, -1)]
        beats = [client.post("session_heartbeat", session_id=session) for _ in range(20)]
        accepted, answered = await asyncio.gather(asyncio.gather(*posts), asyncio.gather(*beats))
        assert len(set(accepted)) == 24
        assert {beat.status_code for beat in answered} == {200}
        stepped = await client.result(await client.optim_step(model, 25))
        assert "error" not in stepped
        applied = [event["seq_id"] for event in client.events("forward_backward")]
        assert applied == list(range(1, 25))
