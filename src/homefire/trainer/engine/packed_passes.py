"""A forward_backward of several slots in one packed pass; each member succeeds or fails alone.

The k-th micro-batches of all members are one pass. A member whose request is wrong takes no part; one
whose loss breaks on the way stays in the passes to come, with no gradient, so that the shape of what
the others compute, and every bit of it, is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from homefire.trainer.engine.batch import Batch, MicroBatch, micro_batches
from homefire.trainer.engine.losses import Loss, LossTerms, evaluate, is_per_token, metrics
from homefire.trainer.engine.network import Float32, Network, Part, SpanGradientOf, TrainableWeights
from homefire.trainer.engine.slots import Slot
from homefire.wire.engine import Arrays, Failure, ForwardBackward, Rows
from homefire.wire.errors import ErrorRecord, FailedPrecondition, HomefireError, InvalidArgument

MemberReply = tuple[Rows | Failure, Arrays]


@dataclass
class Member:
    """One request of a pack, checked, and what has become of it so far."""

    slot: Slot
    loss: Loss
    batch: Batch
    cuts: list[MicroBatch]
    is_per_token: bool
    """The loss's derivative at a token depends on that token alone."""
    error: HomefireError | None = None
    logprobs: Float32 = field(init=False)
    """[T, K] in the order of the request."""
    terms: LossTerms = field(init=False)
    """Once all of it ran without an error."""

    def __post_init__(self) -> None:
        self.logprobs = np.zeros(self.batch.targets.shape, np.float32)

    @property
    def weights(self) -> TrainableWeights:
        return self.slot.trainable()


def member(slot: Slot, request: ForwardBackward, loss: Loss, batch: Batch) -> Member:
    """InvalidArgument when the plan is not one of this batch."""
    cuts = list(micro_batches(batch, request.plan))
    return Member(slot, loss, batch, cuts, is_per_token(request.loss_fn))


def check_slots(slots: Sequence[Slot]) -> None:
    """That these slots can be members of one pack."""
    if not slots:
        raise InvalidArgument("a pack has no members", field="members")
    if len({slot.name for slot in slots}) != len(slots):
        raise InvalidArgument("a slot is twice in one pack", field="members")
    for slot in slots:
        if not slot.shares_passes:
            raise FailedPrecondition(f"slot {slot.name!r} shares no pass with others")


def or_failure(prepare: Callable[[], Member]) -> Member | Failure:
    """What is wrong with one request is no matter of the others."""
    try:
        return prepare()
    except HomefireError as error:
        return Failure(ErrorRecord.of(error))


def backward(network: Network, members: Sequence[Member | Failure]) -> list[MemberReply]:
    """Runs all of it; replies in the members' order. Gradients of those that went well are kept."""
    running = [m for m in members if isinstance(m, Member)]
    try:
        for together in zip_longest(*(m.cuts for m in running)):
            _run(network, [(m, cut) for m, cut in zip(running, together, strict=True) if cut])
        for m in running:
            _judge(m)
        return [(m, {}) if isinstance(m, Failure) else _reply(m) for m in members]
    finally:
        for m in running:
            m.weights.drop_gradient()


def keep(slot: Slot, terms: LossTerms, batch: Batch, logprobs: Float32) -> tuple[Rows, Arrays]:
    """The reply of a backward pass that went well; what lies aside becomes the slot's gradient."""
    counted = (terms.gradient != 0).any(-1)
    rows = sum(bool(counted[row].any()) for row in batch.rows())
    if not rows:
        slot.trainable().drop_gradient()  # the zeros that a pass for others leaves
    slot.keep_gradient(int(counted.sum()), rows)
    return Rows(metrics=metrics(terms)), {"logprobs": logprobs}


def _run(network: Network, together: Sequence[tuple[Member, MicroBatch]]) -> None:
    parts = [
        Part(m.weights, cut.batch.packed(), _gradient_of(m, cut), m.is_per_token)
        for m, cut in together
    ]
    found = network.backward_together(parts)
    for (m, cut), logprobs in zip(together, found, strict=True):
        m.logprobs[cut.places] = logprobs


def _gradient_of(m: Member, cut: MicroBatch) -> SpanGradientOf:
    def gradient_of(logprobs: Float32, span: slice) -> Float32:
        rows = cut.batch.span(span) if m.is_per_token else cut.batch
        try:
            return evaluate(m.loss, logprobs, rows).gradient.astype(np.float32)
        except HomefireError as error:
            m.error = m.error or error
            return np.zeros_like(logprobs)

    return gradient_of


def _judge(m: Member) -> None:
    """All members before any is kept: what breaks here must not leave half a pack."""
    try:
        m.terms = evaluate(m.loss, m.logprobs, m.batch)
    except HomefireError as error:
        m.error = m.error or error


def _reply(m: Member) -> MemberReply:
    if m.error is not None:
        return Failure(ErrorRecord.of(m.error)), {}
    return keep(m.slot, m.terms, m.batch, m.logprobs)
