"""Gradients and weights as the `tinker` client meets them at the server's root."""

from __future__ import annotations

import tinker
import torch
from findings import Findings
from tinker_kit import (
    DATA,
    LINEAR,
    RELEASE,
    ROWS,
    STILL,
    adapter,
    cross_entropy,
    datum,
    finish,
    floats,
    forward,
    gradient_norm,
    ints,
    logprobs_of,
    train,
    trained_adapter,
)

found = Findings()
service = tinker.ServiceClient()
client = trained_adapter(service)
"""Shared by the steps that measure gradients: they move no weight."""


def norm_of_data(client) -> float:
    return gradient_norm(client, cross_entropy(DATA))


def custom_cross_entropy(scale: float, data=DATA):
    def loss_fn(data, logprobs):
        loss = -scale * torch.cat([each.flatten() for each in logprobs]).sum()
        return loss, {"mine": float(loss.detach())}

    return lambda client: client.forward_backward_custom(data, loss_fn)


@found.step
def capabilities():
    return [model.model_name for model in service.get_server_capabilities().supported_models]


@found.step
def cross_entropy_is_a_weighted_sum():
    weights = [[0.5 * (i % 3) for i in range(len(row) - 1)] for row in ROWS]
    data = [datum(row, weights=floats(w)) for row, w in zip(ROWS, weights, strict=True)]
    output = adapter(service).forward_backward(data, "cross_entropy").result()
    return {
        "weights": weights,
        "logprobs": logprobs_of(output),
        "loss": output.metrics["loss:sum"],
    }


@found.step
def without_weights_every_token_counts():
    data = [
        tinker.Datum(model_input=each.model_input, loss_fn_inputs={"target_tokens": targets})
        for each, targets in ((d, d.loss_fn_inputs["target_tokens"]) for d in DATA)
    ]
    return {"absent": gradient_norm(client, cross_entropy(data)), "ones": norm_of_data(client)}


@found.step
def gradient_of_a_batch():
    return {
        "once": norm_of_data(client),
        "twice": gradient_norm(client, cross_entropy([*DATA, *DATA])),
        "weighted": gradient_norm(client, cross_entropy([datum(row, weight=3.0) for row in ROWS])),
        "unweighted": gradient_norm(
            client, cross_entropy([datum(row, weight=0.0) for row in ROWS])
        ),
    }


@found.step
def forward_leaves_no_gradient():
    alone = norm_of_data(client)  # before any forward
    beside = gradient_norm(client, cross_entropy(DATA), lambda c: c.forward(DATA, "cross_entropy"))
    return {
        "alone": alone,
        "beside_a_forward": beside,
        "logprobs": [forward(client), forward(client)],
    }


@found.step
def gradients_accumulate():
    together = norm_of_data(client)
    zero = cross_entropy([datum(ROWS[0], weight=0.0)])
    parts = gradient_norm(client, *(cross_entropy([each]) for each in DATA), zero)
    return {"together": together, "parts": parts, "cleared": norm_of_data(client)}


@found.step
def custom_loss():
    result = custom_cross_entropy(1.0)(client).result()
    client.optim_step(STILL).result()
    norms = {
        str(scale): gradient_norm(client, custom_cross_entropy(scale)) for scale in (1, 10, -1)
    }
    return {
        "norms": norms,
        "builtin": norm_of_data(client),
        "builtin_less_custom": gradient_norm(
            client, cross_entropy(DATA), custom_cross_entropy(-1.0)
        ),
        "metrics": result.metrics,
        "sum_of_logprobs": sum(map(sum, forward(client))),
    }


def update_of(scale: float) -> dict[str, object]:
    """What a custom loss makes of the weights, to be read in the store."""
    client = trained_adapter(service)
    before = client.save_weights_for_sampler("before").result().path
    custom_cross_entropy(scale)(client).result()
    client.optim_step(LINEAR).result()
    return {"before": before, "after": client.save_weights_for_sampler("after").result().path}


@found.step
def custom_updates():
    builtin = trained_adapter(service)
    before = builtin.save_weights_for_sampler("before").result().path
    train(builtin, params=LINEAR)
    after = builtin.save_weights_for_sampler("after").result().path
    scaled = {str(scale): update_of(scale) for scale in (1, 10, -1)}
    return {"builtin": {"before": before, "after": after}, **scaled}


@found.step
def clipping():
    def update(clip: float) -> dict[str, object]:
        client = trained_adapter(service)
        before = client.save_weights_for_sampler("before").result().path
        params = {**LINEAR.model_dump(include={"learning_rate", "eps", "beta1", "beta2"})}
        metrics = train(client, params=tinker.AdamParams(**params, grad_clip_norm=clip))
        return {
            "before": before,
            "after": client.save_weights_for_sampler("after").result().path,
            "norm": metrics["grad_norm"],
        }

    free = update(0.0)
    clip = free["norm"] / 4
    return {"free": free, "clipped": update(clip), "loose": update(free["norm"] * 2)}


@found.step
def defaults_of_adam():
    """A client that leaves a field out means the default of its own class."""

    def after_steps(**adam: float) -> str:
        client = adapter(service)
        for _ in range(3):
            train(client, params=tinker.AdamParams(learning_rate=1e-2, **adam))
        return client.save_weights_for_sampler("after").result().path

    return {
        "left_out": after_steps(),
        "spelled": after_steps(
            beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0
        ),
    }


@found.step
def learning():
    client = adapter(service)
    losses = [train(client)["loss:sum"] for _ in range(12)]
    return {"losses": losses, "tokens": sum(len(row) - 1 for row in ROWS)}


@found.step
def more_than_one_chunk():
    """2050 datums are three requests; from 0.20 on, the first is sent last."""
    pairs = [[i % 251, (7 * i) % 253] for i in range(2050)]
    data = [datum(pair) for pair in pairs]
    half = len(data) // 2
    output = client.forward_backward(data, "cross_entropy").result()
    whole = client.optim_step(STILL).result().metrics["grad_norm"]
    return {
        "pairs": pairs,
        "logprobs": [each[0] for each in logprobs_of(output)],
        "some_again": [each[0] for each in forward(client, data[1020:1030])],
        "loss": output.metrics["loss:sum"],
        "whole": whole,
        "halves": gradient_norm(client, cross_entropy(data[:half]), cross_entropy(data[half:])),
    }


def behaviour(logprobs: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """Old logprobs on both sides of the learner's, so that every loss clips, and advantages."""
    return [
        (
            [p + 0.4 * ((j + i) % 3 - 1) for j, p in enumerate(row)],
            [1.0 - 0.8 * ((j + i) % 4) for j in range(len(row))],
        )
        for i, row in enumerate(logprobs)
    ]


def importance_sampling(p, q, a):
    return -(torch.exp(p - q) * a).sum()


def ppo(p, q, a):
    ratio = torch.exp(p - q)
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()


def cispo(p, q, a):
    return -(torch.exp(p - q).clamp(0.8, 1.2).detach() * p * a).sum()


def dro(p, q, a):
    return -(p * a - 0.05 / 2 * (p - q) ** 2).sum()


def gspo(p, q, a):
    ratio = torch.exp((p - q).mean()).detach() * torch.exp(p - p.detach())
    return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum()


CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


def against_formula(name: str, formula, config) -> dict[str, float]:
    """The gradient of the built-in loss, and what is left of it without the formula's."""
    policy = behaviour(forward(client))
    data = [
        datum(row, logprobs=floats(q), advantages=floats(a))
        for row, (q, a) in zip(ROWS, policy, strict=True)
    ]
    if name == "gspo":
        for each in data:
            each.loss_fn_inputs["sequence_ratio_mask"] = floats([1.0] * each.model_input.length)

    def negated(data, logprobs):
        loss = sum(
            formula(p, torch.tensor(q), torch.tensor(a))
            for p, (q, a) in zip(logprobs, policy, strict=True)
        )
        return -loss, {"formula": float(loss.detach())}

    def builtin(client):
        return client.forward_backward(data, name, config)

    def custom(client):
        return client.forward_backward_custom(DATA, negated)

    left = gradient_norm(client, builtin, custom)
    losses = builtin(client).result().metrics, custom(client).result().metrics
    client.optim_step(STILL).result()
    return {
        "norm": gradient_norm(client, builtin),
        "left": left,
        "loss": losses[0]["loss:sum"],
        "formula": losses[1]["formula"],
    }


@found.step
def loss_importance_sampling():
    return against_formula("importance_sampling", importance_sampling, None)


@found.step
def loss_ppo():
    return against_formula("ppo", ppo, CLIP)


@found.step
def loss_cispo():
    return against_formula("cispo", cispo, CLIP)


@found.step
def loss_dro():
    return against_formula("dro", dro, {"beta": 0.05})


if RELEASE >= (0, 34):

    @found.step
    def loss_gspo():
        return against_formula("gspo", gspo, CLIP)


if RELEASE >= (0, 36):

    @found.step
    def traced_custom_loss():
        """A loss that the client traces; here it runs in the client, as this server asks."""

        def negative(logprobs, weights):
            loss = -(-logprobs * weights).sum()
            return loss, {"custom/negative:sum": loss}

        ranks = {"logprobs": 1, "weights": 1}
        handle = service.create_custom_loss(negative, ranks).result()
        return {
            "norm": norm_of_data(client),
            "left": gradient_norm(
                client,
                cross_entropy(DATA),
                lambda c: c.forward_backward_custom(DATA, handle),
            ),
        }


@found.step
def several_targets_for_a_token():
    """[T, K] targets: cross entropy towards a distribution."""
    row = ROWS[0]
    targets = [[token, (token + 1) % 256] for token in row[1:]]
    weights = [[0.75, 0.25]] * len(targets)
    soft = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": ints(targets), "weights": floats(weights)},
    )
    other = [row[0], *[pair[1] for pair in targets]]
    hard = [
        datum(row, weight=0.75),
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": ints(other[1:]),
                "weights": floats([0.25] * len(targets)),
            },
        ),
    ]
    output = client.forward_backward([soft], "cross_entropy").result()
    soft_norm = client.optim_step(STILL).result()
    return {
        "shape": list(output.loss_fn_outputs[0]["logprobs"].shape),
        "loss": output.metrics["loss:sum"],
        "soft": soft_norm.metrics["grad_norm"],
        "hard": gradient_norm(client, cross_entropy(hard)),
        "hard_loss": client.forward(hard, "cross_entropy").result().metrics["loss:sum"],
    }


finish(client)
found.report()
