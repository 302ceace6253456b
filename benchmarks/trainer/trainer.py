"""The engine in this process, behind the verbs that the front sends it."""

from __future__ import annotations

from pathlib import Path

import torch
from batches import SHAPES, make_batch, plan_of
from models import Model

from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    Arrays,
    DiscardGradients,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    PackedForwardBackward,
    SlotKind,
    by_member,
)

RANK = 32


class InProcess:
    """One engine on one model, with one thread."""

    def __init__(self, model: Model, root: Path) -> None:
        self.model = model
        self.engine = torch_engine()
        self.engine.open_model(
            OpenModel(
                model_dir=str(model.directory),
                base_model=model.name,
                store_root=str(root / "store"),
                account="local",
                job="bench",
                threads=1,
                max_context_length=2048,
            )
        )

    def open_full(self) -> str:
        self.engine.open_slot(OpenSlot(slot="full", kind=SlotKind.FULL))
        return "full"

    def open_lora(self, number: int = 0) -> str:
        """On every linear layer but the head, as `peft`'s usual target modules are."""
        spec = LoraSpec(rank=RANK, seed=number, train_unembed=False)
        self.engine.open_slot(OpenSlot(slot=f"lora{number}", kind=SlotKind.LORA, lora=spec))
        return f"lora{number}"

    def forward(self, slot: str, batch: Arrays, plan: ExecutionPlan | None = None) -> Arrays:
        request = Forward(
            slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=plan or plan_of(batch)
        )
        return self.engine.forward(request, batch)[1]

    def forward_backward(
        self, slot: str, batch: Arrays, plan: ExecutionPlan | None = None
    ) -> Arrays:
        """Its gradient is thrown away, so that runs do not differ in what they add to."""
        reply = self.engine.forward_backward(_request(slot, plan or plan_of(batch)), batch)[1]
        self.engine.discard_gradients(DiscardGradients(slot))
        return reply

    def warm_up(self, slot: str) -> None:
        """Code and memory, which who runs first would pay for."""
        self.forward_backward(slot, make_batch(SHAPES["8x128"], self.model.vocab_size))

    def accumulate(self, slot: str) -> None:
        """The gradient of one short row, kept for a step."""
        batch = make_batch([32], self.model.vocab_size)
        self.engine.forward_backward(_request(slot, plan_of(batch)), batch)

    def forward_backward_packed(self, members: list[tuple[str, Arrays]]) -> None:
        """One pass over the rows of several slots."""
        requests = [_request(slot, plan_of(batch)) for slot, batch in members]
        arrays = by_member([batch for _, batch in members])
        self.engine.forward_backward_packed(PackedForwardBackward(members=requests), arrays)
        for slot, _ in members:
            self.engine.discard_gradients(DiscardGradients(slot))

    def step(self, slot: str) -> None:
        adam = AdamParams(learning_rate=1e-6, grad_clip_norm=1.0)
        self.engine.optim_step(OptimStep(slot=slot, adam=adam))


def _request(slot: str, plan: ExecutionPlan) -> ForwardBackward:
    return ForwardBackward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=plan)


def one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
