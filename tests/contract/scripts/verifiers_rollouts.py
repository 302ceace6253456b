"""Rollouts of the environment in `verifiers_sums.py`.

python verifiers_rollouts.py DEPLOYMENT TOKENIZER_DIRECTORY
"""

from __future__ import annotations

import asyncio
import os
import sys

import verifiers.v1 as vf
from findings import Findings
from verifiers.v1.utils.loaders import load_environment

DEPLOYMENT, TOKENIZER = sys.argv[1:]
ENDPOINT = {"base_url": os.environ["OPENAI_BASE_URL"], "api_key_var": "OPENAI_API_KEY"}
found = Findings()


def environment():
    return load_environment(
        vf.SingleAgentEnvConfig(
            taskset={"id": "verifiers_sums"},
            agent={"harness": {"id": "verifiers_sums"}, "runtime": {"type": "subprocess"}},
        )
    )


async def episodes(client: vf.ClientConfig):
    """One of each task, at once."""
    env = environment()
    sampling = vf.SamplingConfig(temperature=1.0, max_tokens=10, seed=5, ignore_eos=True)
    ctx = vf.ModelContext(model=DEPLOYMENT, client=client, sampling=sampling)
    async with env.serving():
        return await asyncio.gather(*(env.run_episode(task, ctx) for task in env.taskset))


def described(episode: vf.Episode) -> dict[str, object]:
    (trace,) = episode.traces
    return {
        "errors": [error.model_dump(mode="json") for error in [*episode.errors, *trace.errors]],
        "reward": trace.reward,
        "branches": [
            {
                "tokens": branch.token_ids,
                "sampled": branch.sampled_mask,
                "logprobs": branch.logprobs,
                "messages": [message.model_dump(mode="json") for message in branch.messages],
            }
            for branch in trace.branches
        ],
    }


@found.step
def training():
    """The client that wants every token and its logprob: tokens in, tokens out."""
    client = vf.TrainClientConfig(
        **ENDPOINT, renderer={"name": "default"}, renderer_model_name=TOKENIZER
    )
    return [described(episode) for episode in asyncio.run(episodes(client))]


@found.step
def evaluation():
    """The client that relays chat completions."""
    client = vf.EvalClientConfig(**ENDPOINT)
    return [described(episode) for episode in asyncio.run(episodes(client))]


found.report()
