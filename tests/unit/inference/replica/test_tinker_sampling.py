"""asample and its futures, of a sampler with the fake engine."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest

from homefire.foundation.clock import ManualClock
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import ServedWeights
from homefire.inference.replica import tinker_futures, tinker_routes
from homefire.inference.replica.session_weights import SessionWeights
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.wire import tinker_sampling_pb2 as pb
from homefire.wire.ids import Identity
from homefire.wire.manifest import whole_digest
from homefire.wire.pooled import service_of
from unit.inference.canaries import Snapshots
from unit.inference.tinker_caller import (
    SAMPLER,
    asample,
    retrieve,
    sample_body,
    sampled,
    session,
)

RUN = "ts-1:train:0"
PROTO = "application/x-protobuf"


def tokens_of(result: Any, index: int = 0) -> list[int]:
    return result["sequences"][index]["tokens"]


async def test_a_base_session_samples_the_base_model_and_names_it(start_replica: Any) -> None:
    async with start_replica(**SAMPLER) as caller:
        request_id = await asample(caller, [1, 2])
        answered = await retrieve(caller, request_id)
        digest = (await caller.status()).digest
    result = answered.json()
    assert service_of(request_id) == "job-1-sampler"
    assert len(request_id.partition(".")[2]) == 16
    assert result["type"] == "sample"
    assert len(tokens_of(result)) == 4
    assert result["sequences"][0]["stop_reason"] == "length"
    assert len(result["sequences"][0]["logprobs"]) == 4
    assert answered.headers["x-homefire-weights"] == f"base; sha={digest}"
    assert result["homefire"]["weights"] == {
        "identity": "base",
        "digest": digest,
        "model_path": None,
    }


async def test_sessions_of_the_base_and_two_adapters_answer_together_each_its_own(
    start_replica: Any, snapshots: Snapshots
) -> None:
    manifests = {t: snapshots.adapter(t, run=f"ts-{t}:train:0", name="step_1") for t in (11, 22)}
    async with start_replica(**SAMPLER) as caller:
        base = tokens_of(await sampled(caller, [1, 2], params={"max_tokens": 8}))
        waiting = [
            sampled(
                caller,
                [1, 2],
                params={"max_tokens": 8},
                sampling_session_id=session(run=f"ts-{t}:train:0", name="step_1")
                if t
                else session(),
                seq_id=i,
            )
            for i, t in enumerate([0, 11, 22] * 4)
        ]
        results = await asyncio.gather(*waiting)
        ledger = (await caller.status()).ledger
    for token, result in zip([0, 11, 22] * 4, results, strict=True):
        assert tokens_of(result) == ([token] * 8 if token else base)
        weights = result["homefire"]["weights"]
        if token:
            assert weights["digest"] == manifests[token].digest
            assert weights["model_path"] == f"tinker://ts-{token}:train:0/sampler_weights/step_1"
    assert ledger == []


async def test_two_full_snapshots_interleaved_each_answer_with_their_own_in_few_swaps(
    start_replica: Any, snapshots: Snapshots
) -> None:
    for token in (3, 4):
        snapshots.full(token, run=RUN, name=f"step_{token}")
    async with start_replica(**SAMPLER) as caller:
        waiting = [
            sampled(
                caller,
                [1, 2],
                sampling_session_id=session(run=RUN, name=f"step_{token}"),
                num_samples=1 + i % 3,
                seq_id=i,
            )
            for i, token in enumerate([3, 4] * 20)
        ]
        results = await asyncio.gather(*waiting)
        ledger = (await caller.status()).ledger
        base = await sampled(caller, [1, 2])
    for i, (token, result) in enumerate(zip([3, 4] * 20, results, strict=True)):
        assert [tokens_of(result, n) for n in range(1 + i % 3)] == [[token] * 4] * (1 + i % 3)
        assert result["homefire"]["weights"]["identity"] == f"step_{token}"
    assert len(ledger) <= 4
    assert base["homefire"]["weights"]["identity"] == "base"


async def test_adapters_wait_for_the_base_while_a_full_snapshot_answers(
    start_replica: Any, snapshots: Snapshots
) -> None:
    snapshots.full(3, run=RUN, name="full")
    snapshots.adapter(11, run=RUN, name="lora")
    async with start_replica(**SAMPLER) as caller:
        results = await asyncio.gather(
            *(
                sampled(caller, [1], sampling_session_id=session(run=RUN, name=name), seq_id=i)
                for i, name in enumerate(["full", "lora"] * 6)
            )
        )
    assert [tokens_of(result)[0] for result in results] == [3, 11] * 6


async def test_a_snapshot_that_nobody_saved_fails_the_future_by_name(start_replica: Any) -> None:
    async with start_replica(**SAMPLER) as caller:
        failed = await sampled(
            caller, [1], sampling_session_id=session(run=RUN, name="step_404"), seq_id=0
        )
    assert failed["category"] == "user"
    assert failed["code"] == "unknown_snapshot"
    assert "step_404" in failed["error"]


async def test_an_expired_snapshot_is_unknown_to_a_new_session(
    start_replica: Any, snapshots: Snapshots
) -> None:
    snapshots.adapter(11, run=RUN, name="old")
    key = msgspec.structs.replace(snapshots.key("old"), slot=RUN)
    snapshots.store.expire_at(key, 1.0)
    async with start_replica(**SAMPLER) as caller:
        failed = await sampled(caller, [1], sampling_session_id=session(run=RUN, name="old"))
    assert failed["code"] == "unknown_snapshot"
    assert "expired" in failed["error"]


async def test_a_session_keeps_the_weights_that_it_began_with(
    start_replica: Any, snapshots: Snapshots, tmp_path: Any
) -> None:
    """Replaced under the same name: new sessions get the new weights, an old one its own or an error."""
    snapshots.adapter(11, run=RUN, name="live")
    old, new = (session(run=RUN, name="live", number=n) for n in (0, 1))
    async with start_replica(**SAMPLER, max_adapters=1) as caller:
        assert tokens_of(await sampled(caller, [1], sampling_session_id=old)) == [11] * 4
        key = snapshots.key("live")
        snapshots.store.delete(msgspec.structs.replace(key, slot=RUN))
        snapshots.adapter(22, run=RUN, name="live")
        assert tokens_of(await sampled(caller, [1], sampling_session_id=old)) == [11] * 4
        assert tokens_of(await sampled(caller, [1], sampling_session_id=new)) == [22] * 4
        evicted = await sampled(caller, [1], sampling_session_id=old)
    assert evicted["code"] == "digest_mismatch"
    assert "replaced" in evicted["error"]


async def test_a_damaged_adapter_never_answers(start_replica: Any, snapshots: Snapshots) -> None:
    manifest = snapshots.adapter(11, run=RUN, name="bad")
    directory = snapshots.store.root / "local" / "job-1" / RUN / "sampler" / "bad"
    assert whole_digest(manifest.tensors) == manifest.digest
    file = directory / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    async with start_replica(**SAMPLER) as caller:
        failed = await sampled(caller, [1], sampling_session_id=session(run=RUN, name="bad"))
    assert (failed["category"], failed["code"]) == ("server", "digest_mismatch")


async def test_more_adapters_than_fit_take_turns_and_all_answer_right(
    start_replica: Any, snapshots: Snapshots
) -> None:
    for token in range(10, 16):
        snapshots.adapter(token, run=RUN, name=f"a{token}")
    async with start_replica(**SAMPLER, max_adapters=2) as caller:
        order = [10 + i % 6 for i in range(36)]
        results = await asyncio.gather(
            *(
                sampled(caller, [1], sampling_session_id=session(run=RUN, name=f"a{t}"), seq_id=i)
                for i, t in enumerate(order)
            )
        )
    assert [tokens_of(result) for result in results] == [[token] * 4 for token in order]


async def test_no_answer_mixes_weights_while_sessions_of_all_kinds_come_and_go(
    start_replica: Any, snapshots: Snapshots
) -> None:
    """Canaries: all tokens of a sample are the one that its session's snapshot promises."""
    for token in (11, 12, 13):
        snapshots.adapter(token, run=RUN, name=f"lora-{token}")
    for token in (3, 4):
        snapshots.full(token, run=RUN, name=f"full-{token}")
    names = ["lora-11", "full-3", "lora-12", "", "lora-13", "full-4"]
    random = Random(1)
    async with start_replica(**SAMPLER, max_adapters=2, max_running=8) as caller:
        base = tokens_of(await sampled(caller, [1], params={"max_tokens": 12, "stop": []}))

        async def client(number: int) -> tuple[str, Any]:
            name = random.choice(names)
            request_id = await asample(
                caller,
                [1],
                sampling_session_id=session(run=RUN, name=name) if name else session(),
                params={"max_tokens": random.randint(1, 12), "stop": []},
                num_samples=(num_samples := random.randint(1, 4)),
                seq_id=number,
                **({"prompt_logprobs": True} if num_samples % 2 else {}),
            )
            if number % 7 == 0:
                await caller.post("/api/v1/cancel_future", {"request_id": request_id})
            return name, (await retrieve(caller, request_id)).json()

        answers = await asyncio.gather(*(client(number) for number in range(200)))
        await caller.until_idle()
    finished = [(name, result) for name, result in answers if "error" not in result]
    assert len(finished) >= 170
    for name, result in finished:
        assert result["homefire"]["weights"]["identity"] == (name or "base")
        for sequence in result["sequences"]:
            if name:
                assert set(sequence["tokens"]) == {int(name.rpartition("-")[2])}
            else:
                assert sequence["tokens"] == base[: len(sequence["tokens"])]
    assert {name for name, _ in finished} == set(names)


# futures -------------------------------------------------------------------------------------


async def test_a_repeated_request_gets_its_first_id_and_another_one_is_refused(
    start_replica: Any,
) -> None:
    async with start_replica(**SAMPLER) as caller:
        number = 3_000_000_000_000_000_001
        first = await asample(caller, [1, 2], seq_id=number)
        assert await asample(caller, [1, 2], seq_id=number) == first
        other = await asample(caller, [1, 2], seq_id=number + 1)
        body = sample_body([1, 3], seq_id=number)
        refused = await caller.post("/api/v1/asample", body)
    assert other != first
    assert refused.status == 400
    assert refused.json()["error"]["code"] == "sequence_reused"


async def test_a_result_can_be_read_again_until_its_retention_ends(start_replica: Any) -> None:
    clock = ManualClock()
    async with start_replica(**SAMPLER, clock=clock) as caller:
        request_id = await asample(caller, [1, 2], seq_id=1)
        unread = await asample(caller, [1, 2], seq_id=2)
        first = await retrieve(caller, request_id)
        assert (await retrieve(caller, request_id)).body == first.body
        clock.advance(tinker_futures.RETENTION_S + 1)
        await asample(caller, [1, 2], seq_id=3)
        assert (await retrieve(caller, request_id)).status == 410
        assert (await retrieve(caller, unread)).status == 200
        assert await asample(caller, [1, 2], seq_id=1) != request_id


async def test_results_beyond_the_memory_for_them_are_forgotten_read_ones_first(
    start_replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start_replica(**SAMPLER) as caller:
        read, unread = [await asample(caller, [1, 2], seq_id=i) for i in range(2)]
        await retrieve(caller, unread)
        size = len((await retrieve(caller, read)).body)
        unread = await asample(caller, [1, 2], seq_id=5)
        async with asyncio.timeout(20):
            while (await caller.status()).running or (await caller.status()).queued:
                await asyncio.sleep(0)
        monkeypatch.setattr(tinker_futures, "MAX_RESULT_BYTES", size)
        await asample(caller, [1, 2], seq_id=6)
        assert (await retrieve(caller, read)).status == 410
        assert (await retrieve(caller, unread)).status == 200


async def test_an_unknown_request_is_gone_so_that_clients_sample_again(start_replica: Any) -> None:
    async with start_replica(**SAMPLER) as caller:
        answered = await retrieve(caller, "job-1-sampler.0123456789abcdef")
    assert answered.status == 410
    assert "sample again" in answered.json()["detail"]


class HeldBack(BigramNetwork):
    """Decodes only when it is let."""

    let = threading.Event()

    def decode(self, tokens: Any, plan: Any, uniforms: Any, adapters: Any) -> Any:
        assert self.let.wait(20)
        return super().decode(tokens, plan, uniforms, adapters)


def open_held(spec: Any, publish: Any) -> Any:
    engine: Any = open_engine(spec, publish)
    HeldBack.let = threading.Event()
    engine._network.__class__ = HeldBack
    return engine


async def test_a_poll_is_held_and_then_told_to_try_again(
    start_replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinker_routes.SamplingRoutes.__init__, "__kwdefaults__", {"poll_s": 0.0})
    async with start_replica(**SAMPLER, engine=open_held) as caller:
        request_id = await asample(caller, [1, 2])
        pending = await retrieve(caller, request_id, until=lambda _: True)
        HeldBack.let.set()
        assert pending.status == 408
        assert pending.json() == {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "active",
        }
        assert len(tokens_of((await retrieve(caller, request_id)).json())) == 4


async def test_cancelling_frees_the_engine_and_fails_the_future(start_replica: Any) -> None:
    async with start_replica(**SAMPLER, max_context_length=1 << 20) as caller:
        request_id = await asample(caller, [1, 2], params={"max_tokens": 1 << 19, "stop": []})
        async with asyncio.timeout(20):
            while not (await caller.status()).running:
                await asyncio.sleep(0)
        answered = await caller.post("/api/v1/cancel_future", {"request_id": request_id})
        assert answered.status == 200
        await caller.until_idle()
        failed = (await retrieve(caller, request_id)).json()
        again = await caller.post("/api/v1/cancel_future", {"request_id": request_id})
        unknown = await caller.post("/api/v1/cancel_future", {"request_id": "nobody.1"})
    assert failed["category"] == "user"
    assert "cancelled" in failed["error"]
    assert (again.status, unknown.status) == (200, 200)


async def test_a_cancelled_wait_for_weights_lets_the_others_on(
    start_replica: Any, snapshots: Snapshots
) -> None:
    snapshots.full(3, run=RUN, name="full")
    wanted = session(run=RUN, name="full")
    async with start_replica(**SAMPLER, engine=open_held) as caller:
        base = await asample(caller, [1], seq_id=1)
        async with asyncio.timeout(20):
            while not (await caller.status()).running:
                await asyncio.sleep(0)
        given_up = await asample(caller, [1], sampling_session_id=wanted, seq_id=2)
        async with asyncio.timeout(20):
            while not (await caller.status()).queued:
                await asyncio.sleep(0)
        await caller.post("/api/v1/cancel_future", {"request_id": given_up})
        HeldBack.let.set()
        assert len(tokens_of((await retrieve(caller, base)).json())) == 4
        after = await sampled(caller, [1], sampling_session_id=wanted, seq_id=3)
    assert tokens_of(after) == [3] * 4


async def test_too_many_waiting_samples_are_shed_with_429(start_replica: Any) -> None:
    async with start_replica(**SAMPLER, engine=open_held, max_queued=2) as caller:
        ids = [await asample(caller, [1], seq_id=i) for i in range(2)]
        shed = await caller.post("/api/v1/asample", sample_body([1], seq_id=9))
        repeated = await asample(caller, [1], seq_id=1)
        HeldBack.let.set()
        for request_id in ids:
            assert (await retrieve(caller, request_id)).status == 200
    assert repeated == ids[1]
    assert shed.status == 429
    assert int(shed.headers["retry-after"]) <= 60


async def test_a_large_result_announces_its_size_to_a_first_poll_that_allows_it(
    start_replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tinker_routes, "METADATA_ABOVE_BYTES", 100)
    async with start_replica(**SAMPLER) as caller:
        request_id = await asample(caller, [1, 2], params={"max_tokens": 64, "stop": []})
        size = (await retrieve(caller, request_id, allow_metadata_only=True)).json()
        whole = await retrieve(caller, request_id, accept=PROTO, allow_metadata_only=False)
    assert size["status"] == "complete_metadata"
    assert size["response_payload_size"] >= len(whole.body) > 500


# what a request may ask for ------------------------------------------------------------------


async def test_old_clients_leave_everything_out_that_has_a_default(start_replica: Any) -> None:
    """0.15: no types, no defaulted parameters, explicit nulls; several chunks are one prompt."""
    body = {
        "prompt": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3]}]},
        "sampling_params": {"max_tokens": None, "seed": 7, "stop": None},
        "sampling_session_id": session(),
        "seq_id": 0,
        "prompt_logprobs": None,
    }
    async with start_replica(**SAMPLER, max_context_length=32) as caller:
        answered = await caller.post("/api/v1/asample", body)
        request_id = answered.json()["request_id"]
        result = (await retrieve(caller, request_id, accept="*/*")).json()
    assert len(tokens_of(result)) <= 29
    assert "prompt_logprobs" not in result


async def test_seeds_reproduce_and_the_samples_of_a_group_differ(start_replica: Any) -> None:
    params = {"temperature": 1.0, "seed": 5, "max_tokens": 16, "stop": []}
    async with start_replica(**SAMPLER) as caller:
        first, second = [
            await sampled(caller, [1, 2], num_samples=4, params=params, seq_id=i) for i in range(2)
        ]
        unseeded = await sampled(
            caller, [1, 2], num_samples=2, params={**params, "seed": None}, seq_id=3
        )
    assert first["sequences"] == second["sequences"]
    assert len({tuple(tokens_of(first, i)) for i in range(4)}) == 4
    assert tokens_of(unseeded, 0) != tokens_of(unseeded, 1)


@pytest.mark.parametrize(
    ("stop", "reason"),
    [(None, "stop"), ([], "length"), ("B", "stop"), (["x", "B"], "stop"), ([66], "stop")],
)
async def test_stops(start_replica: Any, snapshots: Snapshots, stop: Any, reason: str) -> None:
    """`B` is byte 66; null stops at the end of sequence alone, an empty list not even there."""
    async with start_replica(**SAMPLER) as caller:
        eos = min(open_tokenizer(caller).eos_token_ids)
        token = eos if stop in (None, []) else 66
        snapshots.adapter(token, run=RUN, name="only")
        result = await sampled(
            caller,
            [1],
            sampling_session_id=session(run=RUN, name="only"),
            params={"max_tokens": 3, "stop": stop},
        )
    assert result["sequences"][0]["stop_reason"] == reason
    assert tokens_of(result) == [token] * (1 if reason == "stop" else 3)
    assert len(result["sequences"][0]["logprobs"]) == len(tokens_of(result))


async def test_the_end_of_sequence_stops_beside_stops_that_are_given(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica(**SAMPLER) as caller:
        eos = min(open_tokenizer(caller).eos_token_ids)
        snapshots.adapter(eos, run=RUN, name="only")
        result = await sampled(
            caller,
            [1],
            sampling_session_id=session(run=RUN, name="only"),
            params={"max_tokens": 3, "stop": ["\n\nUser:"]},
        )
    assert tokens_of(result) == [eos]


def open_tokenizer(caller: Any) -> Any:
    return ModelTokenizer.open(Path(caller.model_directory))


async def test_prompt_logprobs_have_the_prompt_s_length_and_begin_undefined(
    start_replica: Any,
) -> None:
    async with start_replica(**SAMPLER) as caller:
        fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 3, "topk_sample_logprobs": 2}
        whole = await sampled(caller, [5, 6, 7, 8], **fields, num_samples=3, seq_id=0)
        tail = await sampled(caller, [5, 6, 7, 8], **fields, prompt_logprobs_last_n=2, seq_id=1)
        plain = await sampled(caller, [5, 6, 7, 8], seq_id=2)
    assert whole["prompt_logprobs"][0] is None
    assert all(logprob < 0 for logprob in whole["prompt_logprobs"][1:])
    assert len(whole["prompt_logprobs"]) == 4
    assert whole["topk_prompt_logprobs"][0] is None
    for row in whole["topk_prompt_logprobs"][1:]:
        assert [logprob for _, logprob in row] == sorted((lp for _, lp in row), reverse=True)
        assert len(row) == 3
    assert tail["prompt_logprobs"] == [None, None, *whole["prompt_logprobs"][2:]]
    assert tail["topk_prompt_logprobs"] == [None, None, *whole["topk_prompt_logprobs"][2:]]
    greedy = whole["sequences"][0]
    assert [row[0][0] for row in greedy["topk_logprobs"]] == greedy["tokens"]
    assert [row[0][1] for row in greedy["topk_logprobs"]] == greedy["logprobs"]
    assert plain.keys() == {"type", "sequences", "prompt_cache_hit_tokens", "homefire"}


async def test_a_text_that_fills_the_context_can_be_scored(start_replica: Any) -> None:
    """compute_logprobs: one token is sampled, and never fed back."""
    async with start_replica(**SAMPLER, max_context_length=8) as caller:
        fields = {"prompt_logprobs": True, "params": {"max_tokens": 1, "temperature": 1.0}}
        full = await sampled(caller, list(range(8)), **fields, seq_id=0)
        longer = await sampled(caller, list(range(9)), **fields, seq_id=1)
    assert len(full["prompt_logprobs"]) == 8
    assert len(tokens_of(full)) == 1
    assert longer["code"] == "sequence_too_long"


async def test_targets_are_scored_dense_and_sparse_alike(start_replica: Any) -> None:
    dense = {"data": [-1, 6, 7, 9, -1, -1], "dtype": "int64", "shape": [3, 2]}
    sparse = {
        "data": [6, 7, 9],
        "dtype": "int64",
        "shape": [3, 2],
        "sparse_crow_indices": [0, 1, 3, 3],
        "sparse_col_indices": [1, 0, 1],
    }
    async with start_replica(**SAMPLER) as caller:
        own = await sampled(caller, [5, 6, 7, 8], prompt_logprobs=True, seq_id=0)
        answers = [
            (await sampled(caller, [5, 6, 7, 8], target_prompt_logprobs=t, seq_id=1 + i))[
                "target_prompt_logprobs"
            ]
            for i, t in enumerate((dense, sparse))
        ]
    full = answers[0]["data"]
    assert answers[0]["shape"] == [3, 2]
    assert [full[0], full[4], full[5]] == [0.0] * 3
    assert full[1] == pytest.approx(own["prompt_logprobs"][1], abs=1e-6)
    assert full[2] == pytest.approx(own["prompt_logprobs"][2], abs=1e-6)
    assert full[3] < 0
    assert answers[1]["data"] == pytest.approx([full[1], full[2], full[3]])
    assert answers[1]["sparse_crow_indices"] == [0, 1, 3, 3]


async def test_alternative_tokens_are_drawn_at_every_position_after_the_first(
    start_replica: Any,
) -> None:
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 1}
    async with start_replica(**SAMPLER) as caller:
        first, second = [
            await sampled(caller, [5, 6, 7], prompt_alt_tokens_k=4, params=params, seq_id=i)
            for i in range(2)
        ]
    drawn = first["prompt_alt_tokens"]
    assert drawn["tokens"]["shape"] == drawn["logprobs"]["shape"] == [2, 4]
    assert len(drawn["tokens"]["data"]) == 8
    assert all(logprob < 0 for logprob in drawn["logprobs"]["data"])
    assert drawn == second["prompt_alt_tokens"]


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"beam_width": 4}, "unsupported", "beam_width"),
    ({"sampling_params": {"max_tokens": 1, "min_p": 0.1}}, "unsupported", "sampling_params.min_p"),
    ({"model_path": "tinker://ts-9:train:0/sampler_weights/x"}, "invalid_argument", "model_path"),
    ({"record_stability_info": True}, "unsupported", "record_stability_info"),
    (
        {"prompt": {"chunks": [{"type": "image", "data": "AA==", "format": "png"}]}},
        "unsupported",
        "image",
    ),
    ({"prompt": {"chunks": [{"dmel": "AA=="}]}}, "unsupported", "dmel"),
    ({"prompt": {"chunks": []}}, "invalid_argument", "empty"),
    ({"prompt": {"chunks": [{"tokens": [1, 99999]}]}}, "token_out_of_range", "99999"),
    ({"sampling_params": {"temperature": -1}}, "invalid_argument", "temperature"),
    ({"sampling_params": {"top_p": 0}}, "invalid_argument", "top_p"),
    ({"sampling_params": {"stop": [""]}}, "invalid_argument", "stop"),
    ({"sampling_params": {"stop": [-3]}}, "token_out_of_range", "stop"),
    ({"sampling_params": {"max_tokens": -1}}, "invalid_argument", "max_tokens"),
    ({"num_samples": 0}, "invalid_argument", "num_samples"),
    ({"prompt_logprobs_last_n": 1}, "invalid_argument", "prompt_logprobs_last_n"),
    (
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 2},
        "invalid_argument",
        "prompt_logprobs_last_n",
    ),
    ({"topk_prompt_logprobs": 321}, "invalid_argument", "topk_prompt_logprobs"),
    ({"prompt_alt_tokens_k": 1 << 30}, "invalid_argument", "prompt_alt_tokens_k"),
    (
        {"target_prompt_logprobs": {"data": [1], "dtype": "float32", "shape": [1, 1]}},
        "invalid_argument",
        "int64",
    ),
    (
        {"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [5, 1]}},
        "length_mismatch",
        "rows",
    ),
    (
        {"target_prompt_logprobs": {"data": [-1], "dtype": "int64", "shape": [1, 1]}},
        "invalid_argument",
        "no id",
    ),
]


@pytest.mark.parametrize(("fields", "code", "named"), REFUSALS)
async def test_what_cannot_be_done_fails_the_future_by_name(
    start_replica: Any, fields: dict[str, Any], code: str, named: str
) -> None:
    async with start_replica(**SAMPLER) as caller:
        body = {**sample_body([1, 2]), **fields}
        answered = await caller.post("/api/v1/asample", body)
        failed = (await retrieve(caller, answered.json()["request_id"])).json()
    assert answered.status == 200
    assert (failed["category"], failed["code"]) == ("user", code)
    assert named in failed["error"]


async def test_what_newer_clients_have_switched_off_is_no_reason_to_refuse(
    start_replica: Any,
) -> None:
    off = {
        "record_stability_info": False,
        "new": False,
        "newer": None,
        "newest": 0,
        "type": "sample",
    }
    async with start_replica(**SAMPLER) as caller:
        result = await sampled(caller, [1, 2], **off)
    assert len(tokens_of(result)) == 4


# the binary wire -----------------------------------------------------------------------------


async def test_protobuf_and_json_say_the_same(start_replica: Any) -> None:
    fields = {
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 2,
        "prompt_alt_tokens_k": 2,
        "target_prompt_logprobs": {"data": [6, -1], "dtype": "int64", "shape": [2, 1]},
    }
    async with start_replica(**SAMPLER) as caller:
        request_id = await asample(caller, [5, 6, 7], **fields, params={"stop": [], "seed": 1})
        told = (await retrieve(caller, request_id)).json()
        answered = await retrieve(caller, request_id, accept=f"{PROTO}, application/json")
    assert answered.headers["content-type"] == PROTO
    assert answered.headers["x-homefire-weights"].startswith("base; sha=")
    message = pb.SampleResponse.FromString(answered.body)
    (sequence,) = message.sequences
    assert sequence.stop_reason == pb.STOP_REASON_LENGTH
    assert np.frombuffer(sequence.tokens, np.int32).tolist() == tokens_of(told)
    assert np.frombuffer(sequence.logprobs, np.float32).tolist() == told["sequences"][0]["logprobs"]
    prompt_logprobs = np.frombuffer(message.prompt_logprobs, np.float32)
    assert math.isnan(prompt_logprobs[0])
    assert prompt_logprobs[1:].tolist() == told["prompt_logprobs"][1:]
    topk = message.topk_prompt_logprobs
    assert (topk.length, topk.k) == (3, 2)
    assert np.frombuffer(topk.logprobs, np.float32)[:2].tolist() == [-99999.0] * 2
    targets = np.frombuffer(message.target_prompt_logprobs.dense, np.float32)
    assert targets.tolist() == told["target_prompt_logprobs"]["data"]
    alt = np.frombuffer(message.prompt_alt_tokens.tokens.dense, np.int64)
    assert alt.tolist() == told["prompt_alt_tokens"]["tokens"]["data"]


async def test_the_real_client_s_decoder_reads_our_protobuf(start_replica: Any) -> None:
    from tinker.proto.response_conv import deserialize_sample_response

    fields = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2}
    async with start_replica(**SAMPLER) as caller:
        request_id = await asample(caller, [5, 6, 7], **fields, num_samples=2)
        told = (await retrieve(caller, request_id)).json()
        answered = await retrieve(caller, request_id, accept=PROTO)
    read = deserialize_sample_response(answered.body)
    assert [s.tokens for s in read.sequences] == [tokens_of(told, i) for i in range(2)]
    assert read.prompt_logprobs == told["prompt_logprobs"]
    assert json.loads(json.dumps(read.topk_prompt_logprobs)) == told["topk_prompt_logprobs"]


# sessions ------------------------------------------------------------------------------------


async def test_clients_that_join_a_session_get_numbers_that_no_other_has(
    start_replica: Any,
) -> None:
    clock = ManualClock()
    body = {"sampling_session_id": session()}
    counters = []
    for _ in range(2):
        async with start_replica(**SAMPLER, clock=clock) as caller:
            for _ in range(3):
                answered = await caller.post("/api/v1/join_sampling_session", body)
                counters.append(answered.json()["client_counter"])
        clock.advance(5)
    assert len(set(counters)) == 6
    assert max(counters) * 1_000_000_000 < 1 << 63


@pytest.mark.parametrize(
    ("named", "status"),
    [(None, 400), ("what.is.this.not", 400), ("other-sampler.0123abcd", 404)],
)
async def test_a_session_of_another_sampler_or_of_none_is_refused_at_once(
    start_replica: Any, named: str | None, status: int
) -> None:
    async with start_replica(**SAMPLER) as caller:
        body = sample_body([1], sampling_session_id=named)
        answered = await caller.post("/api/v1/asample", body)
    assert answered.status == status
    assert answered.json()["error"]["param"] == "sampling_session_id"


async def test_an_ordinary_deployment_has_no_sampling_sessions(start_replica: Any) -> None:
    async with start_replica(deployment="job-1-sampler") as caller:
        answered = await caller.post("/api/v1/asample", sample_body([1]))
    assert answered.status == 404


async def test_another_account_is_told_that_there_is_no_such_deployment(
    start_replica: Any,
) -> None:
    async with start_replica(**SAMPLER) as caller:
        answered = await caller.post(
            "/api/v1/asample", sample_body([1]), headers={"x-homefire-account": "other"}
        )
    assert answered.status == 404


async def test_a_request_that_comes_while_the_model_loads_is_told_to_wait(
    start_replica: Any,
) -> None:
    may_open = threading.Event()

    def open_late(spec: Any, publish: Any) -> Any:
        assert may_open.wait(20)
        return open_engine(spec, publish)

    async with start_replica(**SAMPLER, engine=open_late, wait=False) as caller:
        answered = await caller.post("/api/v1/asample", sample_body([1]))
        may_open.set()
    assert answered.status == 503


async def test_weights_changed_from_outside_are_put_back_for_a_session(
    start_replica: Any, snapshots: Snapshots
) -> None:
    """An operator hot-loads into a sampler: a sampling session still gets its own weights."""
    snapshots.base(9)
    snapshots.full(3, run=RUN, name="full")
    wanted = session(run=RUN, name="full")
    async with start_replica(**SAMPLER) as caller:
        assert (
            tokens_of(await sampled(caller, [1], sampling_session_id=wanted, seq_id=0)) == [3] * 4
        )
        await caller.hot_load("step-9")
        results = await asyncio.gather(
            *(sampled(caller, [1], sampling_session_id=wanted, seq_id=1 + i) for i in range(5))
        )
    assert [tokens_of(result) for result in results] == [[3] * 4] * 5


async def test_weights_that_never_serve_are_no_answer_and_no_failure_of_the_request(
    start_replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody swaps again and again: the sample is lost, and its client samples again."""

    async def ghost(*_: Any) -> ServedWeights:
        return ServedWeights(Identity("ghost"), "0" * 64)

    monkeypatch.setattr(SessionWeights, "_enter", ghost)
    async with start_replica(**SAMPLER) as caller:
        answered = await retrieve(caller, await asample(caller, [1, 2]))
    assert answered.status == 410
