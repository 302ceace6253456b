"""A custom loss's two calls through a front: what is planned, journaled, told, and the same after a crash."""

from __future__ import annotations

import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.front.graph_plans import GraphPlans
from homefire.trainer.front.operations import OperationKind
from homefire.wire.engine import Forward, ForwardBackward
from homefire.wire.graphs import GraphUse

FORWARD, BACKWARD = OperationKind.FORWARD, OperationKind.FORWARD_BACKWARD
ROWS = ([1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11, 12])


def chunk(datum, numbers, weight=None):
    given = None if weight is None else [weight] * (len(numbers) - 1)
    return [datum(list(numbers), given)]


async def custom_loss(client, datum, model, first_seq, order=(0, 1, 2)):
    """Forward of each chunk, then the backward of each, as the clients do; the backwards' results."""
    for number, numbers in enumerate(ROWS):
        await client.result(
            await client.forward(model, first_seq + number, data=chunk(datum, numbers, 0.0))
        )
    asked = {
        number: await client.forward_backward(
            model, first_seq + 3 + number, data=chunk(datum, ROWS[number], 0.5 + number)
        )
        for number in order
    }
    return [await client.result(asked[number]) for number in sorted(asked)]


def plans(orders, kind):
    return [request.plan.graph for request in orders.seen if isinstance(request, kind)]


def told(client, event):
    return [each["graph"] for each in client.events(event)]


async def test_every_chunk_of_a_custom_loss_runs_forward_once(start_front, datum, orders):
    async with start_front(orders=orders) as client:
        model = await client.model()
        await custom_loss(client, datum, model, 1, order=(1, 2, 0))
        assert plans(orders, Forward) == [GraphUse.KEEP] * 3
        assert plans(orders, ForwardBackward) == [GraphUse.REUSE] * 3
        assert told(client, "forward") == ["kept"] * 3
        assert told(client, "forward_backward") == ["reused"] * 3
        graphs = (await client.status()).graphs
        assert (graphs.num_held, graphs.num_reused, graphs.num_recomputed) == (0, 3, 0)
        assert graphs.budget_bytes > 0


async def test_results_and_weights_are_those_of_two_passes(start_front, datum):
    ends = []
    for name, budget in (("held", None), ("recomputed", 1), ("plain", 0)):
        async with start_front(job=name, held_graph_bytes=budget) as client:
            model = await client.model()
            results = await custom_loss(client, datum, model, 1)
            stepped = await client.result(await client.optim_step(model, 7))
            ends.append((results, stepped, await client.digest()))
            reused = (await client.status()).graphs.num_reused
            assert reused == (3 if name == "held" else 0)
    assert ends[0] == ends[1] == ends[2]


async def test_no_graph_is_planned_for_where_none_may_be_kept(start_front, datum, orders):
    async with start_front(orders=orders, held_graph_bytes=0) as client:
        await custom_loss(client, datum, await client.model(), 1)
        assert {*plans(orders, Forward), *plans(orders, ForwardBackward)} == {GraphUse.NONE}


async def test_a_backward_alone_plans_to_reuse_nothing(start_front, datum, orders):
    async with start_front(orders=orders) as client:
        model = await client.model()
        await client.result(await client.forward(model, 1, data=chunk(datum, [1, 2, 3])))
        await client.result(await client.forward_backward(model, 2, data=chunk(datum, [1, 2, 4])))
        await client.result(await client.optim_step(model, 3))
        await client.result(await client.forward_backward(model, 4, data=chunk(datum, [1, 2, 3])))
        assert plans(orders, ForwardBackward) == [GraphUse.NONE] * 2


async def test_a_reference_plans_to_keep_nothing(start_front, datum, orders):
    async with start_front(orders=orders) as client:
        made = await client.create(
            await client.session(), user_metadata={"homefire.base_only": "true"}
        )
        await client.result(await client.forward(made["model_id"], 1))
        assert plans(orders, Forward) == [GraphUse.NONE]


async def test_an_engine_that_dies_between_the_two_calls_ends_with_the_same_bits(
    start_front, datum, orders
):
    """It comes back without the graph: the plan is the same, and so are the results."""
    async with start_front(job="quiet") as client:
        model = await client.model()
        quiet = await custom_loss(client, datum, model, 1)
        stepped = await client.result(await client.optim_step(model, 7))
        expected = (quiet, stepped, await client.digest())
    orders.dies_at = [ForwardBackward]
    async with start_front(orders=orders, job="disturbed") as client:
        model = await client.model()
        results = await custom_loss(client, datum, model, 1)
        stepped = await client.result(await client.optim_step(model, 7))
        assert orders.num_started == 2
        assert told(client, "forward_backward") == ["recomputed"] * 3
        assert (results, stepped, await client.digest()) == expected
        assert (await client.status()).error is None


async def test_replay_executes_the_written_plan_and_finds_no_difference(start_front, datum, orders):
    async with start_front(orders=orders, crash=True) as client:
        model = await client.model()
        await custom_loss(client, datum, model, 1)
        digest = (await client.result(await client.optim_step(model, 7)), await client.digest())
    orders.seen.clear()
    async with start_front(orders=orders) as client:
        await client.result(await client.forward(model, 8))  # behind the recovery
        again = (await client.result(await client.optim_step(model, 7)), await client.digest())
        assert plans(orders, Forward) == [GraphUse.KEEP]
        assert plans(orders, ForwardBackward) == [GraphUse.REUSE] * 3
        assert again == digest
        assert (await client.status()).error is None


async def test_the_status_forgets_graphs_that_have_expired(start_front, datum):
    clock = ManualClock()
    async with start_front(clock=clock) as client:
        model = await client.model()
        await client.result(await client.forward(model, 1, data=chunk(datum, [1, 2, 3, 4])))
        held = (await client.status()).graphs
        assert (held.num_held, held.held_bytes) == (1, 3 * 64 * 4)
        clock.advance(300)
        assert (await client.status()).graphs.held_bytes == 0


# The rule alone ------------------------------------------------------------------------------


def test_a_kept_forward_is_reused_once_on_its_own_model():
    plans = GraphPlans()
    assert plans.use("a", FORWARD, "key") is GraphUse.KEEP
    assert plans.use("b", BACKWARD, "key") is GraphUse.NONE
    assert plans.use("a", BACKWARD, "key") is GraphUse.REUSE
    assert plans.use("a", BACKWARD, "key") is GraphUse.NONE


@pytest.mark.parametrize("kind", OperationKind)
def test_only_what_leaves_the_weights_alone_leaves_the_plan(kind):
    plans = GraphPlans()
    plans.use("a", FORWARD, "key")
    plans.use("a", kind, None)
    leaves = kind in {FORWARD, BACKWARD} or kind.value.startswith("save_weights")
    assert plans.use("a", BACKWARD, "key") is (GraphUse.REUSE if leaves else GraphUse.NONE)


def test_forwards_that_nothing_follows_are_forgotten_in_the_end():
    plans = GraphPlans()
    for number in range(5000):
        plans.use("a", FORWARD, str(number))
    assert plans.use("a", BACKWARD, "903") is GraphUse.NONE
    assert plans.use("a", BACKWARD, "904") is GraphUse.REUSE
