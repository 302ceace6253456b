"""Pooled embeddings, what is computed on them, and the likeliest tokens: against plain references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from homefire.checkpoints import ensure_tiny
from homefire.trainer.engine import embeddings
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
)
from homefire.wire.errors import LengthMismatch, NonFiniteGradient
from homefire.wire.pass_extras import Contrast

transformers_logging.disable_progress_bar()
LENGTHS = (7, 12, 3, 12, 5)
PLAN = ExecutionPlan(micro_batches=[[1, 3], [4, 0, 2]], threads=1)
CONTRAST = {"num_queries": 2, "temperature": 0.2, "num_extra_negatives": 1}


# The objectives, in float64 -------------------------------------------------------------------


def cosines(E):
    U = torch.nn.functional.normalize(E, dim=1)
    return U @ U.T


def info_nce(E, num_queries, temperature, num_extra_negatives=0):
    B = num_queries
    logits = cosines(E)[:B, B:] / temperature
    own = torch.arange(B)
    forth = torch.nn.functional.cross_entropy(logits, own)
    back = torch.nn.functional.cross_entropy(logits[:, :B].T, own)
    return (forth + back) / 2


def rows_of(seed, num_rows, width=4):
    return np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_queries=st.integers(1, 4),
    temperature=st.sampled_from([0.01, 0.3, 2.0]),
    num_extra_negatives=st.integers(0, 3),
)
def test_contrastive_value_and_gradient_equal_the_reference(
    seed, num_queries, temperature, num_extra_negatives
):
    contrast = Contrast(num_queries, temperature, num_extra_negatives)
    E = rows_of(seed, contrast.num_rows)
    ours = embeddings.contrastive(E, contrast)
    theirs = torch.from_numpy(E.astype(np.float64)).requires_grad_()
    loss = info_nce(theirs, num_queries, temperature, num_extra_negatives)
    (gradient,) = torch.autograd.grad(loss, theirs)
    assert ours.metrics["loss"] == pytest.approx(loss.item(), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(ours.gradient, gradient.numpy(), rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_rows=st.integers(1, 5))
def test_the_gradient_through_cosines_equals_the_reference(seed, num_rows):
    E, slope = rows_of(seed, num_rows), rows_of(seed + 1, num_rows, num_rows)
    ours = embeddings.given_cosine_gradient(E, slope)
    theirs = torch.from_numpy(E.astype(np.float64)).requires_grad_()
    loss = (cosines(theirs) * torch.from_numpy(slope.astype(np.float64))).sum()
    (gradient,) = torch.autograd.grad(loss, theirs)
    assert ours.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(ours.gradient, gradient.numpy(), rtol=1e-9, atol=1e-12)


def test_the_contrastive_gradient_equals_finite_differences():
    contrast = Contrast(num_queries=2, temperature=0.5, num_extra_negatives=1)
    E = rows_of(0, contrast.num_rows).astype(np.float64)
    gradient = embeddings.contrastive(E, contrast).gradient
    for index in np.ndindex(*E.shape):
        step = np.zeros_like(E)
        step[index] = 1e-6
        above, below = (embeddings.contrastive(E + s, contrast) for s in (step, -step))
        slope = (above.metrics["loss"] - below.metrics["loss"]) / 2e-6
        assert gradient[index] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_an_embedding_of_no_direction_is_named():
    E = np.array([[1, 0], [0, 0]], np.float32)
    with pytest.raises(NonFiniteGradient, match="row 1 has norm 0"):
        embeddings.cosine_matrix(E)


# Through the network --------------------------------------------------------------------------


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


@pytest.fixture
def arrays():
    generator = np.random.default_rng(3)
    total = sum(LENGTHS)
    return {
        "tokens": generator.integers(0, 320, total).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": generator.integers(0, 320, (total, 1)),
    }


def hugging_face(directory: Path):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def states(module, arrays):
    """The last hidden states of each row alone."""
    rows = torch.from_numpy(arrays["tokens"].astype(np.int64)).split(LENGTHS)
    return [module.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]


def pooled(module, arrays, pooling):
    pool = {"mean": lambda row: row.mean(0), "last": lambda row: row[-1]}[pooling]
    return torch.stack([pool(row) for row in states(module, arrays)])


def request(kind, **config):
    return kind(slot="policy", loss_fn="cross_entropy", loss_fn_config=config, plan=PLAN)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("output", ["embedding", "cos_similarity_matrix"])
def test_forward_equals_hugging_face_row_by_row(engine, arrays, tiny_directory, output, pooling):
    _, reply = engine.forward(request(Forward, output=output, pooling=pooling), arrays)
    with torch.no_grad():
        theirs = pooled(hugging_face(tiny_directory), arrays, pooling)
        theirs = cosines(theirs) if output == "cos_similarity_matrix" else theirs
    np.testing.assert_allclose(reply["embedding"], theirs.numpy(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("output", ["embedding", "cos_similarity_matrix", "contrastive_loss"])
def test_gradients_equal_autograd_through_hugging_face(
    engine, arrays, tiny_directory, output, pooling
):
    module = hugging_face(tiny_directory)
    E = pooled(module, arrays, pooling)
    if output == "contrastive_loss":
        loss, given, config = info_nce(E, **CONTRAST), {}, CONTRAST
    else:
        made = cosines(E) if output == "cos_similarity_matrix" else E
        slope = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
        loss, given, config = (made * slope).sum(), {"embedding_grads": slope.numpy()}, {}
    loss.backward()
    asked = request(ForwardBackward, output=output, pooling=pooling, **config)
    rows, _ = engine.forward_backward(asked, {**arrays, **given})
    assert rows.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
    ours = engine._slots.get("policy").trainable()._gradient
    theirs = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=5e-5 * scale, rtol=0, msg=name)


def test_training_on_the_contrastive_loss_pairs_the_rows(engine, arrays):
    asked = request(ForwardBackward, output="contrastive_loss", pooling="mean", **CONTRAST)
    losses = []
    for _ in range(8):
        losses.append(engine.forward_backward(asked, arrays)[0].metrics["loss"])
        engine.optim_step(OptimStep(slot="policy", adam=AdamParams(learning_rate=1e-3)))
    assert losses[-1] < 0.5 * losses[0]


def test_a_gradient_of_another_shape_than_the_output_changes_nothing(engine, arrays):
    asked = request(ForwardBackward, output="embedding", pooling="mean")
    wrong = {**arrays, "embedding_grads": np.ones((5, 3), np.float32)}
    with pytest.raises(LengthMismatch, match=r"\[5, 3\], the output \[5, 128\]"):
        engine.forward_backward(asked, wrong)
    assert engine._slots.get("policy").accumulated.num_backward_calls == 0


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.REFERENCE])
def test_the_likeliest_tokens_equal_hugging_face(engine, arrays, tiny_directory, kind):
    if kind is SlotKind.REFERENCE:
        engine.open_slot(OpenSlot(slot="reference", kind=kind))
    asked = Forward(
        slot="policy" if kind is SlotKind.FULL else "reference",
        loss_fn="cross_entropy",
        loss_fn_config={"top_k": 5.0},
        plan=PLAN,
    )
    _, reply = engine.forward(asked, arrays)
    module = hugging_face(tiny_directory)
    with torch.no_grad():
        logprobs = module.lm_head(torch.cat(states(module, arrays))).log_softmax(-1)
    best = logprobs.topk(5).values
    np.testing.assert_allclose(reply["top_k_logprobs"], best.numpy(), atol=1e-5, rtol=0)
    at_ids = logprobs.gather(-1, torch.from_numpy(reply["top_k_indices"]))
    np.testing.assert_allclose(at_ids.numpy(), best.numpy(), atol=1e-5, rtol=0)
    assert reply["logprobs"].shape == (sum(LENGTHS), 1)
