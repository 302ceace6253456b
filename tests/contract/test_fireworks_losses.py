"""Built-in losses, outputs beside logprobs, adapters taken over and merged, with the real SDK."""

from __future__ import annotations

import pytest

from contract.fireworks import findings_of, shows, since

NEWEST = since("1.2.30")
"""The releases whose client asks for these."""


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_losses.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@since("1.2.0a68")
@shows("TrainingClient.forward_backward: ppo, cispo, dro, gspo, dapo")
def test_built_in_losses_are_the_published_sums(found):
    for name, (server, by_hand) in found["losses"].items():
        assert server == pytest.approx(by_hand, rel=1e-4, abs=1e-3), name
    assert len(found["losses"]) == 5


@since("1.2.0a68")
@shows("TrainingClient.forward_backward: dro without beta", refused="invalid_argument")
def test_a_loss_without_what_has_no_public_default_is_refused(found):
    assert found.refusal("dro_without_beta") == "invalid_argument"
    assert "beta" in found.error("dro_without_beta")["message"]
    assert found.refusal("step_after_a_refusal") == "incomplete_gradient"


@since("1.2.0a68")
@shows("TrainingClient.forward: top_k")
def test_the_likeliest_tokens_come_with_their_logprobs(found):
    top = found["forward_top_k"]
    assert top["shape"] == [15, 320]
    assert top["descending"]
    assert top["sum"] == pytest.approx(1.0, abs=1e-4)
    assert top["off"] < 1e-5


@NEWEST
@shows("TrainingClient.optim_step: emit_grad_norm_metrics")
def test_a_step_tells_its_gradients_norms_on_request(found):
    norms = found["emit_grad_norm_metrics"]
    assert norms["grad_norm"] == norms["grad_norm_clipped"] > norms["grad_max_abs"] > 0


@NEWEST
@shows("TrainingClient.forward_backward_custom: embedding, cos_similarity_matrix")
@pytest.mark.parametrize("output", ["embedding", "cos_similarity_matrix"])
def test_a_custom_loss_on_embeddings_trains_in_proportion(found, output):
    norms = found["custom_loss_on_embeddings"]
    rows, once = norms[f"{output} 1.0"]
    assert rows == 2
    assert norms[f"{output} 10.0"][1] == pytest.approx(10 * once, rel=1e-4)
    assert once > 0


@NEWEST
@shows("TrainingClient.forward_backward_custom: projection", refused="unsupported")
def test_projections_are_refused_by_name(found):
    assert found.refusal("projection") == "unsupported"


@NEWEST
@shows("TrainingClient.forward_backward_contrastive")
def test_the_contrastive_loss_falls(found):
    losses = found["forward_backward_contrastive"]
    assert losses[-1] < 0.7 * losses[0]


@since("1.2.0a68")
@shows("TrainingClient.save_weights_for_sampler_ext: merged_base")
def test_a_merged_adapter_is_a_base_model_to_promote_and_to_serve(found):
    assert found["merged_base"] == {
        "whole-model": ["CHECKPOINT_TYPE_INFERENCE_BASE", "HF_BASE_MODEL"],
        "adapter-model": ["CHECKPOINT_TYPE_INFERENCE_LORA", "HF_PEFT_ADDON"],
    }
    assert found["merged_base_is_served"] is True


@since("1.2.0a68")
@shows("TrainingClient.load_adapter")
def test_a_promoted_adapter_is_taken_over_bit_for_bit(found):
    assert found["load_adapter"] == {"fresh": False, "loaded": True}


@since("1.2.0a68")
@shows("TrainingClient.load_adapter of another rank", refused="invalid_argument")
def test_an_adapter_of_another_rank_is_refused_naming_both(found):
    assert found.refusal("load_adapter_of_another_rank") == "invalid_argument"
    message = found.error("load_adapter_of_another_rank")["message"]
    assert "rank 8" in message
    assert "has 4" in message
