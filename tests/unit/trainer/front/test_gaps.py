"""Numbers that never come."""

from __future__ import annotations

from homefire.foundation.clock import ManualClock
from homefire.wire.engine import OptimStep


async def test_after_the_timeout_held_requests_fail_naming_the_missing_number(
    start_front, datum
) -> None:
    clock = ManualClock()
    async with start_front(clock=clock, gap_timeout_s=600.0) as client:
        model = await client.model()
        chunk = await client.forward_backward(model, 2)
        step = await client.optim_step(model, 3)
        clock.advance(599)
        await client.front.admission.gaps.expire_due()
        assert client.front.futures.is_pending(chunk)
        clock.advance(1)
        await client.front.admission.gaps.expire_due()
        for request_id in (chunk, step):
            failed = await client.result(request_id)
            assert (failed["error_class"], failed["category"]) == ("sequence_gap", "user")
            assert "seq_id 1" in failed["error"]
        await client.forward_backward(model, 4)
        await client.result(await client.optim_step(model, 5))
        assert (await client.status()).step == 1


async def test_a_missing_chunk_fails_the_next_step_when_the_step_came_later(start_front) -> None:
    clock = ManualClock()
    async with start_front(clock=clock, gap_timeout_s=10.0) as client:
        model = await client.model()
        await client.result(await client.forward_backward(model, 1))
        await client.forward_backward(model, 3)
        clock.advance(10)
        await client.front.admission.gaps.expire_due()
        failed = await client.result(await client.optim_step(model, 4))
        assert failed["error_class"] == "incomplete_gradient"
        assert "seq_id 2" in failed["error"]
        assert not [r for r in client.orders.seen if isinstance(r, OptimStep)]
        late = await client.result(await client.forward_backward(model, 2))
        assert late["error_class"] == "sequence_gap"


async def test_every_new_gap_gets_the_whole_time(start_front) -> None:
    clock = ManualClock()
    async with start_front(clock=clock, gap_timeout_s=10.0) as client:
        model = await client.model()
        await client.forward(model, 2)
        held = await client.forward(model, 4)
        clock.advance(9)
        await client.forward(model, 1)
        clock.advance(9)
        await client.front.admission.gaps.expire_due()
        assert client.front.futures.is_pending(held)
        clock.advance(1)
        await client.front.admission.gaps.expire_due()
        assert "seq_id 3" in (await client.result(held))["error"]
