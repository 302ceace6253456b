"""The real `verifiers`: rollouts whose token ids and logprobs are the sampler's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contract.cells import versions
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS
from contract.speaker import Speaker, serve_speaker

TOLERANCE = 1e-4
NUM_TOKENS = 10
"""Of every turn: the rollouts ask for so many, whatever is said."""

pytestmark = pytest.mark.parametrize("version", versions("verifiers"), scope="module")


def cell(method: str) -> Any:
    return pytest.mark.cell(client="verifiers", method=method)


@pytest.fixture(scope="module")
def speaker(homefire_up, tmp_path_factory) -> Speaker:
    return serve_speaker(homefire_up, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def findings(speaker, version, tmp_path_factory) -> ClientFindings:
    home: Path = tmp_path_factory.mktemp("verifiers")
    return run_client(
        ENVIRONMENTS["verifiers", version],
        "verifiers_rollouts.py",
        speaker.server,
        speaker.deployment,
        speaker.directory,
        env={"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")},
    )


@cell("training client: rollouts with token ids and logprobs (tokens in, tokens out)")
def test_sampled_tokens_carry_the_logprobs_that_transformers_gives_them(findings, speaker):
    episodes = findings["training"]
    assert len(episodes) == 3
    for episode in episodes:
        assert episode["errors"] == []
        assert episode["reward"] == NUM_TOKENS
        for branch in episode["branches"]:
            tokens, sampled = branch["tokens"], branch["sampled"]
            start = sampled.index(True)
            assert sampled[start:] == [True] * NUM_TOKENS
            assert branch["logprobs"][start:] == pytest.approx(
                speaker.logprobs(tokens[:start], tokens[start:]), abs=TOLERANCE
            )


@cell("training client: rollouts with token ids and logprobs (tokens in, tokens out)")
def test_the_first_turn_is_asked_with_the_chat_template_of_the_model(findings, speaker):
    for episode in findings["training"]:
        first = episode["branches"][0]
        expected = speaker.tokenizer.apply_chat_template(
            [{"role": "user", "content": first["messages"][0]["content"]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        assert first["tokens"][: first["sampled"].index(True)] == expected


@cell("evaluation client: chat.completions")
def test_the_evaluation_client_is_told_what_the_training_client_was(findings):
    """The same seed, prompt and weights draw the same tokens, here as text without special ones."""
    for trained, evaluated in zip(findings["training"], findings["evaluation"], strict=True):
        (branch,) = evaluated["branches"]
        question, said, *again = branch["messages"]
        first = trained["branches"][0]
        tokens = [
            t for t, sampled in zip(first["tokens"], first["sampled"], strict=True) if sampled
        ]
        assert evaluated["errors"] == []
        assert question["content"] == first["messages"][0]["content"]
        assert said["content"] == bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
        assert [message["role"] for message in again] == ["user", "assistant"]
