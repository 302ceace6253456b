"""An out-of-memory error is injected where a device would raise it; no accelerator is needed."""

from __future__ import annotations

import msgspec
import pytest
import torch

from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    ForwardBackward,
    PackedForwardBackward,
    Rows,
    SlotKind,
    by_member,
)
from homefire.wire.errors import OutOfMemory
from homefire.wire.graphs import GraphUse
from unit.trainer.engine.conftest import plan_of


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


def a_layer_that_runs_out_when_it_keeps_activations(trainer, *, calls):
    """As a device whose memory is just enough to recompute: only such a layer's forward has a node of
    its input's own behind it."""

    def check(module, inputs):
        is_kept = torch.is_grad_enabled() and "forward" not in vars(module)
        calls.append("kept" if is_kept else "recomputed")
        if is_kept:
            run_out()

    return a_layer(trainer).register_forward_pre_hook(check)


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_a_batch_that_fits_only_without_its_activations_is_run_again_with_the_same_bits(
    make_torch_trainer, make_batch, kind
):
    trainer, undisturbed = (make_torch_trainer(job, kind).train(0) for job in ("job-1", "job-2"))
    calls = []
    hook = a_layer_that_runs_out_when_it_keeps_activations(trainer, calls=calls)
    batch = make_batch(2, lengths=(9, 30, 7))
    _, ours = trainer.backward(batch)
    _, theirs = undisturbed.backward(batch)
    hook.remove()
    assert calls == ["kept", "recomputed", "recomputed"]
    assert ours["logprobs"].tolist() == theirs["logprobs"].tolist()
    assert (trainer.step().metrics, trainer.digest()) == (
        undisturbed.step().metrics,
        undisturbed.digest(),
    )


def test_a_pack_is_run_again_as_well(make_torch_trainer, make_batch):
    engines = [make_torch_trainer(job, SlotKind.LORA) for job in ("job-1", "job-2")]
    calls = []
    for trainer in engines:
        trainer.open(SlotKind.LORA, slot="other")
    hook = a_layer_that_runs_out_when_it_keeps_activations(engines[0], calls=calls)
    batches = [make_batch(1), make_batch(2)]
    requests = [
        ForwardBackward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=plan_of(batch))
        for slot, batch in zip(("policy", "other"), batches, strict=True)
    ]
    for trainer in engines:
        message = PackedForwardBackward(members=requests)
        reply, _ = trainer.engine.forward_backward_packed(message, by_member(batches))
        assert all(isinstance(member, Rows) for member in reply.members)
    hook.remove()
    assert "recomputed" in calls
    assert engines[0].step().metrics == engines[1].step().metrics
    assert engines[0].digest() == engines[1].digest()


def test_kept_graphs_make_way_for_the_second_attempt(make_torch_trainer, make_batch):
    trainer = make_torch_trainer("job-1", SlotKind.FULL)
    batch = make_batch(2)
    keeping = msgspec.structs.replace(plan_of(batch), graph=GraphUse.KEEP)
    rows, _ = trainer.forward(batch, plan=keeping)
    assert rows.held.num_passes == 1
    a_layer_that_runs_out_when_it_keeps_activations(trainer, calls=[])
    rows, _ = trainer.backward(batch)
    assert rows.held.num_passes == 0
