"""What is torch's own: one module whose weights change hands, and adapters on a frozen base."""

from __future__ import annotations

import socket
import threading

import numpy as np
import pytest
import torch

from homefire.checkpoints import DirectoryStore, materialize
from homefire.foundation.clock import ManualClock
from homefire.model.loading import load_model
from homefire.model.tensors import memory_digest
from homefire.trainer.engine.saver import Saver
from homefire.trainer.engine.serve import serve
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    CloseSlot,
    ForwardBackward,
    LoadRecovery,
    LoadState,
    LoraSpec,
    OpenSlot,
    OptimStep,
    SaveRecovery,
    SaveSampler,
    SaveState,
    Shutdown,
    SlotKind,
    SlotOpened,
    WeightsDigest,
)
from homefire.wire.engine_frames import decode_reply, encode_request, read_frame
from homefire.wire.errors import NonFiniteGradient, Unsupported

from .conftest import Trainer, plan_of, random_batch

BOTH = pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])


@pytest.fixture
def make_trainer(tmp_path, tiny_directory):
    def make(job="job-1"):
        def engine():
            return torch_engine(ManualClock())

        return Trainer(tmp_path, tiny_directory, engine, job)

    return make


@BOTH
def test_training_lowers_the_loss_it_trains_on(make_trainer, make_batch, kind):
    trainer = make_trainer().open(kind)
    first = trainer.backward(make_batch())[0].metrics["loss:sum"]
    for _ in range(5):
        trainer.step(learning_rate=3e-3)
        last = trainer.backward(make_batch())[0].metrics["loss:sum"]
    assert last < 0.8 * first


@BOTH
def test_forward_gives_the_logprobs_of_forward_backward(make_trainer, make_batch, kind):
    trainer = make_trainer().open(kind).train(0)
    np.testing.assert_array_equal(
        trainer.forward(make_batch())[1]["logprobs"], trainer.backward(make_batch())[1]["logprobs"]
    )


def test_the_untrained_policy_is_the_base_model(make_trainer, tiny_directory):
    trainer = make_trainer().open()
    assert trainer.digest() == memory_digest(load_model(tiny_directory))


def test_a_reference_keeps_the_base_while_the_policy_trains_in_the_same_module(
    make_trainer, make_batch
):
    trainer = make_trainer().open().open(SlotKind.REFERENCE, "reference")
    alone = make_trainer().open()
    base = trainer.forward(make_batch(), "reference")[1]["logprobs"]
    for step in range(3):
        trainer.train(step)
        alone.train(step)
        reference = trainer.forward(make_batch(), "reference")[1]["logprobs"]
        np.testing.assert_array_equal(reference, base)
    assert trainer.step() == alone.step()
    assert trainer.digest() == alone.digest()
    assert not np.array_equal(trainer.forward(make_batch())[1]["logprobs"], base)


def test_the_share_of_moved_serving_values_is_reported_after_a_reference_pass(
    make_trainer, make_batch
):
    trainer = make_trainer().open().open(SlotKind.REFERENCE, "reference").train(0)
    trainer.backward(make_batch())
    trainer.forward(make_batch(), "reference")
    moved = trainer.step(learning_rate=1e-6).metrics["changed_fraction"]
    assert 0 < moved < 0.2


def test_a_closed_slot_leaves_nothing_in_the_module(make_trainer):
    trainer = make_trainer().open()
    digest = trainer.digest()
    trainer.train(0)
    trainer.engine.close_slot(CloseSlot("policy"))
    assert trainer.open().digest() == digest


def test_adapters_do_not_touch_one_another(make_trainer):
    together = make_trainer().open(SlotKind.LORA).open(SlotKind.LORA, "other", rank=8)
    alone = make_trainer().open(SlotKind.LORA)
    untrained = together.engine.weights_digest(WeightsDigest("other"))
    assert together.train(0).digest() == alone.train(0).digest()
    assert together.engine.weights_digest(WeightsDigest("other")) == untrained


def test_adapters_that_take_turns_end_bit_for_bit_as_if_alone(make_trainer):
    """A gradient waits on one while the other steps with decay, and the other way round."""
    ranks = {"a": 4, "b": 8}
    turns = ["a", "b", "b", "a", "b", "a", "a", "b"]

    def run(slots, turns):
        engine = make_trainer(job="-".join(slots)).engine
        for slot in slots:
            lora = LoraSpec(rank=ranks[slot], seed=ranks[slot])
            engine.open_slot(OpenSlot(slot=slot, kind=SlotKind.LORA, lora=lora))
        done = dict.fromkeys(slots, 0)
        for slot in turns:
            _backward(engine, slot, seed=10 * ranks[slot] + done[slot])
            done[slot] += 1
            if done[slot] % 2 == 0:
                adam = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=1.0)
                engine.optim_step(OptimStep(slot=slot, adam=adam))
        return {slot: engine.weights_digest(WeightsDigest(slot)).digest for slot in slots}

    together = run(["a", "b"], turns)
    assert together == {**run(["a"], turns[:1] * 4), **run(["b"], turns[1:2] * 4)}


def _backward(engine, slot, *, seed):
    arrays = random_batch(seed)
    request = ForwardBackward(
        slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=plan_of(arrays)
    )
    engine.forward_backward(request, arrays)


@pytest.mark.parametrize(
    ("first", "second"), [("full", "full"), ("full", "lora"), ("lora", "full")]
)
def test_a_full_slot_shares_the_module_with_references_only(make_trainer, first, second):
    trainer = make_trainer().open(SlotKind(first))
    with pytest.raises(Unsupported, match="another trainer job"):
        trainer.open(SlotKind(second), "second")


def test_a_gradient_that_is_not_finite_names_the_parameter_and_is_cleared(make_trainer, make_batch):
    trainer = make_trainer().open().train(0)
    digest = trainer.digest()
    batch = make_batch()
    batch["weights"] *= np.float32(1e30)
    trainer.backward(batch)
    with pytest.raises(NonFiniteGradient, match="embed_tokens"):
        trainer.step()
    assert trainer.digest() == digest
    assert trainer.step().metrics["grad_norm"] == 0.0


@BOTH
def test_save_load_step_equals_step_bit_for_bit(make_trainer, kind):
    trainer = make_trainer().open(kind).train(0, num_steps=2)
    trainer.engine.prepare_save(SaveState(slot="policy", name="state-1")).write()
    expected = trainer.train(9).digest()
    branch = make_trainer("job-2").open(kind)
    directory = trainer.root / "store/local/job-1/policy/state/state-1"
    branch.engine.load_state(
        LoadState(slot="policy", directory=str(directory), with_optimizer=True)
    )
    assert branch.train(9).digest() == expected


@BOTH
def test_saves_while_stepping_are_of_one_step(make_trainer, kind):
    """With a thread that writes them while torch changes the weights in place."""
    trainer = make_trainer().open(kind).train(0)
    saver, expected = Saver(lambda ended: None, lambda: 1 << 40), {}
    for step in range(6):
        expected[f"w{step}"] = trainer.digest()
        request = SaveSampler(slot="policy", identity=f"w{step}", checkpoint_type="delta")
        saver.begin(trainer.engine.prepare_save(request))
        saver.begin(trainer.engine.prepare_save(SaveState(slot="policy", name=f"s{step}")))
        trainer.train(step)
    last = trainer.digest()
    saver.finish()
    saver.close()
    found = DirectoryStore(trainer.root / "store").list("local", "job-1")
    assert {m.identity: m.digest for m in found if m.identity in expected} == expected
    branch = make_trainer("job-2").open(kind)
    directory = trainer.root / "store/local/job-1/policy/state/s5"
    branch.engine.load_state(
        LoadState(slot="policy", directory=str(directory), with_optimizer=True)
    )
    assert branch.digest() == expected["w5"]
    assert branch.train(5).digest() == last


@BOTH
def test_a_recovered_engine_goes_on_bit_for_bit(make_trainer, make_batch, tmp_path, kind):
    trainer = make_trainer().open(kind).train(0, num_steps=2)
    trainer.backward(make_batch(5))
    trainer.engine.prepare_save(SaveRecovery(str(tmp_path / "point"))).write()
    again = make_trainer()
    again.engine.load_recovery(LoadRecovery(str(tmp_path / "point")))
    for each in (trainer, again):
        each.backward(make_batch(6))
    assert again.step() == trainer.step()
    assert again.digest() == trainer.digest()


def test_a_base_snapshot_is_an_ordinary_model_directory(make_trainer):
    trainer = make_trainer().open().train(0)
    trainer.save("one", "base")
    model = load_model(trainer.root / "store/local/job-1/policy/sampler/one")
    assert memory_digest(model) == trainer.digest()


def test_base_and_deltas_make_the_weights_bit_for_bit(make_trainer):
    trainer = make_trainer().open()
    for step in range(4):
        trainer.train(step).save(f"s{step}")
    found = materialize(DirectoryStore(trainer.root / "store"), "local", "job-1", "policy", "s3")
    assert found.chain == ["s0", "s1", "s2", "s3"]
    assert found.manifest.digest == trainer.digest()


def test_it_answers_over_a_socket(make_trainer):
    front, back = socket.socketpair()
    thread = threading.Thread(target=serve, args=(back, make_trainer().engine))
    thread.start()
    with front, back:
        for message, kind in (
            (OpenSlot(slot="policy", kind=SlotKind.FULL), SlotOpened),
            (Shutdown(), object),
        ):
            front.sendall(encode_request(message))
            assert isinstance(decode_reply(read_frame(front) or b"")[0], kind)
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
