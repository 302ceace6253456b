from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from homefire.model.head import PLAIN, Head, OwnForward, ScaledLogits, recognised_form
from unit.model.conftest import unit_gain

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FORMS = {
    "qwen3": ({}, PLAIN),
    "phi": ({}, PLAIN),
    "gpt_neox": ({}, PLAIN),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, PLAIN),
    "granite": ({"logits_scaling": 3.0}, ScaledLogits(1 / 3)),
    "cohere": ({"logit_scale": 0.5}, ScaledLogits(0.5)),
    "gemma2": ({"head_dim": 16, "final_logit_softcapping": 2.0}, ScaledLogits(softcap=2.0)),
}


@pytest.fixture
def make_module():
    def make(model_type, **overrides):
        config = AutoConfig.for_model(model_type, **{**SMALL, **overrides})
        module = AutoModelForCausalLM.from_config(config).eval()
        unit_gain(module)
        return module

    return make


@pytest.mark.parametrize("family", FORMS)
def test_the_form_of_a_models_logits_is_found_from_what_it_does(make_module, family):
    overrides, form = FORMS[family]
    module = make_module(family, **overrides)
    found = recognised_form(module)
    assert isinstance(found, ScaledLogits)
    assert found.scale == pytest.approx(form.scale, rel=1e-6)
    assert found.softcap == form.softcap
    linear, hidden = module.get_output_embeddings(), torch.randn(5, 64)
    ours = Head(linear.weight, linear.bias, found).logits(hidden)
    theirs = Head(linear.weight, linear.bias, OwnForward(module)).logits(hidden)
    torch.testing.assert_close(ours, theirs)


def test_logits_that_no_form_fits_go_through_the_models_own_forward(make_module, monkeypatch):
    module = make_module("qwen3")
    own = type(module).forward

    def squared(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = output.logits * output.logits.abs()
        return output

    monkeypatch.setattr(type(module), "forward", squared)
    form = recognised_form(module)
    assert form == OwnForward(module)
    linear, hidden = module.get_output_embeddings(), torch.randn(5, 64)
    product = hidden @ linear.weight.T
    torch.testing.assert_close(
        Head(linear.weight, None, form).logits(hidden), product * product.abs()
    )


def test_hidden_states_changed_before_the_head_are_seen(make_module):
    """The product's input is then not what `head_update` takes it for."""
    module = make_module("qwen3")
    module.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    assert isinstance(recognised_form(module), OwnForward)


def test_the_module_is_left_as_it_was(make_module):
    module = make_module("granite", logits_scaling=3.0)
    tokens = torch.arange(6)[None]
    before = module(input_ids=tokens).logits
    recognised_form(module)
    assert torch.equal(module(input_ids=tokens).logits, before)
    assert not any("forward" in vars(part) for part in module.modules())
