"""The training client: the real tinker client against a trainer that remembers."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tinker
import torch

from homefire.sdk import FiretitanServiceClient, FiretitanTrainingClient, GradAccNormalization
from homefire.sdk.training import DATA_PLANE_ERRORS
from unit.sdk.trainer_stub import TrainerStub

# tinker leaves the client of its first request (/client/config) open; it is collected here, not in
# the next test.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
torch.set_num_threads(1)
_TINY = "accounts/fireworks/models/tiny"


@pytest.fixture(scope="module")
def served_trainer(serve_module) -> tuple[TrainerStub, str]:
    trainer = TrainerStub()
    return trainer, serve_module(trainer.app)


@pytest.fixture
def trainer(served_trainer) -> TrainerStub:
    served_trainer[0].forget()
    return served_trainer[0]


@pytest.fixture(scope="module")
def open_service(served_trainer) -> Iterator[Callable[[], FiretitanServiceClient]]:
    made: list[FiretitanServiceClient] = []

    def make() -> FiretitanServiceClient:
        made.append(FiretitanServiceClient(base_url=served_trainer[1], api_key="fw_test"))
        return made[-1]

    yield make
    for service in made:
        service.close()
    made.clear()
    gc.collect()


@pytest.fixture
def make_service(trainer, open_service) -> Callable[[], FiretitanServiceClient]:
    return open_service


@pytest.fixture(scope="module")
def shared_service(open_service) -> FiretitanServiceClient:
    return open_service()


@pytest.fixture
def client(trainer, shared_service) -> FiretitanTrainingClient:
    """A fresh model of one shared session."""
    return shared_service.create_lora_training_client(_TINY, rank=0)


def datum(tokens=(1, 2, 3), **inputs) -> tinker.Datum:
    inputs = {"target_tokens": [token + 1 for token in tokens], **inputs}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(tokens)),
        loss_fn_inputs={key: value for key, value in inputs.items() if value is not None},
    )


def negative_log_likelihood(data, logprobs):
    loss = -sum(row.sum() for row in logprobs)
    return loss, {"nll": loss.item()}


def test_a_full_parameter_client_is_created_with_rank_zero_and_the_prefixed_key(
    trainer, make_service
):
    client = make_service().create_training_client(_TINY)
    (body,) = trainer.bodies("create_model")
    assert body["base_model"] == _TINY
    assert body["lora_config"]["rank"] == 0
    assert "user_metadata" not in body
    assert trainer.keys == {"tml-fw_test"}
    assert client.model_id.endswith(":train:0")
    assert client.get_info().model_data.tokenizer_id == "tiny"


def test_a_reference_client_says_so_in_its_metadata(trainer, shared_service):
    shared_service.create_base_training_client(_TINY, {"run": "a"})
    (body,) = trainer.bodies("create_model")
    assert body["user_metadata"] == {"run": "a", "homefire.base_only": "true"}


def test_a_second_client_of_the_same_model_on_one_service_is_refused(make_service):
    service = make_service()
    service.create_training_client(_TINY)
    with pytest.raises(ValueError, match="already has a training client"):
        service.create_training_client(_TINY)
    assert service.create_training_client(_TINY, lora_rank=8).model_id.endswith(":train:1")


def test_calls_are_pipelined_and_take_effect_in_call_order(trainer, client):
    passes = [client.forward_backward([datum()], "cross_entropy") for _ in range(3)]
    stepped = client.optim_step(tinker.AdamParams(learning_rate=1e-3))
    saved = client.save_state("step-1", ttl_seconds=7200)
    assert [len(future.result().loss_fn_outputs) for future in passes] == [1, 1, 1]
    assert stepped.result().metrics == {"lr": 1.0}
    assert saved.result().path == "step-1"
    assert trainer.names[1:] == [*["forward_backward"] * 3, "optim_step", "save_weights"]


def test_a_custom_loss_becomes_a_forward_and_a_weighted_backward(trainer, client):
    result = client.forward_backward_custom([datum()], negative_log_likelihood).result()
    assert trainer.names[1:] == ["forward", "forward_backward"]
    weights = trainer.bodies("forward_backward")[0].body.rows[0].inputs["weights"]
    assert weights.array().tolist() == [1.0, 1.0, 1.0]
    assert result.metrics["nll"] == 3.0
    assert result.metrics["loss:sum"] == 3.0


def test_adam_params_travel_untouched_when_nothing_is_normalised(trainer, client):
    client.optim_step(tinker.AdamParams(learning_rate=1e-5, beta2=0.999)).result()
    (body,) = trainer.bodies("optim_step")
    assert body["adam_params"]["beta2"] == 0.999
    assert "optimizer_params" not in body


@pytest.mark.parametrize("given", [GradAccNormalization.NUM_LOSS_TOKENS, "num_loss_tokens"])
def test_a_normalisation_travels_with_all_adam_fields(trainer, client, given):
    client.optim_step(tinker.AdamParams(learning_rate=1e-5), given).result()
    (body,) = trainer.bodies("optim_step")
    assert body["optimizer_params"] == {
        "type": "adamw",
        **tinker.AdamParams(learning_rate=1e-5).model_dump(),
        "grad_accumulation_normalization": "num_loss_tokens",
    }


def test_a_snapshot_s_name_ends_with_the_client_s_session_and_carries_its_type(trainer, client):
    result = client.save_weights_for_sampler_ext("step_00000", "delta", ttl_seconds=3600)
    (body,) = trainer.bodies("save_weights_for_sampler")
    assert result.snapshot_name == result.path == f"step_00000-{client.session_id}"
    assert len(client.session_id) == 8
    assert body["path"] == result.snapshot_name
    assert body["user_metadata"] == {"homefire.checkpoint_type": "delta"}
    assert body["ttl_seconds"] == 3600


def test_every_client_object_has_a_session_of_its_own(client, shared_service):
    first, second = client, shared_service.create_lora_training_client(_TINY, rank=0)
    assert first.session_id != second.session_id


def test_a_load_takes_effect_after_all_that_was_called_before_it(trainer, client):
    many = [datum() for _ in range(2500)]
    client.forward_backward(many, "cross_entropy")
    client.forward_backward_custom([datum()], negative_log_likelihood)
    client.optim_step(tinker.AdamParams())
    loaded = client.load_state_with_optimizer("cross_job://job-0/step-2")
    adapter = client.load_adapter("accounts/local/models/a")
    client.optim_step(tinker.AdamParams()).result()
    assert loaded.result().path == "cross_job://job-0/step-2"
    assert adapter.result().adapter_path == "accounts/local/models/a"
    assert trainer.names[-6:] == [
        "forward",
        "forward_backward",
        "optim_step",
        "load_weights",
        "load_adapter",
        "optim_step",
    ]
    assert set(trainer.names[1:-6]) == {"forward_backward"}
    (body,) = trainer.bodies("load_weights")
    assert body == {
        "model_id": client.model_id,
        "path": "cross_job://job-0/step-2",
        "optimizer": True,
    }


def test_a_load_waits_until_the_trainer_has_it(trainer, client):
    trainer.try_again_first = True
    assert client.load_state("step-2").result(timeout=10).path == "step-2"
    assert trainer.bodies("load_weights")[0]["optimizer"] is False


def test_a_failed_load_raises_what_the_other_calls_raise(trainer, client):
    trainer.fail["load_weights"] = "no state 'x'; there are: step-2"
    with pytest.raises(tinker.RequestFailedError, match="there are: step-2") as caught:
        client.load_state("x").result()
    assert caught.value.category == "user"
    assert isinstance(caught.value, DATA_PLANE_ERRORS)
    client.optim_step(tinker.AdamParams()).result()


def test_a_failed_pass_leaves_the_client_usable(trainer, client):
    trainer.fail["forward_backward"] = "token 999 is out of range"
    with pytest.raises(tinker.RequestFailedError, match="token 999"):
        client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(tinker.AdamParams()).result()


class Mishap(Exception):
    """Of a user's loss."""


def broken_loss(data, logprobs):
    raise Mishap("division by zero")


def test_a_failing_custom_loss_comes_out_as_itself_with_advice(client):
    with pytest.raises(Mishap, match="division by zero") as caught:
        client.forward_backward_custom([datum()], broken_loss).result()
    assert "Create a new client" in caught.value.__notes__[0]
    assert "weights are kept" in caught.value.__notes__[0]


def test_after_a_failed_custom_loss_the_client_says_to_make_a_new_one(make_service):
    service = make_service()
    client = service.create_training_client(_TINY)
    with pytest.raises(Mishap):
        client.forward_backward_custom([datum()], broken_loss).result()
    for call in (
        lambda: client.optim_step(tinker.AdamParams()),
        lambda: client.load_state("step-2"),
        lambda: client.forward([datum()], "cross_entropy"),
    ):
        with pytest.raises(RuntimeError, match="Create a new client"):
            call()
    fresh = service.create_training_client(_TINY)
    assert fresh.forward_backward_custom([datum()], negative_log_likelihood).result()


def test_a_step_behind_a_failed_custom_loss_is_never_sent(trainer, client):
    release = threading.Event()

    def late(data, logprobs):
        release.wait(10)
        raise Mishap

    failed = client.forward_backward_custom([datum()], late)
    stepped = client.optim_step(tinker.AdamParams())
    release.set()
    with pytest.raises(Mishap):
        failed.result()
    with pytest.raises(RuntimeError, match="poisoned"):
        stepped.result()
    assert "optim_step" not in [name for name, _ in trainer.posted]


_BAD_CALLS: list[tuple[str, Callable[[FiretitanTrainingClient], object]]] = [
    ("data is not a non-empty list", lambda c: c.forward_backward([], "cross_entropy")),
    ("data is not a non-empty list", lambda c: c.forward(datum(), "cross_entropy")),
    (r"data\[1\] is str", lambda c: c.forward([datum(), "x"], "cross_entropy")),
    (
        r"data\[0\].loss_fn_inputs\['weights'\] has shape \[2\] but model_input has 3",
        lambda c: c.forward_backward([datum(weights=[1.0, 1.0])], "cross_entropy"),
    ),
    (
        r"loss_fn_inputs\['target_tokens'\] has shape \[2\]",
        lambda c: c.forward_backward([datum(target_tokens=[1, 2])], "cross_entropy"),
    ),
    (
        r"loss_fn_inputs\['advantages'\] has shape \[4\]",
        lambda c: c.forward_backward([datum(advantages=[0.0] * 4)], "ppo"),
    ),
    (
        "token ids must be int64",
        lambda c: c.forward([datum(target_tokens=np.ones(3, np.float32))], "cross_entropy"),
    ),
    (
        "has dtype int64: use float32",
        lambda c: c.forward([datum(weights=np.ones(3, np.int64))], "cross_entropy"),
    ),
    (
        r"model_input has a token id outside",
        lambda c: c.forward([datum((1, -2), target_tokens=[1, 2])], "cross_entropy"),
    ),
    (
        r"model_input has a token id outside",
        lambda c: c.forward([datum((1, 2**31), target_tokens=[1, 2])], "cross_entropy"),
    ),
    (
        "model_input has no tokens",
        lambda c: c.forward([datum((), target_tokens=None)], "cross_entropy"),
    ),
    ("loss_fn is ''", lambda c: c.forward([datum()], "")),
    (
        r"loss_fn_config\['top_k'\] must be a number or a string, got list",
        lambda c: c.forward([datum()], "cross_entropy", {"top_k": [1]}),
    ),
    (
        r"loss_fn_config\['a'\] must be a number or a string, got NoneType",
        lambda c: c.forward_backward([datum()], "cross_entropy", {"a": None}),
    ),
    ("loss_fn_config is not a mapping", lambda c: c.forward([datum()], "cross_entropy", [1])),
    (
        "has no 'target_tokens'",
        lambda c: c.forward_backward_custom([datum(target_tokens=None)], negative_log_likelihood),
    ),
    ("pass a function", lambda c: c.forward_backward_custom([datum()], "cross_entropy")),
    (
        "only 'logprobs'",
        lambda c: c.forward_backward_custom(
            [datum()], negative_log_likelihood, loss_type_input="embedding"
        ),
    ),
    ("adam_params is dict", lambda c: c.optim_step({"learning_rate": 1.0})),
    (
        "adam_params.learning_rate is nan",
        lambda c: c.optim_step(tinker.AdamParams(learning_rate=float("nan"))),
    ),
    (
        "grad_accumulation_normalization is 'tokens'",
        lambda c: c.optim_step(tinker.AdamParams(), "tokens"),
    ),
    ("name 'a/b' is not a valid name", lambda c: c.save_state("a/b")),
    ("name '' is not a valid name", lambda c: c.save_state("")),
    ("name '..' is not a valid name", lambda c: c.save_state("..")),
    ("ttl_seconds is 0", lambda c: c.save_state("a", ttl_seconds=0)),
    ("ttl_seconds is True", lambda c: c.save_state("a", ttl_seconds=True)),
    ("ttl_seconds is 1.5", lambda c: c.save_weights_for_sampler("a", ttl_seconds=1.5)),
    (
        r"user_metadata\['step'\] is int",
        lambda c: c.save_weights_for_sampler("a", user_metadata={"step": 1}),
    ),
    (r"user_metadata\['a'\] is int", lambda c: c.save_state("a", user_metadata={"a": 1})),
    ("checkpoint_type is 'full'", lambda c: c.save_weights_for_sampler_ext("a", "full")),
    ("is not a valid name", lambda c: c.save_weights_for_sampler_ext("a" * 125)),
    ("path '' is not a checkpoint", lambda c: c.load_state("")),
    ("adapter_path", lambda c: c.load_adapter("")),
]


def test_nothing_that_is_wrong_takes_a_sequence_number(trainer, client):
    for text, call in _BAD_CALLS:
        with pytest.raises(ValueError, match=text):
            call(client)
    assert trainer.names == ["create_model"]
    client.optim_step(tinker.AdamParams()).result()
    assert trainer.bodies("optim_step")[0]["seq_id"] == 1


def test_targets_of_several_per_position_are_accepted(trainer, client):
    targets = tinker.TensorData(data=[1, 2, 3, 4, 5, 6], dtype="int64", shape=[3, 2])
    weights = tinker.TensorData(data=[0.5] * 6, dtype="float32", shape=[6])
    result = client.forward([datum(target_tokens=targets, weights=weights)], "cross_entropy")
    assert result.result().loss_fn_outputs[0]["logprobs"].shape == [3, 2]


def test_checkpoint_paths_are_resolved_without_a_request(client):
    assert client.resolve_checkpoint_path("step-2") == "step-2"
    assert client.resolve_checkpoint_path("step-2", "job-0") == "cross_job://job-0/step-2"
    with pytest.raises(ValueError, match="source_job_id"):
        client.resolve_checkpoint_path("step-2", "job/0")
    assert client.list_checkpoints() == ["a", "b"]


def test_it_works_in_a_running_event_loop(trainer, shared_service, caplog):
    async def notebook() -> None:
        client = shared_service.create_lora_training_client(_TINY, rank=0)
        passed = client.forward_backward_custom([datum()], negative_log_likelihood)
        stepped = await client.optim_step_async(tinker.AdamParams())
        assert (await passed).metrics["nll"] == 3.0
        await stepped
        await (await client.load_state_async("step-2"))
        client.save_weights_for_sampler_ext("step")
        assert await client.load_state("step-2") is not None

    asyncio.run(notebook())
    assert trainer.names[-4:] == [
        "optim_step",
        "load_weights",
        "save_weights_for_sampler",
        "load_weights",
    ]
    assert "called from async context" not in caplog.text


def test_telemetry_is_off_unless_the_user_decided(monkeypatch):
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    FiretitanServiceClient("http://server", "key")
    assert os.environ["TINKER_TELEMETRY"] == "1"
    monkeypatch.delenv("TINKER_TELEMETRY")
    FiretitanServiceClient("http://server", "key")
    assert os.environ["TINKER_TELEMETRY"] == "0"


def test_calls_from_many_threads_lose_no_sequence_number(trainer, client):
    def work() -> None:
        for _ in range(5):
            client.forward_backward([datum()], "cross_entropy")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.optim_step(tinker.AdamParams()).result()
    assert trainer.names[1:] == [*["forward_backward"] * 20, "optim_step"]
