from __future__ import annotations

import numpy as np
import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.engine.fake import fake_engine
from homefire.wire.engine import (
    AdamParams,
    CloseSlot,
    DiscardGradients,
    GradNormalization,
    LoraSpec,
    OpenSlot,
    OptimStep,
    SlotKind,
)
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    NonFiniteGradient,
    SequenceTooLong,
)


def test_the_model_is_described_when_it_opens(make_trainer):
    opened = make_trainer().opened
    assert opened.vocab_size == 320
    assert opened.max_context_length == 64
    assert opened.num_parameters == 320 * 320


def test_nothing_works_before_the_model_is_open():
    with pytest.raises(FailedPrecondition, match="open_model"):
        fake_engine().open_slot(OpenSlot(slot="policy", kind=SlotKind.FULL))


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_training_lowers_the_loss_it_trains_on(make_trainer, make_batch, kind):
    trainer = make_trainer().open(kind)
    batch = make_batch()
    first = trainer.backward(batch)[0].metrics["loss:sum"]
    for _ in range(20):
        stepped = trainer.step(learning_rate=0.1)
        last = trainer.backward(batch)[0].metrics["loss:sum"]
    assert stepped.step == 20
    assert last < 0.5 * first


def test_forward_gives_the_logprobs_of_forward_backward_and_changes_nothing(
    make_trainer, make_batch
):
    trainer = make_trainer().open()
    digest = trainer.digest()
    rows, arrays = trainer.forward(make_batch())
    again, same = trainer.backward(make_batch())
    np.testing.assert_array_equal(arrays["logprobs"], same["logprobs"])
    assert arrays["logprobs"].shape == (17, 1)
    assert rows.metrics == again.metrics
    assert trainer.digest() == digest


def test_two_backwards_add_up_to_one_of_both_batches(make_trainer, make_batch):
    apart, together = (make_trainer().open() for _ in range(2))
    first, second = make_batch(1), make_batch(2)
    apart.backward(first)
    apart.backward(second)
    joined = {name: np.concatenate([first[name], second[name]]) for name in first}
    together.backward(joined)
    assert apart.step().metrics["grad_norm"] == pytest.approx(
        together.step().metrics["grad_norm"], rel=1e-5
    )


def test_a_failed_backward_leaves_no_trace(make_trainer, make_batch):
    """The second micro-batch fails after the first one went through."""
    trainer, undisturbed = (make_trainer().open() for _ in range(2))
    bad = make_batch(7)
    bad["weights"][-1] = np.inf
    undisturbed.backward(make_batch(1))
    trainer.backward(make_batch(1))
    with pytest.raises(NonFiniteGradient, match="row 2"):
        trainer.backward(bad)
    assert trainer.step() == undisturbed.step()
    assert trainer.digest() == undisturbed.digest()


def test_a_step_says_how_long_it_took_beside_what_a_replay_repeats(make_trainer):
    class Slow(ManualClock):
        def monotonic(self) -> float:
            self.advance(2.5)
            return super().monotonic()

    trainer = make_trainer(clock=Slow()).open()
    stepped = trainer.step()
    assert stepped.seconds == 2.5
    assert 2.5 not in stepped.metrics.values()


def test_a_step_without_a_gradient_still_moves_by_momentum_and_decay(make_trainer):
    trainer = make_trainer().open()
    assert trainer.step().metrics["update_norm"] == 0.0
    assert trainer.step(weight_decay=0.1).metrics["update_norm"] > 0.0
    trainer.train(0)
    assert trainer.step().metrics["update_norm"] > 0.0


@pytest.mark.parametrize(
    ("normalization", "divisor"),
    [
        (GradNormalization.NONE, 1),
        (GradNormalization.NUM_LOSS_TOKENS, 5 + 3),
        (GradNormalization.NUM_SEQUENCES, 2),
    ],
)
def test_normalization_divides_by_what_has_a_gradient(
    make_trainer, make_batch, normalization, divisor
):
    batch = make_batch(lengths=(5, 9, 3))
    batch["weights"][5:14] = 0  # the second row is masked
    norms = []
    for kind in (GradNormalization.NONE, normalization):
        trainer = make_trainer().open()
        trainer.backward(batch)
        request = OptimStep(slot="policy", adam=AdamParams(), normalization=kind)
        norms.append(trainer.engine.optim_step(request).metrics["grad_norm"])
    assert norms[0] / norms[1] == pytest.approx(divisor)


def test_clipping_scales_the_gradient_but_reports_its_norm(make_trainer, make_batch):
    free, clipped = (make_trainer().open() for _ in range(2))
    for trainer in (free, clipped):
        trainer.backward(make_batch())
    # A large eps makes the update proportional to the gradient.
    loose = free.step(eps=1e3).metrics
    tight = clipped.step(eps=1e3, grad_clip_norm=loose["grad_norm"] / 10).metrics
    assert tight["grad_norm"] == loose["grad_norm"]
    assert tight["update_norm"] == pytest.approx(loose["update_norm"] / 10, rel=1e-3)


def test_discarded_gradients_are_counted_and_gone(make_trainer, make_batch):
    trainer = make_trainer().open()
    trainer.backward(make_batch())
    trainer.backward(make_batch())
    dropped = trainer.engine.discard_gradients(DiscardGradients("policy"))
    assert (dropped.num_backward_calls, dropped.num_loss_tokens) == (2, 34)
    assert trainer.step().metrics["grad_norm"] == 0.0


def test_a_reference_scores_but_does_not_train(make_trainer, make_batch):
    trainer = make_trainer().open().open(SlotKind.REFERENCE, "reference")
    before = trainer.forward(make_batch(), "reference")[1]["logprobs"]
    trainer.train(0, num_steps=3)
    after = trainer.forward(make_batch(), "reference")[1]["logprobs"]
    np.testing.assert_array_equal(before, after)
    with pytest.raises(FailedPrecondition, match="frozen reference"):
        trainer.engine.optim_step(OptimStep(slot="reference", adam=AdamParams()))


def test_slots_are_named_in_errors(make_trainer):
    trainer = make_trainer().open()
    with pytest.raises(InvalidArgument, match="'other' is not open") as error:
        trainer.engine.close_slot(CloseSlot("other"))
    assert "policy" in error.value.hint
    with pytest.raises(FailedPrecondition, match="already open"):
        trainer.open()


def test_a_closed_slot_can_be_opened_afresh(make_trainer):
    trainer = make_trainer().open()
    digest = trainer.digest()
    trainer.train(0)
    trainer.engine.close_slot(CloseSlot("policy"))
    assert trainer.open().digest() == digest


def test_kind_and_lora_must_go_together(make_trainer):
    engine = make_trainer().engine
    with pytest.raises(InvalidArgument, match="lora"):
        engine.open_slot(OpenSlot(slot="policy", kind=SlotKind.FULL, lora=LoraSpec(rank=4)))
    with pytest.raises(InvalidArgument, match="lora"):
        engine.open_slot(OpenSlot(slot="policy", kind=SlotKind.LORA))


def test_a_lora_slot_says_the_seed_it_took(make_trainer):
    opened = make_trainer().engine.open_slot(
        OpenSlot(slot="policy", kind=SlotKind.LORA, lora=LoraSpec(rank=4))
    )
    assert opened.lora == LoraSpec(rank=4, seed=0)
    assert opened.num_trainable == 2 * 4 * 320


def test_the_context_length_of_the_job_holds(make_trainer, make_batch):
    with pytest.raises(SequenceTooLong, match="65 tokens"):
        make_trainer().open().backward(make_batch(lengths=(65,)))


@pytest.mark.parametrize(
    "adam",
    [{"learning_rate": -1.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": float("nan")}],
)
def test_optimizer_parameters_are_checked_by_name(make_trainer, adam):
    with pytest.raises(InvalidArgument, match=next(iter(adam))):
        make_trainer().open().step(**adam)
