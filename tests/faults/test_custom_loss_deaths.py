"""A custom loss whose trainer dies between its forward and its backward: the weights end the same."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from faults.front_process import FrontProcess, digest
from homefire.checkpoints import ensure_tiny
from homefire.wire.specs import EngineKind

STEPS = 3
CHUNKS = 2
END = STEPS * (2 * CHUNKS + 1) + 1
"""The seq behind the last step."""


def nothing(front: FrontProcess) -> None:
    """The undisturbed run."""


def kill_engine(front: FrontProcess) -> None:
    front.kill_engine()


def kill_front(front: FrontProcess) -> None:
    front.stop(signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., FrontProcess]]:
    """Fronts on directories of their own, ended at the end."""
    started: list[FrontProcess] = []

    def begin(**options: Any) -> FrontProcess:
        started.append(FrontProcess(tmp_path / str(len(started)), **options))
        return started[-1]

    yield begin
    for front in started:
        front.close()


def run(front: FrontProcess, strike: Callable[[FrontProcess], None]) -> tuple[str, list[Any]]:
    """The end's digest, and every result. The strike falls in the second step, with all forwards done
    and one of its backwards."""
    model, results = front.model(), []
    for step in range(STEPS):
        first = step * (2 * CHUNKS + 1) + 1
        logprobs = [
            _ask(front, model, first + n, salt=CHUNKS * step + n, forward_only=True)
            for n in range(CHUNKS)
        ]
        for n, forward in enumerate(logprobs):
            weights = [-2 * value for row in _logprobs(forward) for value in row]
            salt, seq = CHUNKS * step + n, first + CHUNKS + n
            results.append(_ask(front, model, seq, salt=salt, weights=weights))
            if (step, n) == (1, 0):
                strike(front)
        adam = {"learning_rate": 0.05}
        asked = {"model_id": model, "seq_id": first + 2 * CHUNKS, "adam_params": adam}
        stepped = front.result(front.call("optim_step", **asked)["request_id"])
        del stepped["metrics"]["step_time_s"]  # two runs take their own time
        results.append(stepped)
    return digest(front, model, seq=END), results


def _ask(
    front: FrontProcess,
    model: str,
    seq: int,
    *,
    salt: int,
    forward_only: bool = False,
    weights: list[float] | None = None,
) -> dict[str, Any]:
    """A pass over two rows of eight tokens; without weights they are zero, as clients send them."""
    data = []
    for row in range(2):
        full = [(7 * salt + (3 + row) * n) % 60 for n in range(9)]
        given = [0.0] * 8 if weights is None else weights[8 * row : 8 * row + 8]
        inputs = {"target_tokens": _tensor(full[1:], "int64"), "weights": _tensor(given, "float32")}
        chunks = {"chunks": [{"tokens": full[:-1]}]}
        data.append({"model_input": chunks, "loss_fn_inputs": inputs})
    given = {"data": data, "loss_fn": "cross_entropy"}
    body = {"model_id": model, "seq_id": seq, "forward_backward_input": given}
    asked = front.call("forward_backward", **body, forward_only=forward_only)
    return front.result(asked["request_id"])


def _tensor(values: list[Any], dtype: str) -> dict[str, Any]:
    return {"data": values, "dtype": dtype, "shape": [len(values)]}


def _logprobs(output: dict[str, Any]) -> list[list[float]]:
    return [row["logprobs"]["data"] for row in output["loss_fn_outputs"]]


def graphs_told(front: FrontProcess) -> list[str]:
    return [event["graph"] for event in front.events("forward_backward")]


@pytest.mark.parametrize(
    ("engine", "strike", "fate"),
    [
        (EngineKind.FAKE, kill_engine, "recomputed"),
        (EngineKind.FAKE, kill_front, "freed"),  # the new front knows of no forward to reuse
        (EngineKind.TORCH, kill_engine, "recomputed"),
    ],
)
def test_a_death_between_the_two_calls_of_a_custom_loss_changes_no_bit(
    start: Callable[..., FrontProcess], tmp_path: Path, engine: EngineKind, strike: Any, fate: str
) -> None:
    more: dict[str, Any] = {"engine": engine}
    if engine is EngineKind.TORCH:
        more["model_dir"] = str(ensure_tiny(tmp_path / "tiny"))
    quiet, struck = start(**more), start(**more)
    expected = run(quiet, nothing)
    assert run(struck, strike) == expected
    assert graphs_told(quiet) == ["reused"] * CHUNKS * STEPS
    assert graphs_told(struck) == ["reused"] * (CHUNKS + 1) + [fate] + ["reused"] * CHUNKS
    assert struck.status().error is None


def test_graphs_beyond_the_budget_change_no_bit(start: Callable[..., FrontProcess]) -> None:
    held, recomputed = start(), start(held_graph_bytes=1)
    assert run(held, nothing) == run(recomputed, nothing)
    assert set(graphs_told(recomputed)) == {"recomputed"}
    graphs = msgspec.to_builtins(recomputed.status().graphs)
    assert (graphs["num_reused"], graphs["num_recomputed"]) == (0, CHUNKS * STEPS)
