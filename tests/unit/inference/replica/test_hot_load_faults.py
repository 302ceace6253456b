"""Twelve ways in which a hot load can go wrong without an error of its own, at a step that changes much and
one that changes almost nothing: each is found before a token is drawn from weights that are not named.

docs/faults.md says what finds which.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from homefire.checkpoints import DirectoryStore
from homefire.foundation.clock import SystemClock
from homefire.inference.engine import embedded
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.prefix_cache import PrefixCache
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.inference.engine.weight_swaps import WeightSwaps
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import SlotKind
from homefire.wire.internal import CanaryVerdict, HotLoadStage, ReplicaStatus
from homefire.wire.specs import EngineKind, ReplicaSpec
from unit.inference import hot_load_faults as faults
from unit.inference.caller import Caller
from unit.inference.hot_load_faults import Place, Witness
from unit.trainer.engine.conftest import Trainer, random_batch

JOBS = {"full": (SlotKind.FULL, 0), "other": (SlotKind.FULL, 50), "lora": (SlotKind.LORA, 0)}
PROMPT = list(range(40))


@pytest.fixture(scope="module", params=[1e-3, 1e-6], ids=["1e-3", "1e-6"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path
) -> Path:
    """A store of three jobs with the snapshots s0 and s1, one step apart."""
    root = tmp_path_factory.mktemp("trained")
    for job, (kind, seed) in JOBS.items():
        trainer = Trainer(root, tiny_directory, torch_engine, job).open(kind)
        for number in range(2):
            trainer.backward(random_batch(seed + number))
            trainer.step(learning_rate=request.param)
            trainer.save(f"s{number}", "delta" if number else "base")
    return root / "store"


class Live:
    """A torch replica that serves s0 of a job under a witness, while clients ask."""

    def __init__(self, caller: Caller, place: Place, witness: Witness, job: str) -> None:
        self.caller = caller
        self.place = place
        self.witness = witness
        self.job = job

    async def load(self, identity: str, *, job: str = "", digest: str = "") -> ReplicaStatus:
        """While others ask; what is cached of prompts is kept."""
        over = asyncio.Event()
        clients = [asyncio.create_task(self._ask_until(over)) for _ in range(2)]
        body = {
            "identity": identity,
            "location": {"account": "local", "job": job or self.job},
            "digest": digest,
            "reset_prompt_cache": False,
        }
        assert (await self.caller.post("/internal/hot_load", body)).status == 202
        done = {HotLoadStage.IDLE, HotLoadStage.ERROR}
        status = await self.caller.wait(lambda status: status.stage in done)
        over.set()
        await asyncio.gather(*clients)
        return status

    async def ask(self) -> dict[str, Any]:
        answered = await self.caller.complete(prompt=PROMPT, max_tokens=3, ignore_eos=True, seed=1)
        return answered.json()

    async def _ask_until(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await self.ask()


GoLive = Callable[[str], Any]


@pytest.fixture
def go_live(
    start_replica: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> GoLive:
    store = DirectoryStore(shutil.copytree(trained, tmp_path / "copied"), SystemClock())

    @asynccontextmanager
    async def live(job: str) -> AsyncIterator[Live]:
        engines: list[Any] = []

        def open_torch(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
            torch = msgspec.structs.replace(spec, engine=EngineKind.TORCH)
            engines.append(open_engine(torch, publish))
            return engines[0]

        options = {"max_context_length": 128, "store_root": str(store.root)}
        async with start_replica(engine=open_torch, **options) as caller:
            place = Place(store, engines[0], monkeypatch)
            manifests = {m.identity: m for m in store.list("local", job)}
            witness = Witness(engines[0], engines[0].serving().digest, manifests)
            witness.watch()
            found = Live(caller, place, witness, job)
            assert (await found.load("s0")).ledger[-1].ok
            yield found
            assert witness.num_draws > 0

    return live


def tries(status: ReplicaStatus) -> list[tuple[bool, str]]:
    """Of s1: whether each worked, else why not."""
    return [(entry.ok, entry.error_code) for entry in status.ledger[1:]]


@pytest.mark.parametrize(
    ("fault", "job"),
    [
        (faults.skipped_apply, "full"),
        (faults.stale_tied_head, "full"),
        (faults.stale_adapter, "lora"),
        (faults.dropped_lora_scale, "lora"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_is_wrong_in_memory_is_seen_there_and_healed_from_the_store(
    go_live: GoLive, fault: Callable[[Place], None], job: str
) -> None:
    async with go_live(job) as live:
        fault(live.place)
        status = await live.load("s1")
        await live.ask()
    assert tries(status) == [(False, "digest_mismatch"), (True, "")]
    assert (status.identity, status.stage) == ("s1", HotLoadStage.IDLE)
    assert live.witness.wrong == []


@pytest.mark.parametrize(
    "fault", [faults.wrong_base, faults.double_apply], ids=lambda fault: fault.__name__
)
async def test_a_delta_that_does_not_give_what_it_says_is_read_again_from_its_base(
    go_live: GoLive, caplog: pytest.LogCaptureFixture, fault: Callable[[Place], None]
) -> None:
    async with go_live("full") as live:
        fault(live.place)
        status = await live.load("s1")
        await live.ask()
    assert tries(status) == [(True, "")]
    assert "from the store alone" in caplog.text
    assert live.witness.wrong == []


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (faults.torn_file, "digest_mismatch"),
        (faults.truncated_delta, "digest_mismatch"),
        (faults.wrong_dtype, "invalid_argument"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_what_is_wrong_in_the_store_leaves_the_old_weights_serving(
    go_live: GoLive, fault: Callable[[Place], None], code: str
) -> None:
    async with go_live("full") as live:
        fault(live.place)
        status = await live.load("s1")
        answer = await live.ask()
    assert tries(status) == [(False, code)]
    assert (status.ready, status.identity, status.error_code) == (True, "s0", code)
    assert answer["homefire"]["weights"]["identity"] == "s0"
    assert live.witness.wrong == []


async def test_a_load_that_was_meant_for_another_replica_is_refused(go_live: GoLive) -> None:
    """Its job has a snapshot of the same name, and the signal says the digest of the one it means."""
    async with go_live("full") as live:
        meant = live.witness.manifests["s1"].digest
        status = await live.load("s1", job="other", digest=meant)
        await live.ask()
    assert tries(status) == [(False, "digest_mismatch")]
    assert status.identity == "s0"
    assert live.witness.wrong == []


async def test_a_prompt_that_was_cached_under_other_weights_is_not_used(go_live: GoLive) -> None:
    async with go_live("full") as live:
        await live.ask()
        faults.cache_reuse(live.place)
        status = await live.load("s1")
        answer = await live.ask()
    assert tries(status) == [(True, "")]
    assert answer["homefire"]["weights"]["identity"] == "s1"
    assert live.witness.wrong == []


async def test_a_load_whose_acknowledgement_was_lost_is_done_again(go_live: GoLive) -> None:
    """The old entry in the ledger is a failure, the status says what serves, and so does every answer."""
    async with go_live("full") as live:
        faults.lost_acknowledgement(live.place)
        unheard = await live.load("s1")
        assert (tries(unheard), unheard.identity) == ([(False, "unavailable")], "s1")
        assert unheard.canary is CanaryVerdict.ABSENT
        assert (await live.ask())["homefire"]["weights"]["identity"] == "s1"
        again = await live.load("s1")
    assert tries(again) == [(False, "unavailable"), (True, "")]
    assert live.witness.wrong == []


async def test_right_loads_pass_and_the_canary_tells_large_steps_apart(
    go_live: GoLive, request: pytest.FixtureRequest
) -> None:
    large = "1e-3" in request.node.name
    for job in ("full", "lora"):
        async with go_live(job) as live:
            status = await live.load("s1")
        assert tries(status) == [(True, "")]
        expected = CanaryVerdict.PASS if large else CanaryVerdict.INCONCLUSIVE
        assert status.canary is expected
        assert live.witness.wrong == []


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes away what looks."""
    monkeypatch.setattr(
        WeightSwaps,
        "_put_in_place",
        lambda self, swap: [self._network.install(swap.weights), CanaryVerdict.ABSENT][1],
    )
    monkeypatch.setattr(embedded._Head, "verify", lambda self: None)
    monkeypatch.setattr(embedded, "_adapter_digest", lambda adapter, weights: "")
    monkeypatch.setattr(PrefixCache, "_check_version", lambda self, block, digest: None)


@pytest.mark.parametrize(
    ("fault", "job"),
    [
        (faults.skipped_apply, "full"),
        (faults.stale_tied_head, "full"),
        (faults.cache_reuse, "full"),
        (faults.stale_adapter, "lora"),
        (faults.dropped_lora_scale, "lora"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_the_witness_sees_each_of_them_where_nothing_looks(
    go_live: GoLive,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Place], None],
    job: str,
) -> None:
    blind(monkeypatch)
    async with go_live(job) as live:
        await live.ask()
        fault(live.place)
        await live.load("s1")
        await live.ask()
    assert live.witness.wrong


@pytest.mark.parametrize("fault", [faults.skipped_apply, faults.stale_tied_head])
async def test_after_a_large_step_the_canary_alone_finds_it(
    go_live: GoLive,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    fault: Callable[[Place], None],
) -> None:
    """As for an engine whose memory cannot be read. After a tiny step it cannot, and says inconclusive."""
    monkeypatch.setattr(embedded._Head, "verify", lambda self: None)
    async with go_live("full") as live:
        install = live.place.network.install
        live.place.network.install = lambda weights: [install(weights), weights.served.digest][1]
        fault(live.place)
        status = await live.load("s1")
    if "1e-3" in request.node.name:
        assert tries(status)[0] == (False, "canary_mismatch")
        assert live.witness.wrong == []
    else:
        assert status.canary is CanaryVerdict.INCONCLUSIVE
