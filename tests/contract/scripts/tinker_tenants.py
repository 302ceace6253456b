"""Two training runs on one base model at the server's root: neither may touch the other."""

from __future__ import annotations

import tinker
from findings import Findings
from tinker_kit import DATA, adapter, datum, finish, forward, train

found = Findings()
service = tinker.ServiceClient()

OTHERS = [datum(list(b"another tenant's data")), datum(list(b"0123456789"))]
STEPS = 4


def decayed(client, data) -> None:
    train(client, data, weight_decay=0.1)


def pending_gradient(client):
    """Accumulated and not stepped."""
    client.forward_backward(DATA[:2], "cross_entropy").result()
    return client


def saved(client, name: str) -> str:
    return client.save_state(name).result().path


@found.step
def an_idle_tenant():
    """Trained once and holding a gradient while another trains; and its twin, which was alone."""
    idle, twin = adapter(service, seed=11), adapter(service, seed=11)
    for client in (twin, idle):
        decayed(client, DATA)
    before = saved(idle, "before")
    logprobs = forward(idle)
    pending_gradient(idle)
    busy = adapter(service, seed=12)
    for _ in range(STEPS):
        decayed(busy, OTHERS)
    during = saved(idle, "during")
    after = forward(idle)
    step = tinker.AdamParams(learning_rate=1e-2)
    ends = idle.optim_step(step).result().metrics
    alone = pending_gradient(twin).optim_step(step).result().metrics
    return {
        "before": before,
        "during": during,
        "logprobs": [logprobs, after],
        "grad_norms": [ends["grad_norm"], alone["grad_norm"]],
        "idle": saved(idle, "ended"),
        "twin": saved(twin, "ended"),
        "busy": [saved(busy, "ended"), sum(map(sum, forward(busy, OTHERS)))],
    }


@found.step
def tenants_at_the_same_time():
    """Submitted together, so that the server may pack them; and each again, alone."""

    def submit(client, data):
        passed = client.forward_backward(data, "cross_entropy")
        return passed, client.optim_step(
            tinker.AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=5.0)
        )

    def run(*tenants) -> list[str]:
        clients = [adapter(service, seed=seed, rank=rank) for seed, rank, _ in tenants]
        for _ in range(STEPS):
            pending = [
                submit(client, data) for client, (_, _, data) in zip(clients, tenants, strict=True)
            ]
            for futures in pending:
                for future in futures:
                    future.result()
        return [saved(client, "ended") for client in clients]

    first, second = (21, 4, DATA), (22, 8, OTHERS)
    return {"together": run(first, second), "alone": [*run(first), *run(second)]}


@found.step
def runs_of_one_seed_and_of_another():
    """The same seed starts the same adapter, another seed another."""
    return [saved(adapter(service, seed=seed), "fresh") for seed in (31, 31, 32)]


finish(adapter(service))
found.report()
