"""Sampling at the server's root, as the `tinker` client meets it."""

from __future__ import annotations

import tinker
from findings import Findings
from tinker_kit import (
    BASE,
    DATA,
    RELEASE,
    ROWS,
    adapter,
    finish,
    forward,
    ints,
    train,
    trained_adapter,
)

found = Findings()
service = tinker.ServiceClient()

PROMPT = list(b"homefire ")
EVERY = [each.model_input.to_ints() for each in DATA]

base = service.create_sampling_client(base_model=BASE)
trainer = trained_adapter(service, steps=6)
path = trainer.save_weights_for_sampler("one").result().path
policy = service.create_sampling_client(model_path=path)


def sample(client, prompt=PROMPT, *, num_samples=1, more=None, **params):
    """`more` are arguments of `sample` itself."""
    params = tinker.SamplingParams(**{"max_tokens": 12, **params})
    chunks = tinker.ModelInput.from_ints(prompt)
    return client.sample(chunks, num_samples, params, **(more or {})).result()


def tokens(*args, **kwargs) -> list[list[int]]:
    return [list(each.tokens) for each in sample(*args, **kwargs).sequences]


def logprobs(client, prompt) -> list[float | None]:
    return list(client.compute_logprobs(tinker.ModelInput.from_ints(prompt)).result())


def sequences(response) -> list[dict[str, object]]:
    return [
        {"tokens": list(s.tokens), "logprobs": list(s.logprobs), "stop_reason": str(s.stop_reason)}
        for s in response.sequences
    ]


@found.step
def greedy():
    return {
        "path": path,
        "prompt": PROMPT,
        "base": tokens(base, temperature=0.0, max_tokens=24, stop=[]),
        "policy": tokens(policy, temperature=0.0, max_tokens=24, stop=[]),
    }


@found.step
def sampled_logprobs():
    return {
        "base": sequences(sample(base, num_samples=3, seed=1, stop=[])),
        "policy": sequences(sample(policy, num_samples=3, seed=1, stop=[])),
    }


@found.step
def compute_logprobs():
    return {
        "prompts": ROWS,
        "base": [logprobs(base, row) for row in ROWS],
        "policy": [logprobs(policy, row) for row in ROWS],
        "trainer": forward(trainer),
    }


@found.step
def include_prompt_logprobs():
    with_them = sample(base, more={"include_prompt_logprobs": True})
    return {"asked": list(with_them.prompt_logprobs), "not_asked": sample(base).prompt_logprobs}


@found.step
def topk_prompt_logprobs():
    more = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 4}
    rows = sample(base, more=more).topk_prompt_logprobs
    return [row and [[int(token), float(logprob)] for token, logprob in row] for row in rows]


@found.step
def seeds():
    return {
        "one": tokens(base, seed=5, num_samples=4),
        "again": tokens(base, seed=5, num_samples=4),
        "other": tokens(base, seed=6, num_samples=4),
        "none": [tokens(base), tokens(base)],
    }


@found.step
def truncated_sampling():
    return {
        "top_k": [tokens(base, seed=seed, top_k=1) for seed in (1, 2)],
        "top_p": [tokens(base, seed=seed, top_p=1e-6) for seed in (1, 2)],
        "greedy": tokens(base, temperature=0.0),
    }


@found.step
def stops():
    """The greedy continuation, cut in each way that a client can ask for."""
    (whole,) = tokens(policy, temperature=0.0, stop=[], max_tokens=24)
    letters = [token for token in whole if 32 < token < 127]
    end = letters[min(3, len(letters) - 1)]

    def cut(stop):
        return sequences(sample(policy, temperature=0.0, stop=stop, max_tokens=24))[0]

    return {
        "whole": whole,
        "cut": whole.index(end) + 1,
        "ids": cut([end]),
        "text": cut(chr(end)),
        "texts": cut(["\0never", chr(end)]),
        "ignored": cut([]),
    }


@found.step
def without_max_tokens():
    (sequence,) = sequences(sample(base, temperature=0.0, max_tokens=None))
    return {"length": len(sequence["tokens"]), "stop_reason": sequence["stop_reason"]}


@found.step
def snapshots_stay():
    """A sampler of checkpoint 1 after more training, sampling in between; and one made anew."""
    client = trained_adapter(service, seed=8)
    one = client.save_weights_for_sampler("first").result().path
    first = service.create_sampling_client(model_path=one)
    ephemeral = client.save_weights_and_get_sampling_client()
    before = logprobs(first, ROWS[0])
    before_ephemeral = logprobs(ephemeral, ROWS[0])
    greedy = tokens(first, temperature=0.0)
    state = client.save_state("before").result().path
    trained = forward(client)
    for _ in range(3):
        tokens(first, num_samples=2)
        tokens(base)
    unmoved = client.save_state("after_sampling").result().path
    unmoved_logprobs = forward(client)
    for _ in range(5):
        train(client, learning_rate=3e-2)
    two = client.save_weights_for_sampler("second").result().path
    second = service.create_sampling_client(model_path=two)
    return {
        "before": before,
        "after": logprobs(first, ROWS[0]),
        "anew": logprobs(service.create_sampling_client(model_path=one), ROWS[0]),
        "ephemeral": [before_ephemeral, logprobs(ephemeral, ROWS[0])],
        "second": logprobs(second, ROWS[0]),
        "trainer": forward(client)[0],
        "greedy": [greedy, tokens(first, temperature=0.0)],
        "states": [state, unmoved],
        "trained": [trained, unmoved_logprobs],
    }


@found.step
def many_at_once():
    """Fifty requests in flight over three sets of weights, each answered by its own."""
    other = adapter(service, seed=9)
    for _ in range(4):
        train(other)
    clients = [base, policy, other.save_weights_and_get_sampling_client()]
    alone = [tokens(client, temperature=0.0) for client in clients]
    params = tinker.SamplingParams(max_tokens=12, temperature=0.0)
    prompt = tinker.ModelInput.from_ints(PROMPT)
    pending = [clients[i % 3].sample(prompt, 1, params) for i in range(48)]
    together = [[list(s.tokens) for s in each.result().sequences] for each in pending]
    return {"alone": alone, "together": together}


@found.step
def a_prompt_in_several_chunks():
    chunks = [
        tinker.EncodedTextChunk(tokens=PROMPT[:4]),
        tinker.EncodedTextChunk(tokens=PROMPT[4:]),
    ]
    params = tinker.SamplingParams(max_tokens=12, temperature=0.0)
    response = base.sample(tinker.ModelInput(chunks=chunks), 1, params).result()
    return {
        "chunks": [list(s.tokens) for s in response.sequences],
        "one": tokens(base, temperature=0.0),
    }


@found.step
def base_of_a_sampler():
    if RELEASE < (0, 15):
        return None
    return {"base": base.get_base_model(), "policy": policy.get_base_model()}


@found.step
def a_snapshot_that_is_not():
    gone = path.rsplit("/", 1)[0] + "/never_saved"
    sample(service.create_sampling_client(model_path=gone))


@found.step
def a_model_that_is_not():
    sample(service.create_sampling_client(base_model="no-such-model"))


@found.step
def a_prompt_that_is_too_long():
    sample(base, prompt=[65] * 5000)


@found.step
def a_token_that_is_not():
    sample(base, prompt=[65, 1_000_000])


if RELEASE >= (0, 29):

    @found.step
    def topk_sample_logprobs():
        response = sample(base, temperature=0.0, more={"topk_sample_logprobs": 3})
        (sequence,) = response.sequences
        rows = sequence.topk_logprobs
        return {
            "rows": [[[int(token), float(logprob)] for token, logprob in row] for row in rows],
            "tokens": list(sequence.tokens),
            "logprobs": list(sequence.logprobs),
        }


if RELEASE >= (0, 30):

    @found.step
    def target_prompt_logprobs():
        targets = [[PROMPT[i + 1], -1, 65] for i in range(len(PROMPT) - 1)]
        more = {"include_prompt_logprobs": True, "target_prompt_logprobs": ints(targets)}
        response = sample(base, more=more, max_tokens=1)
        return {
            "targets": targets,
            "logprobs": response.target_prompt_logprobs.to_torch().tolist(),
            "prompt_logprobs": list(response.prompt_logprobs),
        }


if RELEASE >= (0, 31):

    @found.step
    def prompt_alt_tokens():
        drawn = sample(base, more={"prompt_alt_tokens_k": 3}, max_tokens=1).prompt_alt_tokens
        return {
            "tokens": drawn.tokens.to_torch().tolist(),
            "logprobs": drawn.logprobs.to_torch().tolist(),
        }


if RELEASE >= (0, 33):

    @found.step
    def prompt_logprobs_last_n():
        prompt = tinker.ModelInput.from_ints(ROWS[0])
        last = base.compute_logprobs(prompt, prompt_logprobs_last_n=3).result()
        return {"last": list(last), "all": logprobs(base, ROWS[0])}


finish(trainer)
found.report()
