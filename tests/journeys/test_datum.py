"""A Datum: from the client's list to a gradient, against plain torch and transformers."""

from __future__ import annotations

import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM

from homefire.checkpoints.tiny import ensure_tiny
from journeys.loop import BATCH, Loop, row, start_loop


@pytest.fixture(scope="module")
def loop(homefire_up) -> Loop:
    return start_loop(homefire_up())


@pytest.fixture
def reference(tmp_path) -> torch.nn.Module:
    """The base model as anybody would load it: bf16 weights, float32 arithmetic."""
    directory = ensure_tiny(tmp_path / "tiny")
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).float().eval()


def reference_logprobs(model: torch.nn.Module, datum: tinker.Datum) -> torch.Tensor:
    tokens = torch.tensor([datum.model_input.to_ints()])
    targets = torch.tensor(datum.loss_fn_inputs["target_tokens"].data)
    return model(tokens).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]


def test_the_logprobs_of_a_datum_are_those_of_transformers(loop, reference):
    """Rows of mixed length come back in order, each as if it had been alone."""
    for datum, got in zip(BATCH, loop.logprobs(), strict=True):
        expected = reference_logprobs(reference, datum)
        torch.testing.assert_close(torch.tensor(got), expected, atol=1e-4, rtol=0)


def test_a_custom_objective_and_a_step_move_the_weights_as_plain_torch_would(loop, reference):
    def objective(data, logprobs_list):
        loss = sum((lp**2).mean() for lp in logprobs_list)
        return loss, {"objective": loss.item()}

    adam = tinker.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.99, eps=1e-8)
    result = loop.client.forward_backward_custom(BATCH, objective).result()
    loop.client.optim_step(adam).result()

    masters = [p.detach().clone().requires_grad_() for p in reference.parameters()]
    loss = sum((reference_logprobs(reference, datum) ** 2).mean() for datum in BATCH)
    loss.backward()
    for master, parameter in zip(masters, reference.parameters(), strict=True):
        master.grad = parameter.grad
    torch.optim.AdamW(masters, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0).step()
    with torch.no_grad():
        for master, parameter in zip(masters, reference.parameters(), strict=True):
            parameter.copy_(master.bfloat16().float())

    assert result.metrics["objective"] == pytest.approx(loss.item(), rel=1e-4)
    for datum, got in zip(BATCH, loop.logprobs(), strict=True):
        expected = reference_logprobs(reference, datum).detach()
        torch.testing.assert_close(torch.tensor(got), expected, atol=0.02, rtol=0)


BAD_DATA = {
    "a token outside the vocabulary": (row(b"abc"), {"target_tokens": [98, 5000]}, "5000"),
    "a negative token": (row(b"abc"), {"target_tokens": [98, -1]}, "-1"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_fails_its_own_future_and_nothing_else(loop, case):
    datum, changed, said = BAD_DATA[case]
    inputs = dict(datum.loss_fn_inputs)
    for name, values in changed.items():
        inputs[name] = tinker.TensorData(data=values, dtype="int64", shape=[len(values)])
    bad = tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)
    before = loop.logprobs()
    with pytest.raises(tinker.RequestFailedError, match=said) as caught:
        loop.client.forward([bad], "cross_entropy").result()
    assert caught.value.category.value == "user"
    assert loop.logprobs() == before


def test_a_row_longer_than_the_context_is_refused_with_both_lengths(loop):
    with pytest.raises(tinker.RequestFailedError, match=r"3000.*2048|2048.*3000"):
        loop.client.forward([row(b"x" * 3001)], "cross_entropy").result()


def test_an_unknown_loss_is_refused_with_the_known_ones(loop):
    with pytest.raises(tinker.RequestFailedError, match="cross_entropy"):
        loop.client.forward_backward(BATCH, "no_such_loss").result()
    with pytest.raises(tinker.RequestFailedError, match=r"incomplete|failed"):
        loop.client.optim_step(tinker.AdamParams()).result()
    loop.train()
