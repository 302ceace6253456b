"""Which requests run as one packed pass, and running them: forward_backwards of different slots.

Nothing is ever waited for: only what is queued joins. Together they fill one micro-batch at most: above
that a pass has all that packing gives, and every member waits for the whole of it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from homefire.trainer.front.engine_process import expect
from homefire.trainer.front.live_model import LiveModel, pass_outcome
from homefire.trainer.front.operations import OperationKind, RunPass
from homefire.trainer.front.outcome import Outcome, failed
from homefire.trainer.front.records import Handle
from homefire.trainer.front.sessions import Ledger, Request, refusal_of
from homefire.trainer.front.validation import Batch
from homefire.wire.engine import (
    Arrays,
    ExecutionPlan,
    Failure,
    ForwardBackward,
    PackedForwardBackward,
    Rows,
    RowsByMember,
    by_member,
    of_member,
)
from homefire.wire.errors import FailedPrecondition, HomefireError, InternalError
from homefire.wire.graphs import GraphUse


@dataclass(frozen=True)
class Member:
    """One request of a pack, checked."""

    request: Request
    operation: RunPass
    handle: Handle
    plan: ExecutionPlan
    batch: Batch

    @property
    def num_tokens(self) -> int:
        return len(self.batch.arrays["tokens"])


async def pack_of(
    waiting: Sequence[Request],
    ledger: Ledger,
    model: LiveModel,
    *,
    token_budget: int,
    apart: Container[str],
) -> list[Member]:
    """The first request and those behind it that join it; fewer than two: it runs alone.

    `waiting` has the next request of each slot, one per slot. Requests `apart` have ended an engine
    before.
    """
    candidates = [
        request
        for request in waiting
        if request.request_id not in apart
        and _may_join(request, ledger.handles[request.model_id], model)
    ]
    if len(candidates) < 2 or candidates[0] is not waiting[0]:
        return []
    pack: list[Member] = []
    num_tokens = 0
    for request in candidates:
        try:
            found = await member_of(request, ledger.handles[request.model_id], model)
        except HomefireError:
            found = None
        if found is None and not pack:
            return []
        if found is None or found.plan.threads != (pack or [found])[0].plan.threads:
            continue
        if not pack or num_tokens + found.num_tokens <= token_budget:
            pack.append(found)
            num_tokens += found.num_tokens
    return pack


def _may_join(request: Request, handle: Handle, model: LiveModel) -> bool:
    return (
        request.kind is OperationKind.FORWARD_BACKWARD
        and request.plan is not None
        and len(request.plan.micro_batches) == 1
        and request.plan.graph is GraphUse.NONE
        and not request.was_packed
        and request.missing is None
        and not handle.own_passes
        and refusal_of(handle) is None
        and model.shares_passes(handle.slot)
    )


async def member_of(request: Request, handle: Handle, model: LiveModel) -> Member:
    """Raises what is wrong with the request, or why it is never packed."""
    operation = await model.ahead.operation(request)
    if not isinstance(operation, RunPass) or request.plan is None:
        raise InternalError(f"{request.request_id} is not a pass with a plan")
    batch = await model.ahead.batch(request, operation)
    if not batch.shapes:
        raise FailedPrecondition("passes that end in embeddings are not packed")
    return Member(request, operation, handle, request.plan, batch)


async def run_pack(pack: Sequence[Member], model: LiveModel) -> list[Outcome]:
    """What became of each member. A HomefireError: nothing ran, and each may be tried alone."""
    message = PackedForwardBackward(members=[_message(member) for member in pack])
    arrays = by_member([member.batch.arrays for member in pack])
    reply, found = await model.engine.call(message, arrays)
    rows = expect(reply, RowsByMember).members
    if len(rows) != len(pack):
        raise InternalError(f"the engine answered {len(rows)} members of a pack of {len(pack)}")
    return [
        _outcome(member, reply, of_member(number, found))
        for number, (member, reply) in enumerate(zip(pack, rows, strict=True))
    ]


def _message(member: Member) -> ForwardBackward:
    body = member.operation.body
    return ForwardBackward(
        slot=member.handle.slot,
        loss_fn=body.loss_fn,
        loss_fn_config=body.loss_fn_config,
        plan=member.plan,
    )


def _outcome(member: Member, reply: Rows | Failure, arrays: Arrays) -> Outcome:
    if isinstance(reply, Failure):
        return failed(reply.error.exception())
    return pass_outcome(member.operation, member.batch, reply, arrays)
