"""No answer mixes weights that it does not name, however often they change under load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from homefire.checkpoints import read_model_directory
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.wire.specs import EngineKind, ReplicaSpec
from unit.inference.canaries import Snapshots
from unit.inference.canary_run import CanaryRun, Seen
from unit.inference.torch_canaries import TorchSnapshots

SOAK = [pytest.mark.soak, pytest.mark.long]


def chain(snapshots: Any, count: int) -> list[str]:
    """Deltas on a base; every tenth is a base again."""
    return [
        snapshots.base(k) if k % 10 == 1 else snapshots.delta(k, parent=k - 1)
        for k in range(1, count + 1)
    ]


async def run(
    start_replica: Any,
    snapshots: Any,
    transition: str,
    completions: int,
    loads: int,
    *,
    concurrency: int = 64,
    **options: Any,
) -> Seen:
    identities = chain(snapshots, loads + 1)
    async with start_replica(**options) as caller:
        await caller.hot_load(identities[0])
        return await CanaryRun(caller, identities, transition, completions, concurrency).run()


def open_torch(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
    return open_engine(msgspec.structs.replace(spec, engine=EngineKind.TORCH), publish)


@pytest.fixture
def torch_snapshots(snapshots: Snapshots, tiny_directory: Path) -> TorchSnapshots:
    return TorchSnapshots(snapshots, read_model_directory(tiny_directory))


SIZES = [
    pytest.param(2_000, 20, id="2,000 through 20"),
    pytest.param(20_000, 200, id="20,000 through 200", marks=SOAK),
]


@pytest.mark.parametrize(("completions", "loads"), SIZES)
async def test_a_drain_mixes_and_aborts_none(
    start_replica: Any, snapshots: Snapshots, completions: int, loads: int
) -> None:
    seen = await run(start_replica, snapshots, "DRAIN", completions, loads)
    assert seen.num_completions == completions
    assert (seen.num_mixed, seen.num_aborted, seen.num_mislabelled, seen.num_refused) == (0,) * 4
    assert len(seen.by_identity) == loads + 1


@pytest.mark.parametrize(("completions", "loads"), SIZES)
async def test_an_async_load_aborts_none_and_labels_every_token(
    start_replica: Any, snapshots: Snapshots, completions: int, loads: int
) -> None:
    seen = await run(start_replica, snapshots, "ASYNC", completions, loads)
    assert seen.num_completions == completions
    assert (seen.num_aborted, seen.num_mislabelled, seen.num_refused) == (0,) * 3
    assert len(seen.by_identity) == loads + 1
    assert seen.num_mixed > loads


@pytest.mark.parametrize(
    ("completions", "loads"),
    [(300, 5), pytest.param(20_000, 200, marks=SOAK)],
)
async def test_a_sync_load_refuses_meanwhile_and_mixes_none(
    start_replica: Any, snapshots: Snapshots, completions: int, loads: int
) -> None:
    seen = await run(start_replica, snapshots, "SYNC", completions, loads, concurrency=16)
    assert seen.num_completions == completions
    assert (seen.num_mixed, seen.num_aborted, seen.num_mislabelled) == (0,) * 3
    assert seen.num_refused > 0


@pytest.mark.parametrize("transition", ["DRAIN", "ASYNC"])
async def test_the_torch_engine_does_the_same(
    start_replica: Any, torch_snapshots: TorchSnapshots, transition: str
) -> None:
    options = {"engine": open_torch, "max_context_length": 128}
    seen = await run(start_replica, torch_snapshots, transition, 400, 8, **options)
    assert (seen.num_aborted, seen.num_mislabelled, seen.num_refused) == (0,) * 3
    assert (seen.num_mixed > 0) == (transition == "ASYNC")
    assert len(seen.by_identity) == 9


def open_unlabelled(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
    """Goes on in place without telling anybody."""
    engine: Any = open_engine(spec, publish)
    engine._scheduler._carry_over = lambda: None
    return engine


def open_impatient(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
    """Does not drain."""
    engine: Any = open_engine(spec, publish)
    swap = engine.swap_weights
    engine.swap_weights = lambda weights, **options: swap(
        weights, **{**options, "drain_timeout_s": 0.0}
    )
    return engine


@pytest.mark.parametrize(
    ("planted", "transition", "shows"),
    [
        (open_unlabelled, "ASYNC", "num_mislabelled"),
        (open_impatient, "DRAIN", "num_mixed"),
    ],
)
async def test_a_planted_mistake_is_seen(
    start_replica: Any, snapshots: Snapshots, planted: Any, transition: str, shows: str
) -> None:
    seen = await run(start_replica, snapshots, transition, 300, 5, engine=planted)
    assert getattr(seen, shows) > 0
