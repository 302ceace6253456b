"""Training with 16-bit compute weights and float32 masters, as on an accelerator; on a CPU here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from homefire.model.device import Numbers
from homefire.model.loading import load_model
from homefire.trainer.engine.engine import SlotEngine
from homefire.trainer.engine.gradient_aside import GradientAside
from homefire.trainer.engine.torch_engine import network_of, torch_engine
from homefire.wire.engine import ExecutionPlan, SlotKind
from homefire.wire.graphs import GraphUse


def narrow_engine() -> SlotEngine:
    def open_network(request):
        model = load_model(Path(request.model_dir), numbers=Numbers.SERVING)
        return network_of(model, request)

    return SlotEngine(open_network)


@pytest.fixture
def narrow(make_trainer_of):
    return lambda job="narrow", kind=SlotKind.FULL: make_trainer_of(narrow_engine, job).open(kind)


def gradient_of(trainer) -> dict[str, np.ndarray]:
    files = trainer.engine._slots.get("policy").trainable().files()
    assert {tensor.dtype for tensor in files.gradient.values()} == {"F32"}
    return {n: np.frombuffer(t.data.tobytes(), "<f4") for n, t in files.gradient.items()}


def weights_of(trainer):
    return trainer.engine._slots.get("policy").trainable()


def relative(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert found.keys() == expected.keys()
    difference = np.concatenate([found[name] - expected[name] for name in expected])
    return float(
        np.linalg.norm(difference) / np.linalg.norm(np.concatenate(list(expected.values())))
    )


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_gradients_are_float32_and_near_those_of_float32_weights(
    narrow, make_trainer_of, make_batch, kind
):
    ours, theirs = narrow(kind=kind), make_trainer_of(torch_engine, "wide").open(kind)
    batch = make_batch(1, lengths=(20, 30, 7))
    for trainer in (ours, theirs):
        trainer.backward(batch)
    assert relative(gradient_of(ours), gradient_of(theirs)) < 0.03


def test_masters_are_float32_and_the_compute_weights_their_rounding(narrow, make_batch):
    trainer = narrow()
    for seed in range(3):
        trainer.backward(make_batch(seed))
        trainer.step(learning_rate=1e-4)
    weights = weights_of(trainer)
    moved = 0
    for name, leaf in weights._leaves.items():
        master = weights._masters[name]
        assert (master.dtype, leaf.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(leaf.detach(), master.bfloat16())
        moved += int((master != leaf.detach().float()).sum())
    assert moved > 0, "steps smaller than a bfloat16 are kept by the masters"


def test_micro_batches_add_up_in_float32(narrow, make_batch):
    """Cut differently, the same rows have the same gradient but for the rounding of each pass."""
    batch = make_batch(1, lengths=[6] * 12)
    whole, cut = narrow("job-1"), narrow("job-2")
    whole.backward(batch, plan=ExecutionPlan(micro_batches=[list(range(12))], threads=1))
    cut.backward(batch, plan=ExecutionPlan(micro_batches=[[row] for row in range(12)], threads=1))
    assert relative(gradient_of(cut), gradient_of(whole)) < 0.01


def test_a_sum_of_many_small_gradients_is_not_lost():
    """In bfloat16, 256 + 1 is 256: the planted mistake is a leaf without the hook."""
    leaf, plain = (torch.zeros(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    aside = GradientAside({"w": leaf})
    for gradient in (256.0, *[1.0] * 100):
        for each in (leaf, plain):
            (each * gradient).sum().backward()
    assert aside.take()["w"].tolist() == [356.0] * 4
    assert plain.grad.tolist() == [256.0] * 4
    assert leaf.grad is None
    aside.close()
    leaf.sum().backward()
    assert leaf.grad.tolist() == [1.0] * 4
    assert aside.take() == {}


def test_float32_leaves_are_left_alone():
    leaf = torch.zeros(2, requires_grad=True)
    aside = GradientAside({"w": leaf})
    leaf.sum().backward()
    assert aside.take() == {}
    assert leaf.grad.tolist() == [1.0, 1.0]


def test_a_failed_pass_leaves_nothing_aside(narrow, make_batch):
    trainer, undisturbed = narrow("job-1"), narrow("job-2")
    bad = make_batch(1, lengths=(5, 5))
    bad["weights"][7] = float("nan")
    with pytest.raises(Exception, match="nan"):
        trainer.backward(bad)
    for each in (trainer, undisturbed):
        each.backward(make_batch(2))
    assert relative(gradient_of(trainer), gradient_of(undisturbed)) == 0


def test_a_kept_graph_ends_with_the_bits_of_one_pass(narrow, make_batch):
    kept, at_once = narrow("job-1"), narrow("job-2")
    batch = make_batch(3, lengths=(9, 14))
    plan = {use: ExecutionPlan(micro_batches=[[0, 1]], threads=1, graph=use) for use in GraphUse}
    kept.forward(batch, plan=plan[GraphUse.KEEP])
    kept.backward(batch, plan=plan[GraphUse.REUSE])
    at_once.backward(batch, plan=plan[GraphUse.NONE])
    assert relative(gradient_of(kept), gradient_of(at_once)) < 1e-6
