"""The real `openai` package: its numbers against transformers, its errors by class."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import uvicorn

from contract.cells import versions
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS
from contract.speaker import CONTEXT, Speaker, serve_speaker
from homefire.checkpoints.tiny import ensure_tiny
from homefire.foundation.clock import SystemClock
from homefire.inference.engine.opening import open_engine
from homefire.inference.replica.app import replica_app
from homefire.inference.replica.replica import Replica
from homefire.wire.specs import EngineKind, ReplicaSpec, Upstream

TOLERANCE = 1e-4
PROMPT = list(b"homefire trains")
TEXT = list(b"homefire trains what you own")
WAIT_S = 120.0

pytestmark = pytest.mark.parametrize("version", versions("openai"), scope="module")


def cell(method: str, outcome: str = "works") -> Any:
    return pytest.mark.cell(client="openai", method=method, outcome=outcome)


@pytest.fixture(scope="module")
def speaker(homefire_up, tmp_path_factory) -> Speaker:
    return serve_speaker(homefire_up, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def findings(speaker, version) -> ClientFindings:
    return run_client(
        ENVIRONMENTS["openai", version],
        "openai_surface.py",
        speaker.server,
        speaker.deployment,
        speaker.base_model,
    )


@cell("models.list, models.retrieve")
def test_models_are_listed_with_their_weights_and_found_again(findings, speaker):
    found = findings["models"]
    deployment, base = found["listed"]
    assert deployment["id"] == speaker.deployment
    assert deployment["homefire"]["weights"]["identity"] == "base"
    assert deployment["max_model_len"] == CONTEXT
    assert (base["id"], base["parent"]) == (speaker.base_model, speaker.deployment)
    assert found["retrieved"] == {speaker.deployment: True, speaker.base_model: True}
    assert found["below_inference"] == [speaker.deployment, speaker.base_model]


@cell("completions.create")
def test_greedy_completions_and_their_logprobs_are_those_of_transformers(findings, speaker):
    found = findings["greedy"]
    logprobs = found["logprobs"]
    rows = speaker.distributions([*PROMPT, *found["tokens"]])[len(PROMPT) - 1 : -1]
    assert found["prompt"] == PROMPT
    assert found["tokens"] == rows.argmax(-1).tolist()
    assert logprobs["token_logprobs"] == pytest.approx(rows.amax(-1).tolist(), abs=TOLERANCE)
    likeliest = rows.topk(3).values.tolist()
    for tops, expected in zip(logprobs["top_logprobs"], likeliest, strict=True):
        assert sorted(tops.values(), reverse=True) == pytest.approx(expected, abs=TOLERANCE)
    assert found["usage"]["prompt_tokens"] == len(PROMPT)
    assert found["usage"]["completion_tokens"] == 12
    assert found["model"] == f"{speaker.base_model}@base"
    assert found["request_id"]


@cell("completions.create: echo and logprobs of prompts")
def test_prompts_are_scored_as_transformers_does(findings, speaker):
    found = findings["scored"]
    for prompt, text, logprobs, offsets, tops in zip(
        found["prompts"],
        found["texts"],
        found["logprobs"],
        found["offsets"],
        found["tops"],
        strict=True,
    ):
        assert text == bytes(prompt).decode()
        assert offsets == list(range(len(prompt)))
        assert logprobs[0] is None
        assert logprobs[1:] == pytest.approx(
            speaker.logprobs(prompt[:1], prompt[1:]), abs=TOLERANCE
        )
        assert tops[0] is None
        best = speaker.distributions(prompt)[:-1].amax(-1).tolist()
        assert [max(top.values()) for top in tops[1:]] == pytest.approx(best, abs=TOLERANCE)
    assert found["usage"] == 0


@cell("completions.create: prompts as text, ids, and lists of either")
def test_every_form_of_a_prompt_means_the_same(findings, speaker):
    text, ids, texts, lists = findings["prompts"]
    assert text == ids
    assert texts == lists
    assert texts[0] == text[0]
    assert [choice["prompt"] for choice in texts] == [PROMPT, [97]]
    assert [choice["tokens"] for choice in texts] == [
        speaker.greedy(PROMPT, 3),
        speaker.greedy([97], 3),
    ]


@cell("completions.create: n and seed")
def test_a_seed_reproduces_choices_that_differ(findings):
    first, again = findings["choices"]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) == 4


@cell("penalties")
def test_penalties_are_those_of_openai_s_formula(findings, speaker):
    """Each drawn token's logit loses 1.5, and 0.75 for each time it was drawn."""

    def penalised(prompt: list[int]) -> list[int]:
        drawn: list[int] = []
        for _ in range(12):
            row = speaker.distributions([*prompt, *drawn])[-1].clone()
            for token in set(drawn):
                row[token] -= 1.5 + 0.75 * drawn.count(token)
            drawn.append(int(row.argmax()))
        return drawn

    found = findings["penalised"]
    assert found["completion"] == penalised(PROMPT) != speaker.greedy(PROMPT, 12)
    assert found["chat"] == penalised(found["chat_prompt"])


@cell("penalties")
@pytest.mark.parametrize(
    ("step", "param"), [("penalty", "frequency_penalty"), ("logit_bias", "logit_bias")]
)
def test_a_penalty_or_bias_out_of_range_is_refused_by_its_name(findings, step, param):
    failure = findings["failures"][step]
    assert (failure["status"], failure["param"]) == (400, param)


@cell("logit_bias")
def test_a_bias_bans_a_token_or_leaves_only_it(findings):
    found = findings["biased"]
    assert not set(found["without"]) & set(found["plain"])
    assert found["only"] == [90] * 8


@cell("completions.create: stream")
def test_a_stream_is_the_whole_answer_in_parts(findings, speaker):
    found = findings["streamed"]
    whole = found["whole"]
    assert found["text"] == whole["text"]
    assert found["tokens"] == whole["tokens"]
    assert found["logprobs"] == whole["logprobs"]
    assert whole["logprobs"] == pytest.approx(
        speaker.logprobs(PROMPT, whole["tokens"]), abs=TOLERANCE
    )
    assert found["finish_reasons"] == [whole["finish_reason"]]
    assert found["usages"] == [len(whole["tokens"])]
    assert found["choices_with_usage"] == [0]


@cell("completions.create: stop")
def test_a_stop_ends_the_text_before_it_and_the_tokens_with_it(findings):
    found = findings["stopped"]
    said, token = found["said"], found["token"]
    expected = said[: said.index(token) + 1]
    assert len(found["answers"]) == 3
    for answer in found["answers"]:
        assert answer["tokens"] == expected
        assert answer["finish_reason"] == "stop"
        assert answer["text"] == bytes(t for t in expected[:-1] if t < 256).decode(
            "utf-8", "replace"
        )


@cell("chat.completions.create")
def test_a_chat_is_rendered_and_sampled_as_transformers_would(findings, speaker):
    found = findings["chatted"]
    expected = rendered(speaker, found["messages"])
    rows = speaker.distributions([*expected, *found["tokens"]])[len(expected) - 1 : -1]
    tempered = (rows / 0.7).log_softmax(-1)
    assert found["prompt"] == found["prompt_of_answer"] == expected
    assert found["role"] == "assistant"
    assert found["usage"]["completion_tokens"] == len(found["tokens"]) == 8
    for i, entry in enumerate(found["logprobs"]):
        token = found["tokens"][i]
        assert entry["token_id"] == token
        assert entry["logprob"] == pytest.approx(rows[i, token].item(), abs=TOLERANCE)
        assert entry["sampling_logprob"] == pytest.approx(tempered[i, token].item(), abs=TOLERANCE)
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == pytest.approx(rows[i].topk(4).values.tolist(), abs=TOLERANCE)


@cell("chat.completions.create: stream")
def test_a_streamed_chat_is_the_whole_one(findings):
    found = findings["chat_streamed"]
    assert found["text"] == found["final"] == found["whole"]
    assert found["streamed_logprobs"] == found["logprobs"]
    assert all(math.isfinite(logprob) for logprob in found["logprobs"])


@cell("chat.completions.create: tools in the template")
def test_tools_and_their_answers_reach_the_template_as_in_transformers(findings, speaker):
    found = findings["tools"]
    messages = found["messages"]
    messages[0]["content"] = "1 + 2"
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"x": [1, 2]}
    assert found["prompt"] == rendered(speaker, messages, tools=found["tools"])
    assert found["prompt_without"] == rendered(speaker, messages)


@cell("model: deployment, identity, base model")
def test_a_model_is_named_in_every_form(findings, speaker):
    named = findings["names"]
    assert len(named) == 5
    assert set(named.values()) == {f"{speaker.base_model}@base"}


@cell("errors, retries, headers")
def test_an_answer_says_its_request_its_weights_and_what_was_ignored(findings):
    headers = findings["headers"]
    assert headers["x-request-id"] == "of-the-client"
    assert headers["x-homefire-ignored"] == "zeta"
    assert headers["x-homefire-weights"].startswith("base; sha=")


@cell("AsyncOpenAI")
def test_answers_to_many_at_once_are_not_mixed_up(findings):
    assert findings["many_at_once"] == [chr(97 + i) * 5 for i in range(16)]


@pytest.mark.parametrize(
    ("step", "error", "status", "code", "param"),
    [
        ("bad_value", "BadRequestError", 400, "invalid_argument", "temperature"),
        ("unknown_model", "NotFoundError", 404, "model_not_found", "model"),
        ("unknown_model_retrieved", "NotFoundError", 404, "model_not_found", "model"),
        ("wrong_key", "AuthenticationError", 401, "unauthenticated", None),
        ("other_weights", "APIStatusError", 412, "weights_mismatch", "model"),
    ],
)
@cell("errors, retries, headers")
def test_a_failure_is_the_exception_of_its_kind(findings, step, error, status, code, param):
    failure = findings["failures"][step]
    assert (failure["type"], failure["status"]) == (error, status)
    assert (failure["code"], failure["param"]) == (code, param)
    assert failure["request_id"] == failure["body"]["request_id"]


@cell("model: deployment, identity, base model")
def test_weights_that_are_no_longer_served_are_told_from_those_that_are(findings):
    failure = findings["failures"]["other_weights"]
    assert failure["body"]["current_identity"] == "base"
    assert "'base' is served" in failure["message"]


@cell("errors, retries, headers")
def test_an_unknown_model_is_no_404_where_fireworks_clients_would_wait(findings):
    assert findings["below_inference"] == "unknown_deployment"


@pytest.mark.parametrize(
    ("step", "param"),
    [
        pytest.param("best_of", "best_of", marks=cell("best_of over n", "refused: unsupported")),
        pytest.param(
            "response_format",
            "response_format",
            marks=cell("response_format", "refused: unsupported"),
        ),
        pytest.param(
            "forced_tool",
            "tool_choice",
            marks=cell("tool_choice: required", "refused: unsupported"),
        ),
        pytest.param(
            "image", "messages[0].content[0]", marks=cell("images", "refused: unsupported")
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(findings, step, param):
    assert findings.refusal(step) == "unsupported"
    failure = findings["failures"][step]
    assert (failure["status"], failure["param"]) == (400, param)


def rendered(speaker: Speaker, messages: Any, **options: Any) -> list[int]:
    return speaker.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )


@pytest.fixture
def trained(speaker) -> Iterator[dict[str, list[float]]]:
    """Paths of two snapshots of one adapter, with the trainer's own logprobs of the text at each."""
    text = tinker.ModelInput.from_ints(TEXT[:-1])
    targets = tinker.TensorData(data=TEXT[1:], dtype="int64", shape=[len(TEXT) - 1])
    datum = tinker.Datum(model_input=text, loss_fn_inputs={"target_tokens": targets})
    client = tinker.ServiceClient(base_url=speaker.server.url, api_key=speaker.server.api_key)
    model = client.create_lora_training_client(speaker.base_model, rank=8, seed=1).result(WAIT_S)
    found: dict[str, list[float]] = {}
    for step in range(2):
        model.forward_backward([datum], "cross_entropy").result(WAIT_S)
        model.optim_step(tinker.AdamParams(learning_rate=0.02)).result(WAIT_S)
        saved = model.save_weights_for_sampler(name=f"step-{step}").result(WAIT_S)
        (output,) = model.forward([datum], "cross_entropy").result(WAIT_S).loss_fn_outputs
        found[saved.path] = output["logprobs"].data
    yield found
    client.close("success").result(WAIT_S)
    del client, model
    gc.collect()  # tinker leaves a socket open, which no later test should hear of


@pytest.mark.clients
@cell("model: LoRA snapshot of the root plane")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_snapshots_are_scored_as_their_trainer_scored_them(speaker, trained, version):
    found = run_client(
        ENVIRONMENTS["openai", version],
        "openai_snapshots.py",
        speaker.server,
        speaker.base_model,
        *trained,
    )
    base = speaker.logprobs(TEXT[:1], TEXT[1:])
    expected = {speaker.base_model: base, **trained}
    for scores in found["scores"]:
        assert list(scores) == list(expected)
        for model, score in scores.items():
            assert score["logprobs"] == pytest.approx(expected[model], abs=TOLERANCE)
    first, second = trained
    assert sum(base) < sum(trained[first]) < sum(trained[second])
    assert [score["weights"] for score in found["scores"][0].values()] == [
        "base",
        "step-0",
        "step-1",
    ]
    assert found["scores"][0][first]["model"] == first
    assert found["chat"] == second
    assert found.refusal("absent") == "unknown_snapshot"


class BusyReplica:
    """A real replica on a port of its own that sheds load as soon as one request waits."""

    def __init__(self, directory: Path) -> None:
        self.api_key = "replica-secret"
        listening = socket.create_server(("127.0.0.1", 0))
        host, port = listening.getsockname()
        self.url = f"http://{host}:{port}"
        spec = ReplicaSpec(
            name="d/0",
            nonce="nonce",
            listen=Upstream("unused", self.api_key),
            account="local",
            deployment="d",
            replica=0,
            base_model="accounts/local/models/tiny",
            model_dir=str(ensure_tiny(directory / "tiny")),
            max_context_length=1 << 22,
            threads=1,
            store_root=str(directory / "store"),
            replica_dir=str(directory / "replica"),
            engine=EngineKind.FAKE,
            max_running=1,
            max_queued=1,
        )
        self._app = replica_app(Replica(spec, open_engine, SystemClock()))
        self._server = uvicorn.Server(uvicorn.Config(self._app, lifespan="on", log_config=None))
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(listening),))
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self, listening: socket.socket) -> None:
        with listening:
            await self._server._serve([listening])


@pytest.fixture
def busy_replica(tmp_path: Path) -> Iterator[BusyReplica]:
    replica = BusyReplica(tmp_path)
    yield replica
    replica.close()


@cell("errors, retries, headers")
def test_a_request_that_was_shed_is_retried_after_the_time_it_was_told(busy_replica, version):
    found = run_client(ENVIRONMENTS["openai", version], "openai_retry.py", busy_replica)
    shed = found["shed"]
    assert (shed["type"], shed["status"], shed["code"]) == ("RateLimitError", 429, "overloaded")
    assert 0 < float(shed["retry_after"]) <= 60
    assert found["retried"] == {"retries": 1, "tokens": 1}
