"""The weights' journey through a bucket: trainer, control and replica share nothing but its URL."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from homefire.checkpoints.s3_server import S3Server
from journeys.loop import start_loop


@pytest.fixture
def server():
    with S3Server() as server:
        yield server


def test_a_base_and_a_delta_go_through_a_bucket_to_the_replica(homefire_up, server, tmp_path):
    cache = tmp_path / "cache"
    environment = {**server.environment(), "HOMEFIRE_STORE_CACHE": str(cache)}
    up = homefire_up(engine="fake", arguments=["--store", "s3://bucket/runs"], env=environment)
    loop = start_loop(up)
    loop.train(1)
    loop.syncer.save_and_hotload("one")
    loop.train(1)
    saved = loop.client.save_weights_for_sampler_ext("two", checkpoint_type="delta")
    for files in cache.glob("boot-*/*"):
        shutil.rmtree(files)  # what the trainer wrote is on another machine, as it were
    loop.deployments.hotload_and_wait(loop.deployment_id, loop.base_model, saved.snapshot_name)

    (completion,) = asyncio.run(
        loop.sampler().sample_with_prompt_tokens(
            list(b"sorted"), max_tokens=2, expect_identity=saved.snapshot_name
        )
    )
    rows = loop.jobs.list_checkpoints(loop.job.job_id)
    assert [row["checkpointType"].rpartition("INFERENCE_")[2] for row in rows] == ["BASE", "ARC_V2"]
    assert completion.weights.digest == rows[-1]["digest"]
    assert list((up.home / "store").iterdir()) == []
    assert any("range" in asked.headers for asked in server.asked)
    assert {name.split("/")[1] for name in server.objects} == {"runs"}
