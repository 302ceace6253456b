"""The SDK's DeploymentSampler: tokens in, tokens and logprobs out.

python fireworks_sampling.py TOKENIZER_DIRECTORY
"""

from __future__ import annotations

import asyncio
import sys

from findings import Findings
from fireworks_plane import KEY, MODEL, PACE_S, deployments, jobs, sdk, service_of, step, tinker
from transformers import AutoTokenizer

found = Findings()
NAME = "sampling"
GREEDY = {"temperature": 0.0, "seed": 7, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "homefire"}]
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
PROMPT = list(
    tokenizer.apply_chat_template(
        MESSAGES, tokenize=True, add_generation_prompt=True, return_dict=False
    )
)
made: dict = {}


def sample(**options):
    """Of the same prompt, whichever way the release has."""
    options = {"n": 1, "max_tokens": 6, **options}
    if not hasattr(made["sampler"], "sample_with_prompt_tokens"):  # 1.0.0a52
        return asyncio.run(made["sampler"].sample_with_tokens(messages=MESSAGES, **options))
    run = made["sampler"].sample_with_prompt_tokens(prompt_token_ids=PROMPT, **options)
    return asyncio.run(run)


def tokens(completion) -> list[int]:
    return completion.full_tokens[completion.prompt_len :]


def trainer_logprobs(row: list[int]) -> list[float]:
    """Of every token behind the first, by the trainer whose weights are served."""
    given = tinker.TensorData(data=row[1:], dtype="int64", shape=[len(row) - 1])
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": given},
    )
    result = made["client"].forward([datum], "cross_entropy").result()
    return list(result.loss_fn_outputs[0]["logprobs"].data)


@found.step
def set_up():
    """A trained policy, served."""
    created = jobs.create(sdk.TrainerJobConfig(base_model=MODEL))
    config = sdk.DeploymentConfig(
        deployment_id=NAME, base_model=MODEL, hot_load_trainer_job=created.job_name
    )
    deployments.create_or_get(config)
    endpoint = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    made["client"] = service_of(endpoint).create_training_client(base_model=MODEL, lora_rank=0)
    for _ in range(3):
        step(made["client"])
    deployments.wait_for_ready(NAME, poll_interval_s=PACE_S)
    saved = made["client"].save_weights_for_sampler_ext("served").snapshot_name
    made["controller"] = sdk.AdaptiveConcurrencyController(initial_window=4)
    made["sampler"] = sdk.DeploymentSampler(
        inference_url=deployments.inference_url,
        model=f"accounts/{deployments.account_id}/deployments/{NAME}",
        api_key=KEY,
        tokenizer=tokenizer,
        concurrency_controller=made["controller"],
    )
    return deployments.hotload_and_wait(NAME, MODEL, saved)


@found.step
def sample_with_tokens():
    """The chat template is the client's: the server sees what it rendered."""
    run = made["sampler"].sample_with_tokens(messages=MESSAGES, n=3, max_tokens=5)
    completions = asyncio.run(run)
    return {
        "prompts": [c.full_tokens[: c.prompt_len] == PROMPT for c in completions],
        "lengths": [c.completion_len == len(tokens(c)) <= 5 for c in completions],
    }


@found.step
def sample_with_prompt_tokens():
    run = made["sampler"].sample_with_prompt_tokens(prompt_token_ids=[5, 7], n=2, max_tokens=3)
    completions = asyncio.run(run)
    return [[c.full_tokens[: c.prompt_len], c.completion_len <= 3] for c in completions]


@found.step
def seed():
    """The same seed draws the same again, others differ."""
    options = {"max_tokens": 24, "temperature": 1.0, "ignore_eos": True}
    first, again, other = (sample(seed=seed, **options)[0] for seed in (1, 1, 2))
    return {
        "same": tokens(first) == tokens(again),
        "differs": tokens(first) != tokens(other),
        "reason": first.finish_reason,
        "count": first.completion_len,
    }


@found.step
def several_samples():
    completions = sample(n=4, max_tokens=16, temperature=1.0, ignore_eos=True)
    return len({tuple(tokens(c)) for c in completions})


@found.step
def logprobs():
    """The sampler's are the trainer's, token by token."""
    (completion,) = sample(logprobs=True, **GREEDY)
    trained = trainer_logprobs(completion.full_tokens)[completion.prompt_len - 1 :]
    return {"sampled": list(completion.inference_logprobs), "trained": trained}


@found.step
def sampling_logprobs():
    """Of the distribution that was sampled, at a temperature that is not 1."""
    (completion,) = sample(logprobs=True, temperature=0.5, seed=5, ignore_eos=True)
    return {
        "raw": list(completion.inference_logprobs),
        "sampled": list(completion.sampling_logprobs),
    }


@found.step
def echo():
    """Prompt and completion, without the first token, which nothing precedes."""
    (completion,) = sample(echo=True, logprobs=True, **GREEDY)
    return {
        "echoed": completion.logprobs_echoed,
        "scored": list(completion.inference_logprobs),
        "trained": trainer_logprobs(completion.full_tokens),
        "prompt": completion.full_tokens[: completion.prompt_len] == PROMPT,
    }


@found.step
def top_logprobs():
    """Over the stream as it comes: the sampler keeps none of them in older releases."""
    body, _ = asyncio.run(
        made["sampler"].async_completions_stream(
            prompt=PROMPT, max_tokens=3, logprobs=True, top_logprobs=4, raw_output=True, **GREEDY
        )
    )
    content = body["choices"][0]["logprobs"]["content"]
    return [
        {
            "token": entry["token_id"],
            "logprob": entry["logprob"],
            "top": [[top["token_id"], top["logprob"]] for top in entry["top_logprobs"]],
        }
        for entry in content
    ]


@found.step
def stop():
    """As text: the completion ends before it."""
    (whole,) = sample(max_tokens=40, **GREEDY)
    ending = next(letter for letter in whole.text if letter.isalnum())
    (cut,) = sample(max_tokens=40, stop=[ending], **GREEDY)
    return {"reason": cut.finish_reason, "text": cut.text, "before": whole.text.split(ending)[0]}


@found.step
def max_seq_len():
    """A prompt that fills it asks nothing; what grew over it is dropped."""
    return {
        "too_long": sample(max_seq_len=len(PROMPT)),
        "grown": sample(max_seq_len=len(PROMPT) + 2, max_tokens=6, **GREEDY),
        "fits": len(sample(max_seq_len=len(PROMPT) + 6, max_tokens=6, **GREEDY)),
    }


@found.step
def concurrency_controller():
    """The server's queue times reach it, so that its window moves."""
    summary = made["controller"].step_completed()
    return {
        "window": summary["window"],
        "after": summary["window_after"],
        "queue": summary["avg_pq"],
    }


@found.step
def token_out_of_range():
    asyncio.run(made["sampler"].sample_with_prompt_tokens(prompt_token_ids=[99999]))


@found.step
def sampling_client():
    """Tinker's own interface over the deployment."""
    client = sdk.FiretitanSamplingClient(made["sampler"])
    prompt = tinker.ModelInput.from_ints(PROMPT)
    params = tinker.SamplingParams(max_tokens=5, temperature=1.0)
    result = client.sample(prompt=prompt, num_samples=2, sampling_params=params).result()
    return [
        {"tokens": list(s.tokens), "logprobs": len(s.logprobs), "reason": s.stop_reason}
        for s in result.sequences
    ]


found.report()
