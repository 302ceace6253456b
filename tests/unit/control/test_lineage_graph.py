"""One graph of an account's weights, and the three questions that it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints.promote import run_worker
from homefire.foundation.events import EventLog

LINEAGE = "/v1/accounts/local/lineage"


@pytest.fixture
async def story(bench: Any, control: Any) -> Any:
    """j1 trains tiny for two steps and is served and evaluated; j2 trains what was promoted of it, and
    branches from its state; j3 has nothing to do with it."""
    await control.create_job("j1")
    await control.create_job("j3")
    events = EventLog(bench.home.job("j1") / "events.jsonl", bench.clock)
    for step in (1, 2):
        events.append("optim_step", step=step, loss=2.0)
    events.close()
    base = bench.save_snapshot("step_1", step=1)
    delta = bench.save_snapshot("step_2", parent=base, step=2)
    bench.save_state("mark")
    await control.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    headers = {"fireworks-deployment": "accounts/local/deployments/d1"}
    await control.call(
        "POST", "/hot_load/v1/models/hot_load", {"identity": "step_2"}, headers=headers
    )
    replica = EventLog(bench.home.replica("d1", 0) / "events.jsonl", bench.clock)
    replica.append("hot_load", identity="step_2", digest=delta.digest, ok=True)
    replica.close()
    entry = {
        "name": "held-out",
        "deployment": "d1",
        "identity": "step_2",
        "digest": delta.digest,
        "scores": {"reward": 0.8},
        "job": "j1",
    }
    await control.call("POST", "/v1/accounts/local/evaluations", entry)
    bench.launcher._on_start = lambda process: work(bench, process)
    await control.call(
        "POST",
        "/v1/accounts/local/checkpoints/step_1:promote",
        {"output_model": "best", "trainer_job_id": "j1"},
    )
    await control.create_job("j2", trainingConfig={"baseModel": "accounts/local/models/best"})
    branch = EventLog(bench.home.job("j2") / "events.jsonl", bench.clock)
    branch.append("state_loaded", name="cross_job://j1/mark", step=1)
    branch.append("optim_step", step=2)
    branch.close()
    return delta


def work(bench: Any, process: Any) -> None:
    if process.spec.module != "homefire.checkpoints":
        bench.services.serve(process)
        return
    spec_file = Path(process.spec.spec_file)
    spec_file.parent.mkdir(parents=True, exist_ok=True)
    spec_file.write_bytes(process.spec.spec)
    process.exit(run_worker(spec_file))


async def ask(control: Any, **query: Any) -> tuple[set[str], set[tuple[str, str, str]]]:
    found = await control.call("GET", LINEAGE, params=query)
    edges = {(e["source"], e["kind"], e["target"]) for e in found["edges"]}
    return {node["id"] for node in found["nodes"]}, edges


async def test_everything_is_one_graph(control: Any, story: Any) -> None:
    nodes, edges = await ask(control)
    assert {
        ("model:tiny", "started", "job:j1"),
        ("job:j1", "trained", "step:j1/1"),
        ("step:j1/1", "trained", "step:j1/2"),
        ("step:j1/2", "saved", "snapshot:j1/step_2"),
        ("snapshot:j1/step_1", "parent", "snapshot:j1/step_2"),
        ("snapshot:j1/step_1", "promoted", "model:accounts/local/models/best"),
        ("model:accounts/local/models/best", "started", "job:j2"),
        ("state:j1/mark", "loaded", "step:j2/2"),
        ("model:tiny", "served", "deployment:d1"),
        ("snapshot:j1/step_2", "served", "deployment:d1"),
        ("model:tiny", "started", "job:j3"),
    } <= edges
    assert all({source, target} <= nodes for source, _, target in edges)
    assert len({node.partition(":")[0] for node in nodes}) == 8


@pytest.mark.parametrize("form", ["header", "model", "identity", "digest"])
async def test_which_weights_made_this_completion(control: Any, story: Any, form: str) -> None:
    weights = {
        "header": f"step_2; sha={story.digest[:16]}",
        "model": "accounts/local/models/tiny@step_2",
        "identity": "step_2",
        "digest": story.digest[:12],
    }[form]
    nodes, _ = await ask(control, weights=weights, direction="up")
    expected = {"model:tiny", "job:j1", "step:j1/1", "step:j1/2"}
    expected |= {"snapshot:j1/step_1", "snapshot:j1/step_2"}
    # The digest of this delta is its parent's, for it changes nothing.
    assert nodes == expected


async def test_what_was_a_step_evaluated_at(control: Any, story: Any) -> None:
    found = await control.call("GET", LINEAGE, params={"job": "j1", "step": 2, "direction": "down"})
    scores = [n["attributes"]["scores"] for n in found["nodes"] if n["kind"] == "evaluation"]
    assert scores == [{"reward": 0.8}]


@pytest.mark.parametrize("model", ["tiny", "accounts/local/models/best", "best"])
async def test_what_depends_on_this_base(control: Any, story: Any, model: str) -> None:
    nodes, _ = await ask(control, model=model, direction="down")
    jobs = {node for node in nodes if node.startswith("job:")}
    assert jobs == ({"job:j1", "job:j2", "job:j3"} if model == "tiny" else {"job:j2"})
    assert ("deployment:d1" in nodes) is (model == "tiny")


async def test_the_graph_is_drawn(control: Any, story: Any) -> None:
    response = await control.client.get(LINEAGE, params={"format": "dot", "model": "best"})
    assert response.headers["content-type"].startswith("text/vnd.graphviz")
    lines = response.text.splitlines()
    assert lines[0] == "digraph lineage {"
    assert lines[-1] == "}"
    edge = '  "model:accounts/local/models/best" -> "job:j2" [label="started"];'
    assert edge in lines


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ({"weights": "nope"}, 404, "no snapshot in the store is 'nope'"),
        ({"weights": "step_2; sha=ffff"}, 404, "no snapshot"),
        ({"job": "nope"}, 404, "no job nope"),
        ({"job": "j1", "step": 99}, 404, "no step 99"),
        ({"step": 1}, 400, "a step is of a job"),
        ({"step": "x", "job": "j1"}, 400, "step"),
        ({"model": "nope"}, 404, "no model nope"),
        ({"node": "step:9"}, 404, "no node"),
        ({"direction": "sideways"}, 400, "direction"),
        ({"format": "svg"}, 400, "use json or dot"),
    ],
)
async def test_what_is_not_there_is_said(
    control: Any, story: Any, query: Any, status: int, said: str
) -> None:
    refused = await control.call("GET", LINEAGE, params=query, expect=status)
    assert said in refused["error"]["message"]
