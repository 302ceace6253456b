"""A prompt: from messages to text, ids and logprobs."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from homefire.checkpoints import materialize
from homefire.checkpoints.tiny import ensure_tiny
from homefire.sdk import AdaptiveConcurrencyController
from journeys.loop import Loop, start_loop


@pytest.fixture(scope="module")
def loop(homefire_up) -> Loop:
    return start_loop(homefire_up())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return ensure_tiny(tmp_path_factory.mktemp("model") / "tiny")


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("trained", [False, True], ids=["base", "after two deltas"])
def test_greedy_completions_are_those_of_transformers_on_the_same_weights(loop, tiny, trained):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    if trained:
        for step in range(3):
            loop.train()
            identity = loop.syncer.save_and_hotload(f"s{step}")
        loaded = materialize(loop.store, "local", loop.job.job_id, "policy", identity)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                raw = torch.from_numpy(loaded.tensors[name].data.copy()).view(torch.bfloat16)
                parameter.copy_(raw.reshape(parameter.shape))
    prompt = list(b"homefire ")
    (completion,) = asyncio.run(
        loop.sampler().sample_with_prompt_tokens(prompt, max_tokens=12, temperature=0.0)
    )
    generated = completion.full_tokens[completion.prompt_len :]
    assert generated == greedy(model.float(), prompt, len(generated))


def test_messages_are_rendered_sampled_and_decoded(loop, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    sampler = loop.sampler(tokenizer)
    messages = [{"role": "user", "content": "5271"}]
    completions = asyncio.run(
        sampler.sample_with_tokens(messages=messages, n=6, max_tokens=8, logprobs=True)
    )
    assert len(completions) == 6
    for completion in completions:
        assert completion.full_tokens[: completion.prompt_len] == [*b"5271", 257]
        assert len(completion.inference_logprobs) == completion.completion_len <= 8
        assert completion.finish_reason in {"stop", "length"}
    assert len({tuple(c.full_tokens) for c in completions}) > 1


def test_the_adaptive_window_follows_the_servers_own_queue_times(loop):
    controller = AdaptiveConcurrencyController(initial_window=4)
    sampler = loop.sampler(concurrency_controller=controller)

    async def burst() -> dict[str, float]:
        await sampler.sample_with_prompt_tokens(list(b"abc"), n=24, max_tokens=2)
        return controller.step_completed()

    summary = asyncio.run(burst())
    assert summary["requests"] == 24
    assert controller.window_size > 4


def test_the_openai_routes_answer_with_identity(loop):
    body = {
        "model": f"accounts/local/deployments/{loop.deployment_id}",
        "messages": [{"role": "user", "content": "5271"}],
        "max_tokens": 4,
    }
    headers = {"Authorization": f"Bearer {loop.server.api_key}"}
    url = f"{loop.server.url}/inference/v1/chat/completions"
    answer = httpx.post(url, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert answer.headers["x-homefire-weights"].split(";")[0] in answer.json()["model"]


def test_a_deployment_that_never_existed_is_named(loop):
    headers = {"Authorization": f"Bearer {loop.server.api_key}"}
    body = {"model": "accounts/local/deployments/nowhere", "prompt": [1], "max_tokens": 1}
    answer = httpx.post(f"{loop.server.url}/inference/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert "nowhere" in answer.json()["error"]["message"]


def test_a_wrong_key_opens_nothing(loop):
    for path in ("/v1/accounts", "/inference/v1/completions", "/hot_load/v1/models/hot_load"):
        answer = httpx.get(f"{loop.server.url}{path}", headers={"X-Api-Key": "tml-wrong"})
        assert answer.status_code == 401


async def test_the_sdk_works_inside_a_running_event_loop_as_in_a_notebook(loop):
    loop.train()
    snapshot = loop.syncer.save_and_hotload("in-a-notebook")
    (completion,) = await loop.sampler().sample_with_prompt_tokens(
        list(b"abc"), max_tokens=2, expect_identity=snapshot
    )
    assert completion.weights.identity == snapshot
