"""Checkpoints, resumption and the end of a session, as the `tinker` client meets them."""

from __future__ import annotations

import tinker
from findings import Findings
from tinker_kit import (
    DATA,
    RELEASE,
    adapter,
    finish,
    forward,
    gradient_norm,
    made,
    post,
    train,
    trained_adapter,
)

found = Findings()
service = tinker.ServiceClient()


def steps(client, count: int) -> None:
    for _ in range(count):
        train(client, weight_decay=0.01)


def saved(client, name: str) -> str:
    return client.save_state(name).result().path


@found.step
def resume():
    """Two steps, a save, two more; against two more from the saved state."""
    client = adapter(service)
    steps(client, 2)
    path = saved(client, "half")
    steps(client, 2)
    whole = saved(client, "whole")

    resumed = made(service.create_training_client_from_state_with_optimizer(path))
    reloaded = saved(resumed, "reloaded")
    steps(resumed, 2)

    without = made(service.create_training_client_from_state(path))
    loaded_weights = forward(without)
    steps(without, 2)

    fresh = adapter(service, seed=99)
    fresh.load_state_with_optimizer(path).result()
    steps(fresh, 2)
    return {
        "half": path,
        "reloaded": reloaded,
        "whole": whole,
        "resumed": saved(resumed, "whole"),
        "without_optimizer": saved(without, "whole"),
        "loaded_into_a_fresh_one": saved(fresh, "whole"),
        "logprobs": [
            forward(made(service.create_training_client_from_state(path))),
            loaded_weights,
        ],
    }


@found.step
def load_state_after_training():
    client = trained_adapter(service)
    path = saved(client, "one")
    logprobs = forward(client)
    steps(client, 2)
    moved = forward(client)
    client.load_state(path).result()
    return {"saved": logprobs, "moved": moved, "loaded": forward(client)}


@found.step
def load_a_sampler_snapshot():
    client = adapter(service)
    path = client.save_weights_for_sampler("one").result().path
    made(service.create_training_client_from_state(path))


twice = trained_adapter(service)


@found.step
def save_twice_under_one_name():
    saved(twice, "one")
    train(twice)
    saved(twice, "one")


@found.step
def training_after_a_refusal():
    return train(twice)["grad_norm"]


if RELEASE >= (0, 20):

    @found.step
    def overwrite():
        client = trained_adapter(service)
        first = saved(client, "one")
        train(client)
        logprobs = forward(client)
        again = client.save_state("one", overwrite=True).result().path
        restored = forward(made(service.create_training_client_from_state(again)))
        return {"paths": [first, again], "logprobs": [logprobs, restored]}


@found.step
def get_info():
    client = adapter(service, rank=8)
    info = client.get_info()
    return {"model": info.model_data.model_name, "rank": info.lora_rank, "is_lora": info.is_lora}


@found.step
def parts_of_an_adapter():
    """Norms of the gradient with one kind of layer only; each must train something."""
    kinds = ("train_attn", "train_mlp", "train_unembed")
    return {
        kind: gradient_norm(
            adapter(service, **{other: other == kind for other in kinds}),
            lambda client: client.forward_backward(DATA, "cross_entropy"),
        )
        for kind in kinds
    }


@found.step
def full_parameter():
    """Rank 0 trains the whole model; beside it an adapter of the same base is untouched."""
    beside = trained_adapter(service)
    before = forward(beside)
    client = adapter(service, rank=0)
    start = forward(client)
    losses = [train(client, learning_rate=1e-3)["loss:sum"] for _ in range(4)]
    path = client.save_weights_for_sampler("trained").result().path
    state = saved(client, "state")
    end = forward(client)
    resumed = made(service.create_training_client_from_state_with_optimizer(state))
    return {
        "losses": losses,
        "start": start,
        "end": end,
        "resumed": forward(resumed),
        "beside": [before, forward(beside)],
        "path": path,
        "rank": client.get_info().lora_rank,
    }


if RELEASE >= (0, 27):

    @found.step
    def a_closed_session():
        """What another process of the same user would be told about its model."""
        ending = tinker.ServiceClient()
        client = adapter(ending)
        train(client)
        ending.close("success").result()
        adam = {"learning_rate": 0.0}
        post("optim_step", model_id=client.model_id, seq_id=3, adam_params=adam)


finish(twice)
found.report()
