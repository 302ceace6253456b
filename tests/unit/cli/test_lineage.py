"""`homefire lineage` against a scripted control plane."""

from __future__ import annotations

GRAPH = {
    "job": "",
    "nodes": [
        {"id": "model:tiny", "kind": "model"},
        {"id": "job:j1", "kind": "job"},
        {"id": "step:j1/1", "kind": "step", "attributes": {"loss": 2.0}},
        {"id": "step:j1/2", "kind": "step", "attributes": {"loss": 1.5}},
        {
            "id": "snapshot:j1/s2",
            "kind": "snapshot",
            "attributes": {"kind": "delta", "digest": "0123456789abcdef"},
        },
        {
            "id": "evaluation:e1",
            "kind": "evaluation",
            "attributes": {"name": "held-out", "identity": "s2", "scores": {"reward": 0.75}},
        },
    ],
    "edges": [
        {"source": "model:tiny", "target": "job:j1", "kind": "started"},
        {"source": "job:j1", "target": "step:j1/1", "kind": "trained"},
        {"source": "step:j1/1", "target": "step:j1/2", "kind": "trained"},
        {"source": "step:j1/2", "target": "snapshot:j1/s2", "kind": "saved"},
        {"source": "snapshot:j1/s2", "target": "evaluation:e1", "kind": "evaluated"},
    ],
}


def test_the_lineage_is_shown_as_a_tree(homefire, control):
    control.answers["GET /v1/accounts/local/lineage"] = GRAPH
    outcome = homefire("lineage", "--job", "accounts/local/rlorTrainerJobs/j1", "--step", "2")
    assert outcome.out.splitlines() == [
        "model tiny",
        "  job j1",
        "    step j1/1: loss 2",
        "    step j1/2: loss 1.5",
        "      snapshot j1/s2: delta, 0123456789ab",
        "        evaluation e1: held-out, of s2, reward 0.75",
    ]
    assert "job=j1" in control.seen[-1]
    assert "step=2" in control.seen[-1]


def test_the_graph_itself_is_printed_as_json_or_dot(homefire, control):
    control.answers["GET /v1/accounts/local/lineage"] = lambda query: (
        b"digraph lineage {\n}\n" if query.get("format") == "dot" else GRAPH
    )
    assert homefire("lineage", "--json").json == GRAPH
    assert homefire("lineage", "--dot", "--up").out == "digraph lineage {\n}\n"


def test_one_start_at_a_time(homefire, control):
    assert homefire("lineage", "--job", "j", "--model", "m").status == 2
