"""What a user of `openai` does with a deployment.

python openai_surface.py DEPLOYMENT BASE_MODEL
"""

from __future__ import annotations

import asyncio
import os
import sys

import openai
from findings import Findings

DEPLOYMENT, BASE_MODEL = sys.argv[1:]
PROMPT = "homefire trains"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "5271"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
TOOL_CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "1 + "}, {"type": "text", "text": "2"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"x": [1, 2]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]
IDS = {"return_token_ids": True}

client = openai.OpenAI()
found = Findings()


def completion(**options: object):
    return client.completions.create(model=DEPLOYMENT, **options)


def chat(**options: object):
    return client.chat.completions.create(**{"model": DEPLOYMENT, "messages": CHAT, **options})


def ids_of(choice: object) -> dict[str, object]:
    return {
        "text": choice.text if hasattr(choice, "text") else choice.message.content,
        "finish_reason": choice.finish_reason,
        "prompt": choice.prompt_token_ids,
        "tokens": choice.token_ids,
    }


@found.step
def models():
    listed = client.models.list().data
    again = {model.id: client.models.retrieve(model.id) == model for model in listed}
    return {
        "listed": [model.model_dump() for model in listed],
        "retrieved": again,
        "below_inference": [
            model.id
            for model in client.with_options(
                base_url=str(client.base_url).replace("/v1/", "/inference/v1/")
            ).models.list()
        ],
    }


@found.step
def greedy():
    answer = completion(
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        logprobs=3,
        extra_body={"ignore_eos": True, **IDS},
    )
    (choice,) = answer.choices
    return {
        **ids_of(choice),
        "model": answer.model,
        "usage": answer.usage.model_dump(),
        "request_id": answer._request_id,
        "logprobs": choice.logprobs.model_dump(),
    }


@found.step
def scored():
    """Prompts as lists of ids, scored without generating."""
    prompts = [list(b"homefire trains"), list(b"a text of another length")]
    answer = completion(prompt=prompts, max_tokens=0, echo=True, logprobs=0)
    ranked = completion(prompt=prompts, max_tokens=0, echo=True, logprobs=2)
    return {
        "prompts": prompts,
        "texts": [choice.text for choice in answer.choices],
        "logprobs": [choice.logprobs.token_logprobs for choice in answer.choices],
        "offsets": [choice.logprobs.text_offset for choice in answer.choices],
        "tops": [choice.logprobs.top_logprobs for choice in ranked.choices],
        "usage": answer.usage.completion_tokens,
    }


@found.step
def prompts():
    """One greedy token each, for every form of a prompt."""
    forms = [PROMPT, list(PROMPT.encode()), [PROMPT, "a"], [list(PROMPT.encode()), list(b"a")]]
    answers = [
        completion(prompt=form, max_tokens=3, temperature=0, n=1, extra_body=IDS) for form in forms
    ]
    return [[ids_of(choice) for choice in answer.choices] for answer in answers]


@found.step
def choices():
    options = {"prompt": PROMPT, "max_tokens": 8, "n": 4, "seed": 11, "extra_body": IDS}
    first, again = completion(**options), completion(**options)
    return [[choice.token_ids for choice in answer.choices] for answer in (first, again)]


@found.step
def penalised():
    """Greedy, so that what the penalties do can be worked out."""
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.75, "temperature": 0}
    (one,) = completion(
        prompt=PROMPT, max_tokens=12, **penalties, extra_body={"ignore_eos": True, **IDS}
    ).choices
    (two,) = chat(max_tokens=12, **penalties, extra_body={"ignore_eos": True, **IDS}).choices
    return {"completion": one.token_ids, "chat": two.token_ids, "chat_prompt": two.prompt_token_ids}


@found.step
def biased():
    options = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True, **IDS}}
    (plain,) = completion(prompt=PROMPT, **options).choices
    banned = {str(token): -100 for token in plain.token_ids}
    (without,) = completion(prompt=PROMPT, logit_bias=banned, **options).choices
    (only,) = chat(logit_bias={"90": 100}, **options).choices
    return {"plain": plain.token_ids, "without": without.token_ids, "only": only.token_ids}


@found.step
def streamed():
    options = {"prompt": PROMPT, "max_tokens": 30, "seed": 5, "logprobs": 1, "extra_body": IDS}
    (whole,) = completion(**options).choices
    chunks = list(completion(stream=True, stream_options={"include_usage": True}, **options))
    parts = [choice for chunk in chunks for choice in chunk.choices]
    return {
        "whole": {**ids_of(whole), "logprobs": whole.logprobs.token_logprobs},
        "text": "".join(part.text for part in parts),
        "tokens": [token for part in parts for token in part.token_ids],
        "logprobs": [x for part in parts if part.logprobs for x in part.logprobs.token_logprobs],
        "finish_reasons": [part.finish_reason for part in parts if part.finish_reason],
        "usages": [chunk.usage.completion_tokens for chunk in chunks if chunk.usage],
        "choices_with_usage": [len(chunk.choices) for chunk in chunks if chunk.usage],
    }


@found.step
def stopped():
    """At a text that greedy decoding is known to say, in each form of `stop`."""
    said = completion(
        prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True, **IDS}
    )
    token = next(token for token in said.choices[0].token_ids if token < 128)
    stops = [[token], chr(token), ["never said", chr(token)]]
    options = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answers = [
        completion(stop=stop, extra_body={"ignore_eos": True, **IDS}, **options) for stop in stops
    ]
    return {
        "said": said.choices[0].token_ids,
        "token": token,
        "answers": [ids_of(a.choices[0]) for a in answers],
    }


@found.step
def chatted():
    answer = chat(
        max_completion_tokens=8,
        temperature=0.7,
        seed=3,
        logprobs=True,
        top_logprobs=4,
        extra_body={"ignore_eos": True, **IDS},
    )
    (choice,) = answer.choices
    return {
        **ids_of(choice),
        "prompt_of_answer": answer.prompt_token_ids,
        "role": choice.message.role,
        "usage": answer.usage.model_dump(),
        "logprobs": choice.logprobs.model_dump()["content"],
        "messages": CHAT,
    }


@found.step
def chat_streamed():
    options = {"max_tokens": 20, "seed": 4, "logprobs": True, "extra_body": IDS}
    (whole,) = chat(**options).choices
    with client.chat.completions.stream(model=DEPLOYMENT, messages=CHAT, **options) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.current_completion_snapshot
    return {
        "whole": whole.message.content,
        "text": text,
        "final": final.choices[0].message.content,
        "logprobs": [entry.logprob for entry in whole.logprobs.content],
        "streamed_logprobs": [entry.logprob for entry in final.choices[0].logprobs.content],
    }


@found.step
def tools():
    answer = chat(messages=TOOL_CHAT, tools=[TOOL], max_tokens=1, extra_body=IDS)
    without = chat(
        messages=TOOL_CHAT, tools=[TOOL], tool_choice="none", max_tokens=1, extra_body=IDS
    )
    return {
        "messages": TOOL_CHAT,
        "tools": [TOOL],
        "prompt": answer.prompt_token_ids,
        "prompt_without": without.prompt_token_ids,
    }


@found.step
def names():
    """Everything that `model` may be, each with what the answer says it was."""
    models = [
        DEPLOYMENT,
        DEPLOYMENT.split("/")[-1],
        BASE_MODEL,
        f"{DEPLOYMENT}@base",
        f"{BASE_MODEL}@base",
    ]
    return {
        model: client.completions.create(model=model, prompt=[1], max_tokens=1).model
        for model in models
    }


@found.step
def headers():
    raw = client.completions.with_raw_response.create(
        model=DEPLOYMENT,
        prompt=[1],
        max_tokens=1,
        extra_body={"zeta": 1},
        extra_headers={"x-request-id": "of-the-client"},
    )
    return {
        name: raw.headers[name]
        for name in ("x-request-id", "x-homefire-ignored", "x-homefire-weights")
    }


@found.step
def many_at_once():
    """The asynchronous client, whose answers must not be mixed up."""

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI() as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model=DEPLOYMENT, prompt=[97 + i] * 5, max_tokens=0, echo=True
                    )
                    for i in range(16)
                )
            )
        return [answer.choices[0].text for answer in answers]

    return asyncio.run(ask())


def refused(**options: object) -> None:
    completion(**{"prompt": [1], "max_tokens": 1, **options})


def failing(name: str, ask: object) -> None:
    """A step that is expected to raise, with what the client made of the answer."""

    def step() -> None:
        try:
            ask()
        except openai.APIStatusError as exc:
            FAILURES[name] = {
                "type": type(exc).__name__,
                "status": exc.status_code,
                "code": exc.code,
                "param": exc.param,
                "body": exc.body,
                "request_id": exc.request_id,
                "message": exc.message,
            }
            raise

    step.__name__ = name
    found.step(step)


FAILURES: dict[str, dict[str, object]] = {}
failing("bad_value", lambda: refused(temperature=-1))
failing("unknown_model", lambda: client.completions.create(model="nope", prompt=[1]))
failing("unknown_model_retrieved", lambda: client.models.retrieve("nope"))
failing("wrong_key", lambda: client.with_options(api_key="tml-wrong").models.list())
failing("other_weights", lambda: client.completions.create(model=f"{DEPLOYMENT}@gone", prompt=[1]))
failing("best_of", lambda: refused(best_of=3, n=2))
failing("penalty", lambda: refused(frequency_penalty=2.5))
failing("logit_bias", lambda: refused(logit_bias={"5": 101}))
failing("response_format", lambda: chat(response_format={"type": "json_object"}))
failing("forced_tool", lambda: chat(tools=[TOOL], tool_choice="required"))
failing(
    "image",
    lambda: chat(
        messages=[
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}],
            }
        ]
    ),
)


@found.step
def below_inference():
    """The same model name, where Fireworks' clients would wait on a 404."""
    base_url = os.environ["OPENAI_BASE_URL"].replace("/v1", "/inference/v1")
    try:
        client.with_options(base_url=base_url).completions.create(model="nope", prompt=[1])
    except openai.BadRequestError as exc:
        return exc.code


@found.step
def failures():
    return FAILURES


client.close()
found.report()
