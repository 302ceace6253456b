"""What clients old and new put into one request: understood alike, or refused by name."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import zstandard
from tinker.proto import tinker_public_pb2 as theirs

from homefire.wire.engine import Forward, ForwardBackward, OptimStep
from homefire.wire.specs import TrainerMode
from unit.trainer.front.conftest import make_datum, tensor

PROTO = {"content-type": "application/x-protobuf"}
TOKENS, TARGETS = [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]


def body(model: str, seq: int = 1, *, data: list[Any], **more: Any) -> dict[str, Any]:
    given = {"data": data, "loss_fn": "cross_entropy", **more.pop("input", {})}
    return {"model_id": model, "seq_id": seq, "forward_backward_input": given, **more}


def message(model: str, seq: int = 1, *, chunks: list[list[int]] | None = None) -> Any:
    """As tinker itself encodes it."""
    request = theirs.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="cross_entropy")
    datum = request.data.add()
    for tokens in chunks or [TOKENS]:
        datum.model_input.add().encoded_text.tokens = np.array(tokens, "<i4").tobytes()
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense = np.array(TARGETS, "<i8").tobytes()
    target.dtype = theirs.DTYPE_INT64
    target.shape.append(len(TARGETS))
    return request


async def send(client, request: Any, **headers: str) -> Any:
    data = request.SerializeToString() if not isinstance(request, bytes) else request
    answer = await client.http.post(
        "/api/v1/forward_backward", content=data, headers={**PROTO, **headers}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["request_id"]


async def post(client, **request: Any) -> str:
    answer = await client.post("forward_backward", **request)
    assert answer.status_code == 200, answer.text
    return answer.json()["request_id"]


def text(*chunks: list[int], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": c} for c in chunks]},
        "loss_fn_inputs": {"target_tokens": tensor(TARGETS, "int64"), **(inputs or {})},
    }


# The same request ------------------------------------------------------------------------------


async def test_chunks_spans_wires_and_compression_make_no_other_request(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        first = await post(client, **body(model, data=[text(TOKENS)]))
        spans = message(model, chunks=[[1], [2, 3], [4, 5]])
        for field in (spans.data[0].model_input_spans, spans.data[0].loss_fn_input_spans):
            field.add().sampled_tokens.sequence_id = "s"
        datum = {**text([1, 2], [3, 4, 5]), "model_input_spans": [{"sampled_tokens": {}}]}
        again = [
            await post(client, **body(model, data=[text([1, 2], [3], [4, 5])])),
            await post(client, **body(model, data=[datum], type="forward_backward")),
            await post(client, **body(model, data=[text(TOKENS)], input={"loss_fn_config": None})),
            await send(client, message(model)),
            await send(client, spans),
            await send(
                client,
                zstandard.compress(message(model).SerializeToString()),
                **{"content-encoding": "zstd"},
            ),
        ]
        assert again == [first] * len(again)
        await client.result(first)
        assert len([r for r in client.orders.seen if isinstance(r, ForwardBackward)]) == 1


async def test_forward_only_never_leaves_a_gradient_on_either_wire(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        plain = await post(client, **body(model, 1, data=[text(TOKENS)], forward_only=True))
        binary = message(model, 2)
        binary.forward_only = True
        results = [await client.result(plain), await client.result(await send(client, binary))]
        assert results[0] == results[1]
        assert not [r for r in client.orders.seen if isinstance(r, ForwardBackward)]
        assert len([r for r in client.orders.seen if isinstance(r, Forward)]) == 2
        stepped = await client.result(await client.optim_step(model, 3))
        assert stepped["metrics"]["num_backward_calls"] == 0


async def test_the_second_config_map_wins_over_the_first(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        request = message(model)
        request.loss_fn = "ppo"
        for name in ("logprobs", "advantages"):
            value = request.data[0].loss_fn_inputs[name]
            value.dense = np.ones(len(TARGETS), "<f4").tobytes()
            value.dtype = theirs.DTYPE_FLOAT32
            value.shape.append(len(TARGETS))
        request.loss_fn_config["clip_low_threshold"] = 0.5
        request.loss_fn_config["clip_high_threshold"] = 1.5
        request.loss_fn_config_v2["clip_low_threshold"].number = 0.9
        assert "error" not in await client.result(await send(client, request))
        (ran,) = [r for r in client.orders.seen if isinstance(r, ForwardBackward)]
        assert ran.loss_fn_config == {"clip_low_threshold": 0.9, "clip_high_threshold": 1.5}


@pytest.mark.parametrize("binary", [False, True])
async def test_sparse_targets_and_weights_are_the_dense_ones(start_front, binary: bool) -> None:
    """[N, K] = [3, 2]; the second row has one target, the third none."""
    crow, col = [0, 2, 3, 3], [0, 1, 0]
    dense = {
        "target_tokens": {"data": [7, 8, 9, 0, 0, 0], "dtype": "int64", "shape": [3, 2]},
        "weights": {"data": [1.0, 0.5, 2.0, 0.0, 0.0, 0.0], "dtype": "float32", "shape": [3, 2]},
    }
    sparse = {
        name: {
            **value,
            "data": values,
            "sparse_crow_indices": crow,
            "sparse_col_indices": col,
        }
        for (name, value), values in zip(dense.items(), ([7, 8, 9], [1.0, 0.5, 2.0]), strict=True)
    }
    async with start_front() as client:
        model = await client.model()
        whole = {"model_input": {"chunks": [{"tokens": [1, 2, 3]}]}, "loss_fn_inputs": dense}
        first = await post(client, **body(model, data=[whole]))
        if binary:
            request = message(model, chunks=[[1, 2, 3]])
            del request.data[0].loss_fn_inputs["target_tokens"]
            for name, value in sparse.items():
                found = request.data[0].loss_fn_inputs[name]
                is_int = value["dtype"] == "int64"
                found.dtype = theirs.DTYPE_INT64 if is_int else theirs.DTYPE_FLOAT32
                found.shape.extend([3, 2])
                kind = "<i8" if is_int else "<f4"
                found.sparse_csr.values = np.array(value["data"], kind).tobytes()
                found.sparse_csr.crow_indices = np.array(crow, "<i8").tobytes()
                found.sparse_csr.col_indices = np.array(col, "<i8").tobytes()
            again = await send(client, request)
        else:
            again = await post(client, **body(model, data=[{**whole, "loss_fn_inputs": sparse}]))
        assert again == first
        result = await client.result(first)
        assert result["loss_fn_outputs"][0]["logprobs"]["shape"] == [3, 2]


async def test_more_than_1024_datums_in_chunks_of_any_order_are_one_gradient(start_front) -> None:
    """Bit for bit the gradient of the chunks in order; the client sends the first one last."""
    data = [make_datum([n % 60, (n + 1) % 60, (n + 2) % 60]) for n in range(1200)]
    chunks = {1: data[:500], 2: data[500:1000], 3: data[1000:]}
    digests = []
    for job, order in (("in-order", [1, 2, 3]), ("as-sent", [2, 3, 1])):
        async with start_front(job=job) as client:
            model = await client.model()
            requests = {n: await client.forward_backward(model, n, data=chunks[n]) for n in order}
            step = await client.optim_step(model, 4)
            stepped = await client.result(step)
            assert stepped["metrics"]["num_backward_calls"] == 3
            assert stepped["metrics"]["num_sequences"] == 1200
            outputs = [(await client.result(requests[n]))["loss_fn_outputs"] for n in (1, 2, 3)]
            assert [len(output) for output in outputs] == [500, 500, 200]
            digests.append(await client.digest())
    assert digests[0] == digests[1]


# What old clients leave out --------------------------------------------------------------------


@pytest.mark.parametrize("adam", [None, {}, {"learning_rate": None, "beta1": None}])
async def test_adam_fields_that_are_left_out_are_the_sdks_defaults(start_front, adam) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.result(await client.optim_step(model, 1, adam_params=adam))
        (ran,) = [r for r in client.orders.seen if isinstance(r, OptimStep)]
        found = (ran.adam.learning_rate, ran.adam.beta1, ran.adam.beta2, ran.adam.eps)
        assert found == (1e-4, 0.9, 0.95, 1e-12)
        assert (ran.adam.weight_decay, ran.adam.grad_clip_norm) == (0.0, 0.0)


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "code", "named"),
    [
        ({"adam_params": {"amsgrad": True}}, "invalid_argument", "'amsgrad'"),
        ({"adam_params": {"learning_rate": "1e-4"}}, "invalid_argument", "learning_rate"),
        ({"adam_params": {"learning_rate": True}}, "invalid_argument", "learning_rate"),
        (
            {"adam_params": None, "optimizer_params": {"type": "dimuon", "version": 1}},
            "unsupported",
            "'dimuon'",
        ),
    ],
)
async def test_a_step_that_would_not_be_what_was_meant_fails_in_its_place(
    start_front, asked: dict[str, Any], code: str, named: str
) -> None:
    async with start_front() as client:
        model = await client.model()
        failed = await client.result(await client.optim_step(model, 1, **asked))
        assert (failed["error_class"], failed["category"]) == (code, "user")
        assert named in failed["error"]
        assert not [r for r in client.orders.seen if isinstance(r, OptimStep)]
        await client.train(model, 2, 1)


def _with(chunk: dict[str, Any] | None = None, **model_input: Any) -> dict[str, Any]:
    datum = text(TOKENS)
    datum["model_input"]["chunks"] += [chunk] if chunk else []
    datum["model_input"] |= model_input
    return datum


@pytest.mark.parametrize(
    ("datum", "named"),
    [
        (_with({"type": "image", "data": "YQ==", "format": "png"}), "image"),
        (_with({"data": "YQ==", "format": "png"}), "image"),
        (_with({"type": "dmel", "dmel": "YQ=="}), "dmel"),
        (_with({"dmel": "YQ=="}), "dmel"),
        (_with({"type": "image_asset_pointer", "location": "x"}), "image_asset_pointer"),
        (_with(routing_matrices=["YQ=="] * 5), "routing_matrices"),
        (_with(routing_references={"a": 1}), "routing_references"),
        (_with(top_sampling_references=[]), "top_sampling_references"),
        (_with(sampling_mask_references=[]), "sampling_mask_references"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "forward_backward"])
async def test_inputs_that_are_not_used_are_refused_by_name_and_leave_no_hole(
    start_front, datum: dict[str, Any], named: str, call: str
) -> None:
    async with start_front() as client:
        model = await client.model()
        given = {"data": [datum], "loss_fn": "cross_entropy"}
        failed = await client.call(call, model, 1, **{f"{call}_input": given})
        assert (failed["error_class"], failed["category"]) == ("unsupported", "user")
        assert named in failed["error"]
        if call == "forward_backward":
            cleared = await client.result(await client.optim_step(model, 2))
            assert cleared["error_class"] == "incomplete_gradient"


async def test_replays_that_are_null_are_no_replays(start_front) -> None:
    async with start_front() as client:
        datum = _with(routing_matrices=None, routing_references=None)
        request = await post(client, **body(await client.model(), data=[datum]))
        assert "error" not in await client.result(request)


@pytest.mark.parametrize("kind", ["image", "dmel"])
async def test_binary_chunks_that_are_not_text_are_refused_by_name(start_front, kind: str) -> None:
    async with start_front() as client:
        request = message(await client.model())
        chunk = request.data[0].model_input.add()
        if kind == "image":
            chunk.image.format = "png"
        else:
            chunk.dmel.dmel = b"x"
        failed = await client.result(await send(client, request))
        assert failed["error_class"] == "unsupported"
        assert kind in failed["error"]


@pytest.mark.parametrize("loss_fn", ["stable_reinforce", "custom"])
async def test_losses_that_nobody_published_are_refused_by_name(start_front, loss_fn: str) -> None:
    async with start_front() as client:
        model = await client.model()
        failed = await client.result(await client.forward_backward(model, 1, loss_fn=loss_fn))
        assert (failed["error_class"], failed["category"]) == ("unsupported", "user")
        assert f"'{loss_fn}'" in failed["error"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, "dimuon"),
        ({"projection_head_dim": 64}, "projection_head_dim"),
    ],
)
@pytest.mark.parametrize("pooled", [False, True])
async def test_models_that_would_not_be_what_was_meant_are_not_made(
    start_front, asked: dict[str, Any], named: str, pooled: bool
) -> None:
    async with start_front(pooled=pooled, mode=TrainerMode.LORA) as client:
        session = "ts-0123456789abcdef" if pooled else await client.session()
        failed = await client.create(session, **{"lora_config": {"rank": 4}, **asked})
        assert (failed["error_class"], failed["category"]) == ("unsupported", "user")
        assert named in failed["error"]


async def test_an_unknown_field_of_the_adapter_is_refused_by_name(start_front) -> None:
    async with start_front(mode=TrainerMode.LORA) as client:
        body = {"session_id": await client.session(), "model_seq_id": 0, "base_model": "tiny"}
        refused = await client.post("create_model", **body, lora_config={"rank": 4, "dropout": 0.1})
        assert refused.status_code == 400
        assert "dropout" in refused.json()["error"]["message"]


async def test_random_retries_of_a_whole_run_change_nothing(start_front) -> None:
    """Every POST is sent one to three times, at random moments, in random order within a window."""
    generator = random.Random(7)
    digests = []
    for job, is_shaky in (("steady", False), ("shaky", True)):
        async with start_front(job=job) as client:
            model = await client.model()
            seqs = list(range(1, 19))
            if is_shaky:
                seqs = [seq for seq in seqs for _ in range(generator.randint(1, 3))]
                places = [place + generator.uniform(0, 6) for place in range(len(seqs))]
                seqs = [seq for _, seq in sorted(zip(places, seqs, strict=True))]
            requests = [await _nth_call(client, model, seq) for seq in seqs]
            assert len(set(requests)) == 18
            for request in requests:
                assert "error" not in await client.result(request)
            digests.append(await client.digest())
    assert digests[0] == digests[1]


async def _nth_call(client, model: str, seq: int) -> str:
    """Two passes and a step, again and again."""
    if seq % 3 == 0:
        return await client.optim_step(model, seq)
    data = [make_datum([seq, 2, 3, seq + 1])]
    return await client.forward_backward(model, seq, data=data)
