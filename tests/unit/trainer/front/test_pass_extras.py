"""What a pass returns beside logprobs, through the routes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from homefire.wire import tinker_public_pb2 as pb

EMBEDDING = {"output": "embedding", "pooling": "mean"}


async def submit(client: Any, call: str, model: str, seq: int, data: Any, **config: Any) -> str:
    given = {"data": data, "loss_fn": "cross_entropy", "loss_fn_config": config}
    body = {"model_id": model, "seq_id": seq, f"{call}_input": given}
    return (await client.post(call, **body)).json()["request_id"]


def gradients(*values: float) -> dict[str, Any]:
    return {"embedding_grads": {"data": list(values), "dtype": "float32", "shape": [len(values)]}}


def row(*tokens: int, inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"model_input": {"chunks": [{"tokens": list(tokens)}]}, "loss_fn_inputs": inputs or {}}


def array(tensor: dict[str, Any]) -> np.ndarray:
    return np.array(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])


async def test_top_k_gives_descending_logprobs_and_their_ids_on_both_wires(
    start_front, datum
) -> None:
    async with start_front() as client:
        model = await client.model()
        data = [datum([1, 2, 3]), datum([5, 6])]
        request_id = await submit(client, "forward", model, 1, data, top_k=3.0)
        outputs = (await client.result(request_id))["loss_fn_outputs"]
        best = array(outputs[0]["top_k_logprobs"])
        assert best.shape == array(outputs[0]["top_k_indices"]).shape == (2, 3)
        assert outputs[0]["top_k_indices"]["dtype"] == "int64"
        assert (np.diff(best, axis=1) <= 0).all()
        assert outputs[1]["top_k_logprobs"]["shape"] == [1, 3]

        answer = await client.http.post(
            "/api/v1/retrieve_future",
            json={"request_id": request_id},
            headers={"accept": "application/x-protobuf"},
        )
        record = pb.ForwardBackwardOutput.FromString(answer.content).loss_fn_outputs
        fields = record[0].fields
        assert list(fields["top_k_logprobs"].trailing_shape) == [3]
        ids = np.frombuffer(fields["top_k_indices"].data, np.int64).reshape(3, 3)
        assert ids[:2].tolist() == array(outputs[0]["top_k_indices"]).tolist()


async def test_the_likeliest_token_is_the_targets_where_the_target_is_likeliest(
    start_front, datum
) -> None:
    async with start_front() as client:
        model = await client.model()
        done = await client.result(
            await submit(client, "forward", model, 1, [datum([1, 2, 3])], top_k=64)
        )
        output = done["loss_fn_outputs"][0]
        ids, best = array(output["top_k_indices"]), array(output["top_k_logprobs"])
        targets = best[ids == np.array([[2], [3]])]
        assert targets.tolist() == pytest.approx(output["logprobs"]["data"], abs=1e-6)


async def test_a_custom_loss_on_embeddings_trains_and_replays_bit_for_bit(
    start_front, orders
) -> None:
    from homefire.wire.engine import OptimStep

    async with start_front(orders=orders) as client:
        model = await client.model()
        asked = await submit(client, "forward", model, 1, [row(1, 2), row(3)], **EMBEDDING)
        before = await client.result(asked)
        shapes = [output["embedding"]["shape"] for output in before["loss_fn_outputs"]]
        assert shapes == [[64], [64]]
        assert before["metrics"]["loss:sum"] == 0.0
        data = [row(1, 2, inputs=gradients(*[1.0] * 64)), row(3, inputs=gradients(*[0.0] * 64))]
        await client.result(await submit(client, "forward_backward", model, 2, data, **EMBEDDING))
        orders.dies_at.append(OptimStep)
        stepped = await client.result(await client.optim_step(model, 3))
        assert stepped["metrics"]["num_loss_tokens"] == 2
        assert stepped["metrics"]["num_sequences"] == 1
        after = await client.result(
            await submit(client, "forward", model, 4, [row(1, 2), row(3)], **EMBEDDING)
        )
        first, second = (array(output["embedding"]) for output in after["loss_fn_outputs"])
        was = [array(output["embedding"]) for output in before["loss_fn_outputs"]]
        assert (first < was[0]).all()
        assert second.tolist() == was[1].tolist()
        assert client.events("recovered")[0]["divergences"] == []


async def test_a_contrastive_loss_answers_with_metrics_alone(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        config = {"output": "contrastive_loss", "pooling": "last", "temperature": 0.5}
        data = [row(1), row(2), row(1, 3), row(2, 4), row(9)]
        done = await client.result(
            await submit(
                client,
                "forward_backward",
                model,
                1,
                data,
                num_queries=2,
                num_extra_negatives=1,
                **config,
            )
        )
        assert done["loss_fn_outputs"] == []
        assert done["metrics"]["loss"] == done["metrics"]["loss:sum"] > 0


@pytest.mark.parametrize(
    ("call", "config", "named"),
    [
        ("forward_backward", {"top_k": 3}, "top_k"),
        ("forward", {"top_k": 0}, "top_k is 0"),
        ("forward", {"top_k": 65}, "the vocabulary has 64"),
        ("forward", {"output": "projection", "pooling": "mean"}, "projection"),
        ("forward", {"output": "contrastive_loss", "pooling": "mean"}, "contrastive_loss"),
        ("forward", {"outputs": "embedding"}, "outputs"),
    ],
)
async def test_what_is_not_computed_is_refused_by_name(
    start_front, datum, call: str, config: dict[str, Any], named: str
) -> None:
    async with start_front() as client:
        model = await client.model()
        failed = await client.result(
            await submit(client, call, model, 1, [datum([1, 2])], **config)
        )
        assert failed["category"] == "user"
        assert named in failed["error"]
