"""A short run, whose end must not depend on how often its requests had to be sent."""

from __future__ import annotations

import tinker
from findings import Findings
from tinker_kit import adapter, datum, finish, logprobs_of, train

found = Findings()
service = tinker.ServiceClient()
client = adapter(service)


def timeless(metrics):
    """Without what differs between any two runs."""
    return {name: value for name, value in metrics.items() if name != "step_time_s"}


@found.step
def run():
    metrics = [train(client) for _ in range(2)]
    pairs = [datum([i % 251, (7 * i) % 253]) for i in range(2050)]
    passed = client.forward_backward(pairs, "cross_entropy")
    step = client.optim_step(tinker.AdamParams(learning_rate=1e-2))
    logprobs = logprobs_of(passed.result())
    metrics.append(step.result().metrics)
    return {
        "metrics": [timeless(each) for each in metrics],
        "logprobs": [each[0] for each in logprobs],
        "model": client.model_id,
        "state": client.save_state("end").result().path,
        "snapshot": client.save_weights_for_sampler("end").result().path,
    }


finish(client)
found.report()
