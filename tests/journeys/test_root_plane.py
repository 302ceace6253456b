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


def trainer_pid(server: Any, job: str) -> int:
    jobs = ask(server, "/v1/homefire/status")["jobs"]
    return next(report["pid"] for report in jobs if report["name"].endswith(f"/{job}"))


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


@pytest.mark.parametrize("service", ["control", "gateway"])
def test_training_goes_on_while_a_service_is_killed(server, connect, service):
    client = connect()
    model, twin = lora(client), lora(client)
    begun = train(model, steps=2)
    os.kill(pid_of(server, service), signal.SIGKILL)
    assert [*begun, *train(model, steps=2)] == train(twin, steps=4)
    lora(connect())


def test_a_restarted_server_resumes_runs_where_they_were(server, connect):
    client = connect()
    model, twin = lora(client), lora(client)
    expected = train(twin, steps=4)
    begun = train(model, steps=2)
    gradient = model.forward_backward([row(TEXT)], "cross_entropy").result(WAIT_S)
    server.restart()
    model.optim_step(ADAM).result(WAIT_S)
    after = [gradient.metrics["loss:sum"], *train(model)]
    assert [*begun, *after] == expected


def test_an_idle_pool_is_parked_and_the_next_request_wakes_it_as_it_was(homefire_up, connect):
    server = homefire_up(engine="fake", arguments=["--pool-idle", "1"])
    client = connect(server)
    model = lora(client)
    begun = train(model)
    job = job_of(server, model)
    ended = os.pidfd_open(trainer_pid(server, job))
    assert select.select([ended], [], [], WAIT_S)[0], "it was not parked"
    os.close(ended)
    assert begun + train(model, steps=2) == train(lora(client), steps=3)
