"""A job done again from its journal: what is equal, what is not, and where it begins."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey
from homefire.foundation.clock import ManualClock
from homefire.trainer.engine import bigram_weights
from homefire.trainer.front.replay import Replay
from homefire.wire.errors import FailedPrecondition, StateReplaced


@pytest.fixture
def run_job(start_front):
    """Seven steps, a snapshot, a state and a gradient left over; some recovery points; a clean stop."""

    async def run(**spec) -> str:
        clock = ManualClock()
        async with start_front(clock=clock, recovery_interval_s=60.0, **spec) as client:
            model = await client.model()
            for first_seq in (1, 5, 9):
                await client.train(model, first_seq, 2)
                clock.advance(1000)
            await client.call("save_weights_for_sampler", model, 13, path="a")
            await client.call("save_weights", model, 14, path="s")
            await client.result(await client.forward_backward(model, 15))
            clock.advance(24 * 3600)  # results are forgotten, and the journal behind them
            await client.result(await client.optim_step(model, 16))
            await client.forward_backward(model, 17)
            await client.result(await client.forward_backward(model, 18))
            return await client.digest()

    return run


@pytest.fixture
def replay_of(make_spec, make_engine, tmp_path):
    def make(**spec) -> Replay:
        workspace = tmp_path / "workspace"
        workspace.mkdir()
        return Replay(make_spec(**spec), workspace, make_engine, ManualClock())

    return make


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total


async def test_a_job_whose_journal_was_kept_ends_the_same_from_its_base_model(run_job, replay_of):
    digest = await run_job(keep_journal=True)
    verified = await replay_of(keep_journal=True).verify(no_progress)
    assert verified.ok, (verified.differences, verified.replayed.divergences)
    assert verified.replayed.start is None
    assert verified.replayed.num_replayed == 18, "all but the state"
    assert verified.recovered_from is not None
    (end,) = verified.replayed.slots.values()
    assert (end.step, end.digest) == (7, digest)


async def test_a_trimmed_journal_is_replayed_from_the_oldest_point(run_job, replay_of, make_spec):
    digest = await run_job()
    verified = await replay_of().verify(no_progress)
    assert verified.ok
    points = sorted(path.name for path in (Path(make_spec().job_dir) / "recovery").iterdir())
    assert len(points) == 2
    assert verified.replayed.start == points[0]
    assert verified.recovered_from == points[1]
    assert verified.replayed.num_replayed > 0
    assert verified.replayed.slots["policy"].digest == digest


async def test_an_optimizer_that_steps_otherwise_is_found_out(run_job, replay_of, monkeypatch):
    """The planted bug: weights move a little further than they did the first time."""
    await run_job(keep_journal=True)
    step = bigram_weights.Moments.step

    def further(self, masters, gradient, adam, scale):
        faster = msgspec.structs.replace(adam, learning_rate=1.5 * adam.learning_rate)
        return step(self, masters, gradient, faster, scale)

    monkeypatch.setattr(bigram_weights.Moments, "step", further)
    verified = await replay_of(keep_journal=True).verify(no_progress)
    assert not verified.ok
    assert any("forward_backward 3" in text for text in verified.replayed.divergences)
    assert "policy.masters.safetensors differs" in verified.differences


async def test_the_job_itself_is_not_touched(run_job, replay_of, make_spec):
    await run_job()
    job = Path(make_spec().job_dir)

    def files() -> dict[str, bytes]:
        return {str(p.relative_to(job)): p.read_bytes() for p in job.rglob("*") if p.is_file()}

    before = files()
    await replay_of().verify(no_progress)
    assert files() == before


async def test_a_job_that_did_nothing_has_nothing_to_replay(start_front, replay_of):
    async with start_front():
        pass
    with pytest.raises(FailedPrecondition, match="has completed no operation"):
        await replay_of().run(no_progress)


@pytest.mark.parametrize("then", ["overwritten", "deleted"])
async def test_a_state_that_was_loaded_and_replaced_ends_the_replay_by_name(
    start_front, replay_of, then
):
    """Not a divergence: nothing was computed otherwise, the replay was given something else to load."""
    async with start_front(keep_journal=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        await client.call("save_weights", model, 3, path="s")
        await client.train(model, 4, 1)
        await client.call("load_weights", model, 6, path="s", optimizer=True)
        await client.train(model, 7, 2)
        if then == "overwritten":
            await client.call("save_weights", model, 11, path="s", overwrite=True)
        else:
            key = CheckpointKey("local", "job-1", "policy", CheckpointFamily.STATE, "s")
            client.front.store.delete(key)
    with pytest.raises(StateReplaced, match="the load of state 's', which"):
        await replay_of(keep_journal=True).run(no_progress)


async def test_a_state_that_is_still_there_is_loaded_again(start_front, replay_of):
    async with start_front(keep_journal=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        await client.call("save_weights", model, 3, path="s")
        await client.train(model, 4, 1)
        loaded = await client.call("load_weights", model, 6, path="s", optimizer=True)
        await client.train(model, 7, 2)
    assert loaded["state_digest"] != loaded["digest"], "of the files, optimizer included"
    replayed = await replay_of(keep_journal=True).run(no_progress)
    assert replayed.divergences == []
