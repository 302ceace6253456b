"""The real `lm-eval` over `local-completions`: every score against a transformers forward."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from contract.cells import versions
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS
from contract.speaker import Speaker, serve_speaker

TOLERANCE = 1e-4
CONTEXTS = ["homefire trains", "the quick brown fox", "a", "1 + 1 =", "was it é?"]
TEXTS = ["what you own, on what you own", "naïve café", "x"]

pytestmark = pytest.mark.parametrize("version", versions("lm-eval"), scope="module")


def cell(method: str) -> Any:
    return pytest.mark.cell(client="lm-eval", method=method)


@pytest.fixture(scope="module")
def speaker(homefire_up, tmp_path_factory) -> Speaker:
    return serve_speaker(homefire_up, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def documents(speaker) -> dict[str, Any]:
    texts = {context: greedy_text(speaker, context) for context in CONTEXTS}
    stop = next(c for c in texts[CONTEXTS[3]][2:] if c.isascii())
    said = {context: text.split(stop)[0] for context, text in texts.items()}
    assert said != texts
    return {
        "choices": [choices_of(speaker, context) for context in CONTEXTS],
        "texts": [{"text": text} for text in TEXTS],
        "continued": [{"context": context, "said": text} for context, text in said.items()],
        "until": [stop, "never said"],
    }


def choices_of(speaker: Speaker, context: str) -> dict[str, Any]:
    """Two texts, and the likeliest byte where it is one by itself; right is the likeliest choice."""
    likeliest = speaker.greedy(list(context.encode()), 1)[0]
    choices = [" é", "ab", *([chr(likeliest)] if likeliest < 128 else [])]
    scores = [sum(scored(speaker, context, choice)) for choice in choices]
    return {"context": context, "choices": choices, "answer": scores.index(max(scores))}


def scored(speaker: Speaker, context: str, continuation: str) -> list[float]:
    return speaker.logprobs(list(context.encode()), list(continuation.encode()))


def greedy_text(speaker: Speaker, context: str) -> str:
    tokens = speaker.greedy(list(context.encode()), 16)
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def findings(speaker, documents, version, tmp_path_factory) -> ClientFindings:
    work = tmp_path_factory.mktemp("lm-eval")
    (work / "documents.json").write_text(json.dumps(documents))
    return run_client(
        ENVIRONMENTS["lm-eval", version],
        "lm_eval_tasks.py",
        speaker.server,
        speaker.deployment,
        speaker.directory,
        work / "documents.json",
        env={"HF_HOME": str(work / "hf")},
    )


@pytest.fixture(params=["one_by_one", "in_batches_at_once"])
def evaluated(findings, request) -> Any:
    return findings[request.param]


@cell("local-completions: loglikelihood (echo and logprobs, token ids)")
def test_choices_are_scored_and_ranked_as_by_transformers(evaluated, speaker):
    greedy = []
    for arguments, responses in evaluated["answers"]["bytes_choices"]:
        for (context, continuation), [(score, is_greedy)] in zip(arguments, responses, strict=True):
            expected = scored(speaker, context, continuation)
            tokens = list(continuation.encode())
            assert score == pytest.approx(sum(expected), abs=TOLERANCE * len(tokens))
            assert is_greedy == (speaker.greedy(list(context.encode()), len(tokens)) == tokens)
            greedy.append(is_greedy)
    assert {True, False} == set(greedy)
    assert evaluated["scores"]["bytes_choices"]["acc,none"] == 1.0


@cell("local-completions: loglikelihood_rolling")
def test_whole_texts_have_the_perplexity_that_transformers_gives_them(evaluated, speaker):
    end_of_text = speaker.tokenizer.eos_token_id
    expected = {text: sum(speaker.logprobs([end_of_text], list(text.encode()))) for text in TEXTS}
    for [[text]], [[score]] in evaluated["answers"]["bytes_texts"]:
        assert score == pytest.approx(expected[text], abs=TOLERANCE * len(text.encode()))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    perplexity = math.exp(-sum(expected.values()) / num_bytes)
    assert evaluated["scores"]["bytes_texts"]["byte_perplexity,none"] == pytest.approx(
        perplexity, rel=1e-3
    )


@cell("local-completions: generate_until")
def test_greedy_texts_are_those_of_transformers_up_to_the_stop(evaluated, documents):
    expected = {each["context"]: each["said"] for each in documents["continued"]}
    for [(context, _)], [[text]] in evaluated["answers"]["bytes_continued"]:
        assert text == expected[context]
    assert evaluated["scores"]["bytes_continued"]["exact_match,none"] == 1.0
