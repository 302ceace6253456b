"""A weight: from the optimizer to a completion that names it."""

from __future__ import annotations

import asyncio

import pytest

from homefire.checkpoints import CheckpointKey
from homefire.wire.manifest import CheckpointFamily, CheckpointKind
from journeys.loop import BATCH, Loop, start_loop


@pytest.fixture(scope="module", params=[0, 8], ids=["full", "lora"])
def loop(homefire_up, request) -> Loop:
    return start_loop(homefire_up(), lora_rank=request.param)


def score(loop: Loop, prompt: list[int]):
    """The deployment's logprobs of a prompt's own tokens, and the weights that made them."""
    sampler = loop.sampler()
    (completion,) = asyncio.run(
        sampler.sample_with_prompt_tokens(prompt, n=1, max_tokens=1, echo=True, logprobs=True)
    )
    return completion


def test_what_the_trainer_saved_is_what_the_deployment_serves(loop):
    """Several syncs; after each, trainer and sampler give the same logprobs for mixed lengths."""
    for step in range(3):
        loop.train(2)
        snapshot = loop.syncer.save_and_hotload(f"step_{step:05d}")
        trainer_rows = loop.logprobs()
        for datum, expected in zip(BATCH, trainer_rows, strict=True):
            tokens = datum.model_input.to_ints()
            completion = score(loop, tokens)
            assert completion.weights.identity == snapshot
            got = completion.inference_logprobs[: len(tokens) - 1]
            assert got == pytest.approx(expected[:-1], abs=1e-4)


def test_the_digest_in_a_completion_is_the_digest_in_the_manifest(loop):
    manifests = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)
    completion = score(loop, list(b"abc"))
    newest = manifests[-1]
    assert completion.weights.identity == newest.identity
    assert newest.digest.startswith(completion.weights.digest)
    assert len(completion.weights.digest) >= 16


def test_full_parameter_snapshots_after_the_first_are_small_deltas(loop):
    manifests = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)
    kinds = [m.kind for m in manifests]
    if loop.lora_rank:
        assert set(kinds) == {CheckpointKind.LORA}
    else:
        assert kinds == [CheckpointKind.BASE, CheckpointKind.DELTA, CheckpointKind.DELTA]
        assert all(m.size_bytes < manifests[0].size_bytes for m in manifests[1:])


def test_an_unknown_identity_is_refused_and_the_old_weights_keep_serving(loop):
    before = score(loop, list(b"abc")).weights
    with pytest.raises(Exception, match="no_such_snapshot"):
        loop.deployments.hotload(loop.deployment_id, "tiny", "no_such_snapshot")
    assert score(loop, list(b"abc")).weights == before


def test_rolling_back_and_forward_again_is_an_ordinary_load(loop):
    manifests = loop.store.list("local", loop.job.job_id, family=CheckpointFamily.SAMPLER)
    for manifest in (manifests[0], manifests[-1], manifests[1]):
        assert loop.deployments.hotload_and_wait(loop.deployment_id, "tiny", manifest.identity)
        weights = score(loop, list(b"abc")).weights
        assert weights.identity == manifest.identity
        assert manifest.digest.startswith(weights.digest)


def test_a_snapshot_name_that_exists_with_other_weights_is_refused(loop):
    loop.client.save_weights_for_sampler_ext("twice", checkpoint_type="base")
    loop.train()
    with pytest.raises(Exception, match="twice"):
        loop.client.save_weights_for_sampler_ext("twice", checkpoint_type="base")
    loop.train()


def test_a_sampler_snapshot_given_to_load_state_is_refused_by_kind(loop):
    saved = loop.client.save_weights_for_sampler_ext("not-a-state")
    with pytest.raises(Exception, match="sampler"):
        loop.client.load_state(saved.snapshot_name).result()
    loop.train()


def test_a_damaged_snapshot_is_refused_with_the_reason_and_the_old_weights_keep_serving(loop):
    before = score(loop, list(b"abc")).weights
    saved = loop.client.save_weights_for_sampler_ext("damaged", checkpoint_type="base")
    key = CheckpointKey(
        "local", loop.job.job_id, "policy", CheckpointFamily.SAMPLER, saved.snapshot_name
    )
    (weights,) = loop.store.directory(key).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)

    assert not loop.deployments.hotload_and_wait(loop.deployment_id, "tiny", saved.snapshot_name)
    (replica,) = loop.deployments.hotload_check_status(loop.deployment_id, "tiny")["replicas"]
    assert replica["loading_state"]["stage"] == "error"
    assert replica["loading_state"]["target_snapshot_identity"] == saved.snapshot_name
    assert weights.name in replica["loading_state"]["error"]
    assert replica["current_snapshot_identity"] == before.identity
    assert score(loop, list(b"abc")).weights == before
