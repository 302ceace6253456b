"""Samples as the tinker client does: asample, then polls of retrieve_future."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from homefire.wire.pooled import SamplingSession
from unit.inference.caller import Answered, Caller

SAMPLER = {"deployment": "job-1-sampler", "samples_job": "job-1"}
"""What makes a replica of the tests a sampler of job-1."""


def session(*, run: str = "", name: str = "", number: int = 0) -> str:
    return SamplingSession.of("job-1-sampler", "ts-1", number, run=run, snapshot=name).id


def sample_body(tokens: list[int], **fields: Any) -> dict[str, Any]:
    params = {"temperature": 0.0, "max_tokens": 4, **fields.pop("params", {})}
    return {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "sampling_params": params,
        "sampling_session_id": session(),
        **fields,
    }


async def asample(caller: Caller, tokens: list[int], **fields: Any) -> str:
    answered = await caller.post("/api/v1/asample", sample_body(tokens, **fields))
    assert answered.status == 200, answered.body
    body = answered.json()
    assert len(body["sample_sequence_ids"]) == fields.get("num_samples", 1)
    return body["request_id"]


async def retrieve(
    caller: Caller,
    request_id: str,
    *,
    accept: str = "application/json",
    until: Callable[[Answered], bool] = lambda answered: answered.status != 408,
    **fields: Any,
) -> Answered:
    body = {"request_id": request_id, **fields}
    while True:
        answered = await caller.post("/api/v1/retrieve_future", body, headers={"accept": accept})
        if until(answered):
            return answered


async def sampled(caller: Caller, tokens: list[int], **fields: Any) -> Any:
    """The JSON result, or the failure."""
    return (await retrieve(caller, await asample(caller, tokens, **fields))).json()
