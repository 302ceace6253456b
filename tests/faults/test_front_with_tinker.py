"""The unmodified `tinker` client against a real front, which dies under it."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.front_process import SECRET, FrontProcess

tinker = pytest.importorskip("tinker")
pytestmark = [
    # tinker leaves its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Forwarder:
    """TCP to the front's socket, since tinker speaks TCP. A dead front is a reset connection."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                front = socket.socket(socket.AF_UNIX)
                if front.connect_ex(self._path) != 0:
                    client.close()
                    front.close()
                    continue
                self._open |= {client, front}
                for source, sink in ((client, front), (front, client)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module", autouse=True)
def tinkers_own_connections() -> Iterator[None]:
    """tinker leaves its sockets to the garbage collector; the warnings about them are not ours."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def front(tmp_path: Path) -> Iterator[FrontProcess]:
    started = FrontProcess(tmp_path / "job")
    yield started
    started.close()


@pytest.fixture
def service(front: FrontProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    forwarder = Forwarder(front.spec.listen.socket)
    client = tinker.ServiceClient(
        base_url=forwarder.url,
        api_key="tml-any",
        default_headers_overrides={"x-homefire-secret": SECRET},
    )
    yield client
    client.close("success")
    forwarder.close()


@pytest.fixture
def data() -> list[Any]:
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([n, 2, 3]),
            loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]},
        )
        for n in range(3)
    ]


def test_the_loop_runs_through_deaths_of_engine_and_front(
    front: FrontProcess, service: Any, data: list[Any]
) -> None:
    model = service.create_lora_training_client("tiny", rank=0).result()
    losses = []
    deaths: dict[int, Callable[[], None]] = {
        1: front.kill_engine,
        2: lambda: _restart(front, signal.SIGKILL),
        3: lambda: _restart(front, signal.SIGTERM),
    }
    for step in range(5):
        backward = model.forward_backward(data, "cross_entropy")
        stepped = model.optim_step(tinker.AdamParams(learning_rate=0.01))
        deaths.get(step, lambda: None)()
        losses.append(backward.result().metrics["loss:sum"])
        assert stepped.result().metrics["num_backward_calls"] == 1
    assert losses == sorted(losses, reverse=True)
    assert front.status().step == 5


def test_custom_losses_saves_and_loads_work_as_the_protocol_says(
    front: FrontProcess, service: Any, data: list[Any]
) -> None:
    model = service.create_lora_training_client("tiny", rank=0).result()
    result = model.forward_backward_custom(data, _squares).result()
    assert result.metrics["count"] == 3
    model.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    assert model.save_state("s-1").result().path == "s-1"
    assert model.save_weights_for_sampler("snap").result().path == "snap"
    before = model.forward(data, "cross_entropy").result()
    assert [list(output["logprobs"].shape) for output in before.loss_fn_outputs] == [[3]] * 3
    resumed = service.create_training_client_from_state_with_optimizer("s-1").result()
    assert resumed.get_info().is_lora is False
    after = resumed.forward(data, "cross_entropy").result()
    assert after.metrics == before.metrics
    with pytest.raises(tinker.RequestFailedError, match="superseded"):
        model.optim_step(tinker.AdamParams()).result()


def test_a_custom_loss_in_chunks_runs_each_chunk_forward_once(
    front: FrontProcess, service: Any, data: list[Any]
) -> None:
    """The datums have weights, which the client sends with its forward."""
    model = service.create_lora_training_client("tiny", rank=0).result()
    result = model.forward_backward_custom(data * 400, _squares).result()
    assert len(result.loss_fn_outputs) == 1200
    assert [event["graph"] for event in front.events("forward")] == ["kept"] * 2
    assert [event["graph"] for event in front.events("forward_backward")] == ["reused"] * 2
    model.forward_backward(data, "cross_entropy").result()
    assert front.events("forward_backward")[-1]["graph"] == "freed"


def test_a_users_mistake_is_a_users_error_and_costs_one_step(service: Any, data: list[Any]) -> None:
    model = service.create_lora_training_client("tiny", rank=0).result()
    with pytest.raises(tinker.RequestFailedError, match="dapo"):
        model.forward_backward(data, "dapo").result()
    with pytest.raises(tinker.RequestFailedError, match="lacks seq_id 1"):
        model.optim_step(tinker.AdamParams()).result()
    model.forward_backward(data, "cross_entropy")
    assert model.optim_step(tinker.AdamParams()).result().metrics["num_backward_calls"] == 1


def test_chunks_that_arrive_out_of_order_are_one_gradient(service: Any, data: list[Any]) -> None:
    model = service.create_lora_training_client("tiny", rank=0).result()
    backward = model.forward_backward(data * 400, "cross_entropy")
    stepped = model.optim_step(tinker.AdamParams()).result()
    assert len(backward.result().loss_fn_outputs) == 1200
    assert stepped.metrics["num_backward_calls"] == 2


def _squares(_: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return sum((row**2).sum() for row in logprobs), {"count": len(logprobs)}


def _restart(front: FrontProcess, number: signal.Signals) -> None:
    status = front.stop(number)
    assert status == (0 if number is signal.SIGTERM else -number)
    front.start_again()
