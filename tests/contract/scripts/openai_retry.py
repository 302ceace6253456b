"""A replica gives one long answer while another request waits: the next is shed, and retried.

python openai_retry.py
"""

from __future__ import annotations

import json
import os
import threading
import urllib.request

import openai
from findings import Findings

SECRET = {"x-homefire-secret": os.environ["OPENAI_API_KEY"]}
STATUS = os.environ["OPENAI_BASE_URL"].replace("/v1", "/internal/status")

client = openai.OpenAI(default_headers=SECRET)
found = Findings()


def status() -> dict[str, object]:
    request = urllib.request.Request(STATUS, headers=SECRET)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.load(response)


def one_token(client: openai.OpenAI):
    return client.completions.with_raw_response.create(model="d", prompt=[1], max_tokens=1)


while not status()["ready"]:
    pass
long_answer = client.completions.create(
    model="d", prompt=[1], max_tokens=1 << 21, stream=True, extra_body={"ignore_eos": True}
)
next(iter(long_answer))
waiting = threading.Thread(target=one_token, args=(client,))
waiting.start()
while not status()["queued"]:
    pass


@found.step
def shed():
    try:
        one_token(client.with_options(max_retries=0))
    except openai.RateLimitError as exc:
        return {
            "type": type(exc).__name__,
            "status": exc.status_code,
            "code": exc.code,
            "retry_after": exc.response.headers["retry-after"],
        }


@found.step
def retried():
    """The long answer ends when the request is shed, so the second try finds room."""

    def make_room(response: object) -> None:
        if response.status_code == 429:
            long_answer.close()

    with openai.DefaultHttpxClient(event_hooks={"response": [make_room]}) as http_client:
        raw = one_token(client.with_options(http_client=http_client))
    return {"retries": raw.retries_taken, "tokens": raw.parse().usage.completion_tokens}


waiting.join()
client.close()
found.report()
