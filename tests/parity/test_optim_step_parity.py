"""A whole step against transformers, autograd and torch's AdamW: several forward_backward calls,
normalization, clipping, and what the step says about its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from homefire.checkpoints import ensure_tiny
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    ExecutionPlan,
    ForwardBackward,
    GradNormalization,
    GradNormMetrics,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
)
from homefire.wire.errors import InvalidArgument, NonFiniteGradient

transformers_logging.disable_progress_bar()
ADAM = AdamParams(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, grad_clip_norm=0.05)
"""A large eps: where Adam takes the sign of a tiny gradient, summation order would show."""
BATCHES = [
    ([[5, 6, 7, 8], [9, 10]], [[1.0, 0.0, 2.0, 1.0], [0.0, 0.0]]),
    ([[11, 12, 13]], [[0.5, -1.0, 0.0]]),
    ([[20, 21]], [[0.0, 0.0]]),
]
"""Rows and weights of three calls; the last one adds nothing."""
NUM_LOSS_TOKENS, NUM_SEQUENCES = 5, 2


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def engine(tiny_directory, tmp_path):
    engine = torch_engine()
    engine.open_model(
        OpenModel(
            model_dir=str(tiny_directory),
            base_model="tiny",
            store_root=str(tmp_path),
            account="local",
            job="job-1",
            threads=1,
            max_context_length=64,
        )
    )
    engine.open_slot(OpenSlot(slot="policy", kind=SlotKind.FULL))
    return engine


def backward(engine, rows, weights):
    """Each row predicts its tokens plus one."""
    tokens = np.concatenate([np.array(row, np.int32) for row in rows])
    arrays = {
        "tokens": tokens,
        "lengths": np.array([len(row) for row in rows], np.int32),
        "target_tokens": tokens.astype(np.int64)[:, None] + 1,
        "weights": np.concatenate(weights).astype(np.float32)[:, None],
    }
    plan = ExecutionPlan(micro_batches=[[index] for index in range(len(rows))], threads=1)
    engine.forward_backward(
        ForwardBackward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan),
        arrays,
    )


def reference(directory, divisor):
    """The parameters after the step, and the norm of the gradient before clipping."""
    module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    for rows, weights in BATCHES:
        for row, weight in zip(rows, weights, strict=True):
            tokens = torch.tensor([row])
            logprobs = module(input_ids=tokens).logits[0].log_softmax(-1)
            chosen = logprobs.gather(-1, tokens.T + 1)[:, 0]
            (-(chosen * torch.tensor(weight)).sum() / divisor).backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), ADAM.grad_clip_norm)
    torch.optim.AdamW(
        module.parameters(),
        lr=ADAM.learning_rate,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        weight_decay=ADAM.weight_decay,
    ).step()
    return dict(module.named_parameters()), float(norm)


@pytest.mark.parametrize(
    ("normalization", "divisor"),
    [
        (GradNormalization.NONE, 1),
        (GradNormalization.NUM_LOSS_TOKENS, NUM_LOSS_TOKENS),
        (GradNormalization.NUM_SEQUENCES, NUM_SEQUENCES),
    ],
)
def test_calls_add_up_are_normalized_clipped_and_stepped_as_in_torch(
    engine, tiny_directory, normalization, divisor
):
    for rows, weights in BATCHES:
        backward(engine, rows, weights)
    stepped = engine.optim_step(
        OptimStep(slot="policy", adam=ADAM, normalization=normalization)
    ).metrics
    theirs, norm = reference(tiny_directory, divisor)
    assert norm > ADAM.grad_clip_norm
    assert stepped["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert stepped["num_loss_tokens"] == NUM_LOSS_TOKENS
    assert stepped["num_sequences"] == NUM_SEQUENCES
    assert stepped["num_backward_calls"] == 3
    masters = engine._slots.get("policy").trainable()._masters
    for name, master in masters.items():
        torch.testing.assert_close(master, theirs[name].detach(), atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("asked", list(GradNormMetrics))
def test_norms_of_a_step_are_those_of_its_gradient(engine, asked):
    for rows, weights in BATCHES:
        backward(engine, rows, weights)
    weights = engine._slots.get("policy").trainable()
    gradient = {name: g.double() for name, g in weights._gradient.items()}
    total = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    master_norm = math.sqrt(
        sum(float(m.double().square().sum()) for m in weights._masters.values())
    )
    before = {name: master.clone() for name, master in weights._masters.items()}
    metrics = engine.optim_step(OptimStep(slot="policy", adam=ADAM, norm_metrics=asked)).metrics
    moved = {name: before[name].double() - m.double() for name, m in weights._masters.items()}
    update_norm = math.sqrt(sum(float(m.square().sum()) for m in moved.values()))
    rounded = [before[name].bfloat16() != m.bfloat16() for name, m in weights._masters.items()]
    changed = sum(int(mask.sum()) for mask in rounded) / sum(mask.numel() for mask in rounded)
    assert metrics["grad_norm"] == pytest.approx(total)
    assert metrics["update_norm"] == pytest.approx(update_norm, rel=1e-4)
    assert metrics["changed_fraction"] == pytest.approx(changed, rel=1e-12)
    assert 0.1 < changed < 1
    assert metrics["learning_rate"] == ADAM.learning_rate
    basic = {
        "grad_norm_clipped": pytest.approx(ADAM.grad_clip_norm, rel=1e-4),
        "grad_clip_scale": pytest.approx(ADAM.grad_clip_norm / total, rel=1e-4),
        "grad_max_abs": max(float(g.abs().max()) for g in gradient.values()),
        "weight_norm": pytest.approx(master_norm),
    }
    detailed = {f"grad_norm/{name}": pytest.approx(float(g.norm())) for name, g in gradient.items()}
    expected = {"off": {}, "basic": basic, "detailed": basic | detailed}[asked.value]
    common = {
        "grad_norm",
        "update_norm",
        "changed_fraction",
        "learning_rate",
        "num_loss_tokens",
        "num_sequences",
        "num_backward_calls",
    }
    assert {name: value for name, value in metrics.items() if name not in common} == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_not_stepped(engine, value):
    backward(engine, *BATCHES[0])
    weights = engine._slots.get("policy").trainable()
    name = "model.layers.1.mlp.up_proj.weight"
    weights._gradient[name][0, 0] = value
    before = {key: master.clone() for key, master in weights._masters.items()}
    with pytest.raises(NonFiniteGradient, match=name):
        engine.optim_step(OptimStep(slot="policy", adam=ADAM))
    assert all(torch.equal(before[key], master) for key, master in weights._masters.items())
    assert weights._gradient == {}
    assert weights._adam.updates == 0


def test_an_eps_that_float32_cannot_hold_is_refused(engine):
    """0 / 0 would make NaN of every weight without a gradient."""
    with pytest.raises(InvalidArgument, match=r"eps is 0\.0"):
        engine.optim_step(OptimStep(slot="policy", adam=AdamParams(eps=0.0)))
