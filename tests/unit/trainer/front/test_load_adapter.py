"""load_adapter: where a path leads, what is refused, and that replay loads what was accepted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from homefire.foundation.clock import ManualClock
from homefire.wire.specs import TrainerMode

LORA = {"mode": TrainerMode.LORA, "lora_rank": 8}


def lora(**changes: Any) -> dict[str, Any]:
    return {"lora_config": {"rank": 4, "alpha": 8.0, "seed": 1, **changes}}


async def new_model(client: Any, **changes: Any) -> str:
    return (await client.create(await client.session(), **lora(**changes)))["model_id"]


async def logprobs(client: Any, model: str, seq: int) -> list[float]:
    result = await client.result(await client.forward(model, seq))
    return result["loss_fn_outputs"][0]["logprobs"]["data"]


@pytest.fixture
async def trained(start_front, tmp_path: Path) -> dict[str, Any]:
    """A snapshot `taught` of job-1, its PEFT directory, and what it gives."""
    async with start_front(**LORA) as client:
        model = await new_model(client)
        await client.train(model, 1, 3)
        await client.call("save_weights_for_sampler", model, 7, path="taught")
        given = await logprobs(client, model, 8)
    return {"directory": tmp_path / "store/local/job-1/policy/sampler/taught", "logprobs": given}


@pytest.fixture
def spec(tmp_path: Path, trained: dict[str, Any]) -> dict[str, Any]:
    """Of another job, with the adapter promoted and below a model root."""
    models, root = tmp_path / "models", tmp_path / "root"
    for target in (models / "local" / "taught-model", root / "adapter"):
        target.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trained["directory"] / name, target / name)
    roots = [str(models), str(root)]
    return {"job": "job-2", "promoted_models": str(models), "model_roots": roots, **LORA}


@pytest.mark.parametrize(
    "path", ["accounts/local/models/taught-model", "{root}/adapter", "cross_job://job-1/taught"]
)
async def test_an_adapter_is_loaded_from_wherever_it_lies(
    start_front, spec, trained, tmp_path: Path, path: str
) -> None:
    path = path.format(root=tmp_path / "root")
    async with start_front(**spec) as client:
        model = await new_model(client, seed=9)
        assert await logprobs(client, model, 1) != trained["logprobs"]
        loaded = await client.call("load_adapter", model, 2, adapter_path=path)
        assert loaded["type"] == "load_adapter"
        assert (loaded["model_id"], loaded["adapter_path"]) == (model, path)
        assert await logprobs(client, model, 3) == trained["logprobs"]
        assert client.events("adapter_loaded")[0]["name"] == path


async def test_loading_resets_the_optimizer_and_clears_the_gradient(
    start_front, spec, tmp_path: Path
) -> None:
    path = str(tmp_path / "root/adapter")
    async with start_front(**spec) as client:
        model = await new_model(client, seed=9)
        await client.train(model, 1, 2)
        await client.forward_backward(model, 5)
        await client.call("load_adapter", model, 6, adapter_path=path)
        stepped = await client.result(await client.optim_step(model, 7))
        assert stepped["metrics"]["grad_norm"] == stepped["metrics"]["update_norm"] == 0.0


async def test_replay_loads_the_same_adapter_and_then_trains_the_same(
    start_front, spec, tmp_path: Path
) -> None:
    clock = ManualClock()
    async with start_front(crash=True, clock=clock, **spec) as client:
        model = await new_model(client, seed=9)
        await client.call("load_adapter", model, 1, adapter_path=f"{tmp_path}/root/adapter")
        await client.train(model, 2, 1)
        digest = await client.digest()
    async with start_front(clock=clock, **spec) as client:
        await logprobs(client, model, 4)
        assert await client.digest() == digest
        assert client.events("recovered")[0]["divergences"] == []


async def test_replay_says_so_when_the_adapter_is_another_one_by_now(
    start_front, spec, tmp_path: Path
) -> None:
    clock, adapter = ManualClock(), tmp_path / "root/adapter/adapter_model.safetensors"
    async with start_front(crash=True, clock=clock, **spec) as client:
        model = await new_model(client, seed=9)
        await client.call("load_adapter", model, 1, adapter_path=f"{tmp_path}/root/adapter")
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(data)
    async with start_front(clock=clock, **spec) as client:
        await logprobs(client, model, 2)
        (divergence,) = client.events("recovered")[0]["divergences"]
        assert "not the one that was there" in divergence


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"rank": 2}, ["rank 4", "has 2"]),
        ({"alpha": 32.0}, ["alpha 8", "has 32"]),
    ],
)
async def test_another_rank_or_alpha_is_refused_naming_both(
    start_front, spec, made: dict[str, Any], named: list[str]
) -> None:
    async with start_front(**spec) as client:
        model = await new_model(client, **made)
        before = await logprobs(client, model, 1)
        failed = await client.call(
            "load_adapter", model, 2, adapter_path="accounts/local/models/taught-model"
        )
        assert failed["category"] == "user"
        assert all(name in failed["error"] for name in named)
        assert await logprobs(client, model, 3) == before


@pytest.mark.parametrize(
    ("path", "code", "named"),
    [
        ("gs://bucket/adapter", "unsupported", "gs://bucket/adapter"),
        ("accounts/local/models/nobody", "unknown_model", "nobody"),
        ("accounts/other/models/taught-model", "unknown_model", "accounts/other"),
        ("/etc", "invalid_argument", "not below a model root"),
        ("{root}/../store/local/job-1/policy", "invalid_argument", "not below a model root"),
        ("{root}", "invalid_argument", "no PEFT directory"),
        ("cross_job://job-1/nothing", "unknown_snapshot", "nothing"),
        (
            "tinker://job-1-sx:train:0/weights/taught",
            "wrong_checkpoint_kind",
            "no sampler snapshot",
        ),
    ],
)
async def test_a_path_that_leads_nowhere_keeps_its_place_and_says_why(
    start_front, spec, tmp_path: Path, path: str, code: str, named: str
) -> None:
    async with start_front(**spec) as client:
        model = await new_model(client)
        given = path.format(root=tmp_path / "root")
        failed = await client.call("load_adapter", model, 1, adapter_path=given)
        assert (failed["code"], failed["category"]) == (code, "user")
        assert named in failed["error"]
        assert await logprobs(client, model, 2)


async def test_an_adapter_of_another_base_model_is_refused(start_front, spec) -> None:
    async with start_front(**{**spec, "base_model": "accounts/local/models/big"}) as client:
        created = await client.create(
            await client.session(), base_model="accounts/local/models/big", **lora()
        )
        for path in ("accounts/local/models/taught-model", "cross_job://job-1/taught"):
            seq = 1 if path.startswith("accounts") else 2
            failed = await client.call("load_adapter", created["model_id"], seq, adapter_path=path)
            assert "an adapter of tiny" in failed["error"]


async def test_a_model_that_trains_all_parameters_takes_no_adapter(start_front, spec) -> None:
    full = {**spec, "mode": TrainerMode.FULL, "lora_rank": 0}
    async with start_front(**full) as client:
        model = await client.model()
        failed = await client.call(
            "load_adapter", model, 1, adapter_path="accounts/local/models/taught-model"
        )
        assert "trains all parameters" in failed["error"]
