"""An out-of-memory error is injected where a device would raise it; no accelerator is needed."""

from __future__ import annotations

import pytest
import torch

from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import SlotKind
from homefire.wire.errors import OutOfMemory


def run_out(*_):
    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")


@pytest.fixture
def make_torch_trainer(make_trainer_of):
    return lambda job, kind: make_trainer_of(torch_engine, job).open(kind)


def a_layer(trainer):
    return trainer.engine._network._model.backbone.layers[2]


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_batch_that_does_not_fit_fails_alone_and_the_next_is_exact(
    make_torch_trainer, make_batch, kind, phase
):
    trainer, undisturbed = (make_torch_trainer(job, kind).train(0) for job in ("job-1", "job-2"))
    for each in (trainer, undisturbed):
        each.backward(make_batch(1))
    register = {
        "forward": a_layer(trainer).register_forward_hook,
        "backward": a_layer(trainer).register_full_backward_hook,
    }[phase]
    hook = register(run_out)
    with pytest.raises(OutOfMemory, match=r"2\.00 GiB.*nothing was accumulated"):
        trainer.backward(make_batch(2, lengths=(9, 30, 7)))
    hook.remove()
    for each in (trainer, undisturbed):
        each.backward(make_batch(3))
        each.step()
    assert trainer.digest() == undisturbed.digest()


def test_a_step_that_runs_out_of_memory_ends_the_engine(make_torch_trainer, make_batch):
    """Half of the weights are stepped: only a start from the journal gives the state back."""
    trainer = make_torch_trainer("job-1", SlotKind.FULL)
    trainer.backward(make_batch(0))
    weights = trainer.engine._slots.get("policy").trainable()
    weights._adam = RunsOut()
    with pytest.raises(SystemExit, match="middle of a step"):
        trainer.step()


class RunsOut:
    def step(self, *_, **__):
        run_out()
