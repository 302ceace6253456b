"""What the `tinker` client asks for and homefire refuses: each by name, and nothing else is lost."""

from __future__ import annotations

import tinker
from findings import Findings
from tinker_kit import BASE, DATA, RELEASE, ROWS, STILL, adapter, datum, finish, floats, ints, train

found = Findings()
service = tinker.ServiceClient()
client = adapter(service)
sampler = service.create_sampling_client(base_model=BASE)

PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)
ROW = ROWS[0]
ONES = floats([1.0] * (len(ROW) - 1))


def image_input() -> tinker.ModelInput:
    image = tinker.types.ImageChunk(data=PNG, format="png", expected_tokens=len(ROW) - 1)
    return tinker.ModelInput(chunks=[image])


def passed(data, loss="cross_entropy", config=None) -> None:
    client.forward_backward(data, loss, config).result()


@found.step
def images_in_training():
    inputs = {"target_tokens": ints(ROW[1:]), "weights": ONES}
    passed([tinker.Datum(model_input=image_input(), loss_fn_inputs=inputs)])


@found.step
def images_in_a_prompt():
    sampler.sample(image_input(), 1, tinker.SamplingParams(max_tokens=1)).result()


@found.step
def a_loss_without_its_inputs():
    passed([datum(ROW, weights=ONES)], "importance_sampling")


@found.step
def a_config_that_the_loss_has_not():
    passed(DATA, "cross_entropy", {"temperature": 2.0})


@found.step
def tensors_of_unequal_length():
    passed([datum(ROW, weights=floats([1.0] * 3))])


@found.step
def a_token_outside_the_vocabulary():
    passed([datum([65, 1_000_000, 66])])


@found.step
def a_row_beyond_the_context():
    passed([datum([65] * 5000)])


if RELEASE >= (0, 25):  # before, the client cannot put it into JSON, and raises

    @found.step
    def a_gradient_that_is_not_finite():
        passed([datum(ROW, weights=floats([float("nan")] * (len(ROW) - 1)))])


@found.step
def an_unknown_base_model():
    service.create_lora_training_client("no-such-model", rank=4).get_info()


@found.step
def an_adapter_of_negative_rank():
    adapter(service, rank=-1).get_info()


@found.step
def a_step_after_a_failed_pass():
    """Its gradient would be a part of what was asked for."""
    client.optim_step(STILL).result()


@found.step
def training_goes_on():
    return train(client)


if RELEASE >= (0, 29):

    @found.step
    def dimuon():
        adapter(service, optimizer=tinker.types.DimuonOptimizerConfig()).get_info()

    @found.step
    def dimuon_step():
        passed(DATA)
        client.optim_step(tinker.types.DimuonParams(learning_rate=1e-3)).result()


if RELEASE >= (0, 35):

    @found.step
    def stable_reinforce():
        inputs = {"advantages": ONES, "logprobs": ONES}
        passed([datum(ROW, **inputs)], "stable_reinforce")

    @found.step
    def record_stability_info():
        recording = service.create_sampling_client(base_model=BASE, record_stability_info=True)
        prompt = tinker.ModelInput.from_ints(ROW)
        recording.sample(prompt, 1, tinker.SamplingParams(max_tokens=1)).result()


if RELEASE >= (0, 36):

    @found.step
    def server_side_custom_loss():
        """What the client does when a server says that it runs custom losses."""
        service.holder._client_config = service.holder._client_config.model_copy(
            update={"custom_loss_server_side": True}
        )

        def loss(logprobs, weights):
            return -(logprobs * weights).sum(), {}

        ranks = {"logprobs": 1, "weights": 1}
        handle = service.create_custom_loss(loss, ranks).result()
        client.forward_backward_custom(DATA, handle).result()


finish(client)
found.report()
