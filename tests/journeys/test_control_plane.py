"""What the control plane offers beside the loop: promotion, records, capacity, clear refusals."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from homefire.sdk import (
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FireworksClient,
    TrainerJobConfig,
    TrainerJobManager,
)
from homefire.sdk.evaluations import request_options
from homefire.wire.manifest import CheckpointFamily
from journeys.loop import BATCH, Loop, start_loop


@pytest.fixture(scope="module")
def loop(homefire_up) -> Loop:
    loop = start_loop(homefire_up())
    for step in range(2):
        loop.train(2)
        loop.syncer.save_and_hotload(f"step_{step:05d}")
    return loop


def get(server, path: str) -> httpx.Response:
    return httpx.get(server.url + path, headers={"X-Api-Key": server.api_key}, timeout=60)


def test_a_delta_is_promoted_to_a_model_that_transformers_loads_and_a_deployment_serves(loop):
    client = FireworksClient(api_key=loop.server.api_key, base_url=loop.server.url)
    rows = client.list_checkpoints(loop.job.job_id)
    assert [row["checkpointType"] for row in rows] == [
        "CHECKPOINT_TYPE_INFERENCE_BASE",
        "CHECKPOINT_TYPE_INFERENCE_ARC_V2",
    ]
    model = client.promote_checkpoint(name=rows[-1]["name"], output_model_id="sorted-digits")
    assert model["name"] == "accounts/local/models/sorted-digits"
    assert model["state"] == "READY"

    directory = loop.server.home / "models" / "local" / "sorted-digits"
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).float()
    tokens = torch.tensor([BATCH[0].model_input.to_ints()])
    targets = torch.tensor(BATCH[0].loss_fn_inputs["target_tokens"].data)
    expected = reference(tokens).logits[0].log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(loop.logprobs()[0]), expected, atol=1e-4, rtol=0)

    loop.deployments.create_or_get(DeploymentConfig("promoted", model["name"]))
    loop.deployments.wait_for_ready("promoted")
    sampler = DeploymentSampler(
        loop.server.url, "accounts/local/deployments/promoted", loop.server.api_key
    )
    prompt = tokens[0].tolist()
    (completion,) = asyncio.run(
        sampler.sample_with_prompt_tokens(prompt, max_tokens=1, echo=True, logprobs=True)
    )
    got = completion.inference_logprobs[: len(prompt) - 1]
    assert got == pytest.approx(expected[:-1].tolist(), abs=1e-4)
    loop.deployments.delete("promoted")


def test_the_record_and_the_lineage_tell_the_whole_run(loop):
    loop.jobs.log_metrics(loop.job.job_id, 4, {"reward": 0.5})
    client = FireworksClient(api_key=loop.server.api_key, base_url=loop.server.url)
    manifests = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)
    client.record_evaluation(
        "held-out",
        deployment=loop.deployment_id,
        identity=manifests[-1].identity,
        digest=manifests[-1].digest,
        step=4,
        scores={"reward": 0.5},
        job=loop.job.job_id,
    )
    rows = loop.jobs.get_metrics(loop.job.job_id)
    assert [row["step"] for row in rows if row["event"] == "optim_step"] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 for row in rows if row["event"] == "forward_backward")
    assert [row["metrics"] for row in rows if row["event"] == "client"] == [{"reward": 0.5}]

    lineage = loop.jobs.get_lineage(loop.job.job_id)
    kinds = [node["kind"] for node in lineage["nodes"]]
    for kind in ("model", "step", "snapshot", "hot_load", "evaluation"):
        assert kind in kinds
    nodes = {node["id"] for node in lineage["nodes"]}
    edges = {(e["kind"], e["source"], e["target"]) for e in lineage["edges"]}
    assert all({source, target} <= nodes for _, source, target in edges)
    assert {"trained", "saved", "parent", "loaded", "evaluated"} <= {kind for kind, _, _ in edges}


def test_status_shows_the_live_step_and_what_each_replica_serves(loop):
    status = json.loads(loop.server.cli("status", "--json").stdout)
    (job,) = [j for j in status["jobs"] if j["name"].endswith(loop.job.job_id)]
    assert (job["state"], job["step"]) == ("JOB_STATE_RUNNING", 4)
    (deployment,) = [d for d in status["deployments"] if d["name"].endswith("/serving")]
    (replica,) = deployment["replicas"]
    newest = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)[-1]
    assert replica["identity"] == newest.identity
    assert newest.digest.startswith(replica["digest"])


def test_a_deleted_job_leaves_a_tombstone_whose_checkpoints_can_still_be_listed(loop):
    job = loop.jobs.create_and_wait(TrainerJobConfig(base_model="tiny", display_name="short"))
    loop.jobs.delete(job.job_id)
    states = iter(lambda: loop.jobs.get(job.job_id)["state"], "JOB_STATE_DELETED")
    assert set(states) <= {"JOB_STATE_DELETING"}
    rows = FireworksClient(api_key=loop.server.api_key, base_url=loop.server.url)
    assert rows.list_checkpoints(job.job_id) == []
    listed = get(loop.server, "/v1/accounts/local/rlorTrainerJobs").json()["rlorTrainerJobs"]
    assert job.job_name not in [row["name"] for row in listed]


def test_a_cancelled_job_is_resumed_by_reconnecting(loop):
    before = loop.logprobs()
    path = f"{loop.server.url}/v1/accounts/local/rlorTrainerJobs/{loop.job.job_id}:cancel"
    headers = {"X-Api-Key": loop.server.api_key}
    assert httpx.post(path, headers=headers, timeout=60).status_code == 200
    loop.connect()
    assert loop.logprobs() == before
    loop.train()
    assert loop.events("optim_step")[-1]["step"] == 5


def test_a_deleted_snapshot_is_nobodys_parent(loop):
    """The trainer's next delta would have built on it; what it writes instead must still load."""
    gone = loop.client.save_weights_for_sampler_ext("short-lived", checkpoint_type="delta")
    words = ("checkpoint", "delete", gone.snapshot_name, "--job", loop.job.job_id, "--yes")
    assert "deleted" in loop.server.cli(*words).stdout
    loop.train()
    saved = loop.client.save_weights_for_sampler_ext("next", checkpoint_type="delta")
    assert loop.deployments.hotload_and_wait(loop.deployment_id, "tiny", saved.snapshot_name)
    newest = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)[-1]
    assert newest.identity == saved.snapshot_name
    assert newest.parent != gone.snapshot_name


BAD_REQUESTS = {
    "an unknown base model": (
        lambda jobs, deployments: jobs.create(TrainerJobConfig(base_model="no-such-model")),
        r"no-such-model(.|\n)*tiny",
    ),
    "a hosted model without an alias": (
        lambda jobs, deployments: jobs.create(
            TrainerJobConfig(base_model="accounts/fireworks/models/qwen3-8b")
        ),
        "--alias",
    ),
    "a repository that is not in the local cache": (
        lambda jobs, deployments: jobs.create(TrainerJobConfig(base_model="Nobody/Nothing-7B")),
        "Nobody/Nothing-7B",
    ),
    "a directory outside every model root": (
        lambda jobs, deployments: jobs.create(TrainerJobConfig(base_model="/etc")),
        "model root",
    ),
    "a deployment of a job that does not exist": (
        lambda jobs, deployments: deployments.create_or_get(
            DeploymentConfig(
                "d", "tiny", hot_load_trainer_job="accounts/local/rlorTrainerJobs/job-none"
            )
        ),
        "job-none",
    ),
    "an unknown shape": (
        lambda jobs, deployments: jobs.resolve_training_profile(
            "accounts/local/trainingShapes/no-such-shape"
        ),
        "no-such-shape",
    ),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_refused_at_once_naming_what_and_what_to_do(loop, case):
    act, said = BAD_REQUESTS[case]
    jobs = TrainerJobManager(api_key=loop.server.api_key, base_url=loop.server.url)
    deployments = DeploymentManager(api_key=loop.server.api_key, base_url=loop.server.url)
    with pytest.raises((httpx.HTTPStatusError, RuntimeError, ValueError), match=said):
        act(jobs, deployments)


def test_the_hosted_serverless_pool_is_refused_by_name(loop):
    answer = httpx.post(
        f"{loop.server.url}/training/v1/serverless/api/v1/create_session",
        headers={"X-Api-Key": loop.server.api_key},
        json={},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported"
    assert answer.json()["error"]["category"] == "user"


def test_what_does_not_fit_waits_with_its_reason_and_starts_when_there_is_room(loop):
    capacity = json.loads(loop.server.cli("status", "--json").stdout)["capacity"]
    free = capacity["threadsTotal"] - capacity["threadsUsed"]
    jobs = [loop.jobs.create(TrainerJobConfig(base_model="tiny")) for _ in range(free + 1)]
    waiting = loop.jobs.get(jobs[-1].job_id)
    assert waiting["state"] == "JOB_STATE_PENDING"
    assert "thread" in waiting["status"]["message"]
    loop.jobs.delete(jobs[0].job_id)
    loop.jobs.wait_for_ready(jobs[-1].job_id, timeout_s=120)
    for job in jobs[1:]:
        loop.jobs.delete(job.job_id)


PROMPTS = [list(b"sorted: 1"), list(b"homefire "), list(b"a longer")]
SEEDED = {"temperature": 1.0, "max_tokens": 6, "seed": "index of the prompt"}


def sampled(loop: Loop, sampling) -> list:
    sampler = DeploymentSampler(
        loop.server.url, f"accounts/local/deployments/{loop.deployment_id}", loop.server.api_key
    )

    async def together():
        return [
            (await sampler.sample_with_prompt_tokens(prompt, **request_options(sampling, index=i)))[
                0
            ]
            for i, prompt in enumerate(PROMPTS)
        ]

    return asyncio.run(together())


def recorded(loop: Loop, completions, *, sampling, **fields) -> str:
    newest = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)[-1]
    client = FireworksClient(api_key=loop.server.api_key, base_url=loop.server.url)
    record = client.record_evaluation(
        "rerun",
        identity=newest.identity,
        digest=newest.digest,
        scores={"length": 6.0},
        job=loop.job.job_id,
        sampling=sampling,
        completions=completions,
        **{"deployment": loop.deployment_id, **fields},
    )
    return record["id"]


def test_an_evaluation_is_run_again_where_its_weights_are_served_and_where_they_are_not(loop):
    completions = sampled(loop, SEEDED)
    served = recorded(loop, completions, sampling=SEEDED)
    said = json.loads(loop.server.cli("eval", "rerun", served, "--json").stdout)
    assert (said["reproduced"], said["same_completions"]) == (True, True)

    elsewhere = recorded(loop, completions, sampling=SEEDED, deployment="")
    said = json.loads(loop.server.cli("eval", "rerun", elsewhere, "--json").stdout)
    assert said["reproduced"] is True
    assert loop.deployments.get(f"rerun-{elsewhere.rpartition('-')[2]}") is None

    other = recorded(loop, completions[::-1], sampling=SEEDED)
    failed = loop.server.cli("eval", "rerun", other, check=False)
    assert failed.returncode == 1
    assert "NOT reproduced" in failed.stdout


def test_an_evaluation_that_cannot_be_run_again_says_why(loop):
    completions = sampled(loop, SEEDED)
    unseeded = recorded(loop, completions, sampling={"temperature": 1.0, "max_tokens": 6})
    without = recorded(loop, None, sampling=SEEDED)
    for name, reason in (
        (unseeded, "without a seed"),
        (without, "recorded without its prompts"),
        ("evaluation-none", "does not exist"),
    ):
        refused = loop.server.cli("eval", "rerun", name, check=False)
        assert refused.returncode == 1
        assert reason in refused.stderr
