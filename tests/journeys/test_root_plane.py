"""The real tinker client at the server's root: it names base models, and jobs come and go behind it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
from typing import Any

import httpx
import pytest
import tinker

from homefire.checkpoints import ensure_tiny
from journeys.loop import row

TEXT = b"homefire trains what you own"
OTHER = b"another tenant, another text"
ADAM = tinker.AdamParams(learning_rate=0.05, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def server(homefire_up, tmp_path_factory) -> Any:
    """With a second base model, and a port that stays the same over restarts."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(ensure_tiny(root / "tiny"), root / "second")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return homefire_up(
        engine="fake",
        arguments=["--port", str(port), "--model-root", str(root), "--alias", "Org/Tiny=tiny"],
    )


@pytest.fixture
def connect(server):
    """A factory of sessions, each finished with its test."""
    clients: list[tinker.ServiceClient] = []

    def start(where: Any = server, **options: Any) -> tinker.ServiceClient:
        client = tinker.ServiceClient(base_url=where.url, api_key=where.api_key, **options)
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.close("success").result(WAIT_S)


def lora(client: tinker.ServiceClient, base_model: str = "tiny", **options: Any) -> Any:
    options = {"rank": 4, "seed": 11, **options}
    return client.create_lora_training_client(base_model, **options).result(WAIT_S)


def train(model: Any, text: bytes = TEXT, *, steps: int = 1) -> list[float]:
    """Losses of `steps` optimizer steps, pipelined as loops do it."""
    futures = []
    for _ in range(steps):
        passed = model.forward_backward([row(text)], "cross_entropy")
        futures.append((passed, model.optim_step(ADAM)))
    losses = []
    for passed, stepped in futures:
        losses.append(passed.result(WAIT_S).metrics["loss:sum"])
        stepped.result(WAIT_S)
    return losses


def loss(model: Any, text: bytes = TEXT) -> float:
    return model.forward([row(text)], "cross_entropy").result(WAIT_S).metrics["loss:sum"]


def ask(server: Any, path: str) -> Any:
    return httpx.get(server.url + path, headers={"X-Api-Key": server.api_key}, timeout=60).json()


def job_of(server: Any, model: Any) -> str:
    runs = {run["run"]: run["job"] for run in ask(server, "/v1/homefire/status")["runs"]}
    return runs[model.model_id]


def pid_of(server: Any, service: str) -> int:
    return json.loads((server.home / "run" / f"{service}.json").read_text())["process"]["pid"]


def await_end(pid: int) -> None:
    try:
        ended = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([ended], [], [], WAIT_S)[0], f"{pid} still runs"
    os.close(ended)


def test_an_adapter_trains_and_goes_on_from_its_checkpoint(server, connect):
    client = connect(user_metadata={"team": "x"})
    model = lora(client, user_metadata={"renderer_name": "role_colon"})
    losses = train(model, steps=3)
    assert losses == sorted(losses, reverse=True)
    saved = model.save_state("after-three").result(WAIT_S).path
    assert saved == f"tinker://{model.model_id}/weights/after-three"
    resumed = client.create_training_client_from_state_with_optimizer(saved).result(WAIT_S)
    assert resumed.model_id != model.model_id
    assert job_of(server, resumed) == job_of(server, model)
    assert train(resumed, steps=2) == train(model, steps=2)


def test_two_sessions_share_a_pool_and_each_ends_as_if_alone(server, connect):
    alone = lora(connect())
    expected = [*train(alone, steps=4), loss(alone)]
    first, second = lora(connect()), lora(connect(), "Org/Tiny")
    assert job_of(server, first) == job_of(server, second)
    mixed = []
    for _ in range(4):
        mixed += train(first)
        train(second, OTHER)
    assert [*mixed, loss(first)] == expected


def test_two_base_models_have_two_pools(server, connect):
    client = connect()
    one, two = lora(client), lora(client, "accounts/local/models/second")
    assert job_of(server, one) != job_of(server, two)
    assert train(one) == train(two)


def test_rank_zero_trains_all_parameters_in_a_job_of_its_own(server, connect):
    client = connect()
    full, adapter = lora(client, rank=0), lora(client)
    assert job_of(server, full).startswith("run-")
    assert job_of(server, adapter).startswith("pool-")
    assert not full.get_info().is_lora
    before = loss(full)
    train(full, steps=2)
    assert loss(full) < before
    saved = full.save_state("full").result(WAIT_S).path
    copy = client.create_training_client_from_state_with_optimizer(saved).result(WAIT_S)
    assert job_of(server, copy) not in {job_of(server, full), job_of(server, adapter)}
    assert loss(copy) == loss(full)


def logprobs(sampler: Any, text: bytes = TEXT) -> list[float]:
    """Of each byte but the first, given those before it."""
    prompt = tinker.ModelInput.from_ints(list(text))
    return sampler.compute_logprobs(prompt).result(WAIT_S)[1:]


def greedy(sampler: Any, text: bytes = TEXT) -> list[int]:
    prompt = tinker.ModelInput.from_ints(list(text))
    params = tinker.SamplingParams(max_tokens=8, temperature=0.0)
    answer = sampler.sample(prompt, num_samples=1, sampling_params=params).result(WAIT_S)
    return answer.sequences[0].tokens


def trained_logprobs(model: Any, text: bytes = TEXT) -> list[float]:
    output = model.forward([row(text)], "cross_entropy").result(WAIT_S).loss_fn_outputs[0]
    return output["logprobs"].data


def test_a_base_model_is_sampled_without_training_anything(server, connect):
    sampler = connect().create_sampling_client(base_model="accounts/local/models/second")
    sampler = sampler.result(WAIT_S)
    assert len(greedy(sampler)) == 8
    assert greedy(sampler) == greedy(sampler)


def test_a_named_sampler_stays_at_its_checkpoint_while_training_goes_on(server, connect):
    client = connect()
    model = lora(client)
    train(model)
    expected = trained_logprobs(model)
    path = model.save_weights_for_sampler("ckpt-1").result(WAIT_S).path
    assert path == f"tinker://{model.model_id}/sampler_weights/ckpt-1"
    first = client.create_sampling_client(model_path=path).result(WAIT_S)
    assert logprobs(first) == pytest.approx(expected, abs=1e-4)
    begun = greedy(first)
    train(model, steps=4)
    later = model.save_weights_and_get_sampling_client().result(WAIT_S)
    assert logprobs(later) == pytest.approx(trained_logprobs(model), abs=1e-4)
    assert logprobs(later) != pytest.approx(expected, abs=1e-2)
    assert logprobs(first) == pytest.approx(expected, abs=1e-4)
    assert greedy(first) == begun


def test_sampling_changes_nothing_in_the_trainer(connect):
    client = connect()
    model, twin = lora(client), lora(client)
    begun = train(model)
    sampler = model.save_weights_and_get_sampling_client().result(WAIT_S)
    greedy(sampler)
    assert [*begun, *train(model)] == train(twin, steps=2)


def test_the_weights_of_a_full_parameter_run_are_sampled(connect):
    client = connect()
    model = lora(client, rank=0)
    train(model, steps=2)
    sampler = model.save_weights_and_get_sampling_client().result(WAIT_S)
    assert logprobs(sampler) == pytest.approx(trained_logprobs(model), abs=1e-4)


def test_two_tenants_sample_their_own_weights(connect):
    one, two = lora(connect()), lora(connect())
    train(one, TEXT, steps=3)
    train(two, OTHER, steps=3)
    samplers = [m.save_weights_and_get_sampling_client().result(WAIT_S) for m in (one, two)]
    assert logprobs(samplers[0]) == pytest.approx(trained_logprobs(one), abs=1e-4)
    assert logprobs(samplers[1]) == pytest.approx(trained_logprobs(two), abs=1e-4)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tinker://ts-0:train:0/sampler_weights/x", "does not exist"),
        ("tinker://MODEL/sampler_weights/missing", "has no sampler snapshot"),
        ("tinker://MODEL/weights/missing", "training state"),
    ],
)
def test_what_cannot_be_sampled_is_refused_at_once(connect, path, words):
    client = connect()
    path = path.replace("MODEL", lora(client).model_id)
    with pytest.raises(tinker.BadRequestError, match=words):
        client.create_sampling_client(model_path=path).result(WAIT_S)


@pytest.mark.parametrize(
    ("base_model", "rank", "words"),
    [("nonsense", 4, "available: accounts/local/models/tiny"), ("tiny", 1000, "lora_config.rank")],
)
def test_what_cannot_be_trained_is_refused_at_once(connect, base_model, rank, words):
    with pytest.raises(tinker.BadRequestError, match=words):
        lora(connect(), base_model, rank=rank)


def test_nothing_is_trained_in_a_finished_session(connect):
    client = connect()
    model = lora(client)
    train(model)
    holder = client.holder
    finished = holder.run_coroutine_threadsafe(_finish(holder))
    finished.result(WAIT_S)
    with pytest.raises(tinker.BadRequestError, match="was finished"):
        model.forward([row(TEXT)], "cross_entropy").result(WAIT_S)


async def _finish(holder: Any) -> None:
    """As `ServiceClient.close`, which also closes the connections."""
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    with holder.aclient(ClientConnectionPoolType.TRAIN) as client:
        await client.post(
            f"/api/v1/sessions/{holder.get_session_id()}/finish",
            body={"reason": {"type": "success"}, "detail": None},
            cast_to=type(None),
        )


def test_a_killed_sampler_is_started_again_and_answers_with_the_same_weights(server, connect):
    client = connect()
    model = lora(client)
    train(model)
    sampler = model.save_weights_and_get_sampling_client().result(WAIT_S)
    before = logprobs(sampler)
    deployment = f"accounts/local/deployments/{job_of(server, model)}-sampler"
    reports = ask(server, "/v1/homefire/status")["deployments"]
    (report,) = [report for report in reports if report["name"] == deployment]
    os.kill(report["replicas"][0]["pid"], signal.SIGKILL)
    assert logprobs(sampler) == before


@pytest.mark.parametrize("service", ["control", "gateway"])
def test_training_goes_on_while_a_service_is_killed(server, connect, service):
    client = connect()
    model, twin = lora(client), lora(client)
    begun = train(model, steps=2)
    os.kill(pid_of(server, service), signal.SIGKILL)
    assert [*begun, *train(model, steps=2)] == train(twin, steps=4)
    lora(connect())


def test_a_restarted_server_resumes_runs_and_samplers_where_they_were(server, connect):
    client = connect()
    model, twin = lora(client), lora(client)
    expected = train(twin, steps=4)
    begun = train(model, steps=2)
    sampler = model.save_weights_and_get_sampling_client().result(WAIT_S)
    sampled = greedy(sampler), logprobs(sampler)
    gradient = model.forward_backward([row(TEXT)], "cross_entropy").result(WAIT_S)
    server.restart()
    model.optim_step(ADAM).result(WAIT_S)
    after = [gradient.metrics["loss:sum"], *train(model)]
    assert [*begun, *after] == expected
    assert (greedy(sampler), logprobs(sampler)) == sampled


def test_what_is_idle_is_parked_and_the_next_request_wakes_it_as_it_was(homefire_up, connect):
    server = homefire_up(engine="fake", arguments=["--pool-idle", "1"])
    client = connect(server)
    model = lora(client)
    begun = train(model)
    sampler = model.save_weights_and_get_sampling_client().result(WAIT_S)
    sampled = logprobs(sampler)
    report = ask(server, "/v1/homefire/status")
    (job,), (deployment,) = report["jobs"], report["deployments"]
    for pid in (job["pid"], deployment["replicas"][0]["pid"]):
        if pid is not None:  # else it was parked already
            await_end(pid)
    assert begun + train(model, steps=2) == train(lora(client), steps=3)
    assert logprobs(sampler) == sampled
