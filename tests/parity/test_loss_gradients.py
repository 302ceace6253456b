"""Every loss through the network: the gradient of each parameter against float64 autograd through the
plain Hugging Face model and the references of `test_losses_parity`, in packed micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from homefire.trainer.engine.batch import read_batch
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import ExecutionPlan, ForwardBackward, OpenModel, OpenSlot, SlotKind
from parity.sampler_models import small_qwen3
from parity.test_losses_parity import CASES, cross_entropy

VOCABULARY = 97
LENGTHS = (6, 11, 1, 9)
PLAN = ExecutionPlan(micro_batches=[[1], [3, 2, 0]], threads=1)
TOLERANCE = 2e-5
"""Of the largest element of a parameter's gradient; and of a logprob, in nats."""
PARAMETERS = [(*case, 1) for case in CASES] + [(cross_entropy, {}, (), 3)]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    return small_qwen3(tmp_path_factory.getbasetemp(), tied=True, seed=1)


@pytest.fixture(scope="module")
def engine(model_directory, tmp_path_factory):
    engine = torch_engine()
    engine.open_model(
        OpenModel(
            model_dir=str(model_directory),
            base_model="small",
            store_root=str(tmp_path_factory.mktemp("store")),
            account="local",
            job="job-1",
            threads=1,
            max_context_length=64,
        )
    )
    engine.open_slot(OpenSlot(slot="policy", kind=SlotKind.FULL))
    return engine


@pytest.fixture(scope="module")
def module(model_directory):
    """In float64; the weights are bfloat16 values, so both compute with the same ones."""
    return AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def target_logprobs(module, arrays):
    """[T, K] of each row alone, differentiable."""
    tokens = torch.from_numpy(arrays["tokens"].astype(np.int64)).split(LENGTHS)
    targets = torch.from_numpy(arrays["target_tokens"]).split(LENGTHS)
    rows = zip(tokens, targets, strict=True)
    found = [
        module(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1).gather(-1, target)
        for row, target in rows
    ]
    return torch.cat(found)


def batch_of(module, num_targets: int, per_token: tuple[str, ...]):
    """Behaviour logprobs near the learner's, so that some ratios are clipped and some are not."""
    generator = np.random.default_rng(7)
    shape = sum(LENGTHS), num_targets
    masked = generator.integers(0, 4, shape) > 0
    arrays = {
        "tokens": generator.integers(0, VOCABULARY, shape[0]).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": generator.integers(0, VOCABULARY, shape),
        "weights": generator.standard_normal(shape).astype(np.float32),
    }
    if num_targets == 1:
        with torch.no_grad():
            logprobs = target_logprobs(module, arrays).numpy()
        arrays["logprobs"] = (logprobs + generator.normal(0, 0.4, shape)).astype(np.float32)
        arrays["advantages"] = (generator.standard_normal(shape) * masked).astype(np.float32)
        arrays["advantages"][sum(LENGTHS[:2])] = 1.0  # the row of one token is not masked
        per_token_values = {
            "clip_low_threshold": generator.uniform(0.5, 1, shape),
            "clip_high_threshold": generator.uniform(1, 1.6, shape),
            "sequence_ratio_mask": arrays["advantages"] != 0,
        }
        for name in per_token:
            arrays[name] = per_token_values[name].astype(np.float32)
    return arrays


@pytest.mark.parametrize(("reference", "config", "per_token", "num_targets"), PARAMETERS)
def test_the_gradient_of_every_parameter_is_the_reference_s(
    engine, module, reference, config, per_token, num_targets
):
    arrays = batch_of(module, num_targets, per_token)
    request = ForwardBackward(
        slot="policy", loss_fn=reference.__name__, loss_fn_config=config, plan=PLAN
    )
    weights = engine._slots.get("policy").trainable()
    weights.clear_gradient()
    rows, reply = engine.forward_backward(request, arrays)

    module.zero_grad()
    logprobs = target_logprobs(module, arrays)
    batch = read_batch(arrays, vocab_size=VOCABULARY, max_context_length=64)
    inputs = {name: torch.from_numpy(x.astype(np.float64)) for name, x in batch.inputs.items()}
    loss = reference(logprobs, inputs, batch.rows(), **config)
    loss.backward()

    assert np.abs(reply["logprobs"] - logprobs.detach().numpy()).max() < TOLERANCE
    assert rows.metrics["loss:sum"] == pytest.approx(loss.item(), abs=1e-4)
    theirs = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert weights._gradient.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = float((weights._gradient[name].double() - gradient).abs().max())
        assert error < TOLERANCE * float(gradient.abs().max()), name
