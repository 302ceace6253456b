"""Snapshots of the root plane as `model`.

python openai_snapshots.py BASE_MODEL PATH [PATH …]
"""

from __future__ import annotations

import sys

import openai
from findings import Findings

BASE_MODEL, *PATHS = sys.argv[1:]
TEXT = list(b"homefire trains what you own")
client = openai.OpenAI(max_retries=20)
"""The sampler starts with the first request: until it is up, requests are held and then told to retry."""
found = Findings()


def scored(model: str) -> dict[str, object]:
    raw = client.completions.with_raw_response.create(
        model=model, prompt=TEXT, max_tokens=0, echo=True, logprobs=0
    )
    answer = raw.parse()
    return {
        "logprobs": answer.choices[0].logprobs.token_logprobs[1:],
        "model": answer.model,
        "weights": raw.headers["x-homefire-weights"].split(";")[0],
    }


@found.step
def scores():
    """Back and forth, so that nothing of one request's weights stays for the next."""
    return [{model: scored(model) for model in (BASE_MODEL, *PATHS)} for _ in range(2)]


@found.step
def chat():
    answer = client.chat.completions.create(
        model=PATHS[-1], messages=[{"role": "user", "content": "5271"}], max_tokens=4, temperature=0
    )
    return answer.model


@found.step
def absent():
    client.completions.create(model=f"{PATHS[0]}-absent", prompt=TEXT)


client.close()
found.report()
