"""Adapters outside our own engine: merged for transformers, exported to peft and taken from it; and two
adapters of one engine beside each other."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from homefire.checkpoints import (
    PromoteSpec,
    promote,
    read_adapter_directory,
    read_model_directory,
    write_safetensors,
)
from homefire.inference.engine.embedded import EmbeddedNetwork
from homefire.inference.engine.protocol import SequenceRequest, ServedWeights, WeightSet
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    AdoptSnapshot,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoadAdapter,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SaveSampler,
    SlotKind,
)
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.ids import Identity
from homefire.wire.manifest import CheckpointKind, whole_digest
from homefire.wire.tensors import digest_tensors
from parity.sampler_models import open_bench, prompt, reference, small_qwen3, swap, worst

transformers_logging.disable_progress_bar()
torch.set_num_threads(1)
VOCABULARY = 97
LENGTHS = (9, 14, 5)
PLAN = ExecutionPlan(micro_batches=[[1], [0, 2]], threads=1)
ROUNDING = 0.05
"""Nats on a logprob: what rounding every weight of these unit-gain models to bfloat16 moves, measured
0.01 to 0.03. The adapters trained here move logprobs by more than 0.5."""

PEFT_TOLERANCE = 2e-6
"""Two units in the last place of a logprob of -10 in float32; measured 1e-6, one unit."""


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    return small_qwen3(tmp_path_factory.getbasetemp(), tied=request.param, seed=1)


tied_and_not = pytest.mark.parametrize(
    "model_directory", [True, False], indirect=True, ids=["tied", "untied"]
)


def open_engine(directory: Path, store: Path, **slots: LoraSpec):
    engine = torch_engine()
    engine.open_model(
        OpenModel(
            model_dir=str(directory),
            base_model="tiny",
            store_root=str(store),
            account="local",
            job="job-1",
            threads=1,
            max_context_length=64,
        )
    )
    for slot, spec in slots.items():
        engine.open_slot(OpenSlot(slot=slot, kind=SlotKind.LORA, lora=spec))
    return engine


def batch_of(seed: int):
    generator = np.random.default_rng(seed)
    total = sum(LENGTHS)
    return {
        "tokens": generator.integers(0, VOCABULARY, total).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": generator.integers(0, VOCABULARY, (total, 1)),
    }


def backward(engine, slot: str, seed: int) -> None:
    request = ForwardBackward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
    engine.forward_backward(request, batch_of(seed))


def step(engine, slot: str) -> None:
    adam = AdamParams(learning_rate=2e-2, weight_decay=0.1)
    engine.optim_step(OptimStep(slot=slot, adam=adam))


def train(engine, slot: str, seed: int, steps: int = 3) -> None:
    for offset in range(steps):
        backward(engine, slot, seed + offset)
        step(engine, slot)


def forward(engine, slot: str) -> np.ndarray:
    request = Forward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
    return engine.forward(request, batch_of(99))[1]["logprobs"][:, 0]


def row_by_row(module) -> np.ndarray:
    batch = batch_of(99)
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64)).split(LENGTHS)
    targets = torch.from_numpy(batch["target_tokens"]).split(LENGTHS)
    with torch.no_grad():
        parts = [
            module(input_ids=row[None]).logits[0].float().log_softmax(-1).gather(-1, target)[:, 0]
            for row, target in zip(tokens, targets, strict=True)
        ]
    return torch.cat(parts).numpy()


def hugging_face(directory: Path):
    module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return module.eval()


def save(engine, identity: str, checkpoint_type: str, slot: str = "policy"):
    return engine.prepare_save(
        SaveSampler(slot=slot, identity=identity, checkpoint_type=checkpoint_type)
    ).write()


def snapshot(store: Path, identity: str, slot: str = "policy") -> Path:
    return store / "local" / "job-1" / slot / "sampler" / identity


# Merged into the base -------------------------------------------------------------------------


@tied_and_not
@pytest.mark.parametrize("train_unembed", [True, False])
def test_a_merged_base_gives_transformers_the_logits_of_base_and_adapter(
    model_directory, tmp_path, train_unembed
):
    spec = LoraSpec(rank=4, alpha=8.0, seed=1, train_unembed=train_unembed)
    engine = open_engine(model_directory, tmp_path, policy=spec)
    train(engine, "policy", seed=0)
    ours = forward(engine, "policy")
    saved = save(engine, "merged", "merged_base")
    assert saved.kind == "base"
    module = hugging_face(snapshot(tmp_path, "merged"))
    print(
        np.abs(row_by_row(module) - ours).max(),
        np.abs(row_by_row(hugging_face(model_directory)) - ours).max(),
    )
    assert np.abs(row_by_row(module) - ours).max() < ROUNDING
    assert np.abs(row_by_row(hugging_face(model_directory)) - ours).max() > 10 * ROUNDING
    adapter = engine._slots.get("policy").trainable()._lora
    base = dict(hugging_face(model_directory).named_modules())
    for path, linear in module.named_modules():
        if path in adapter.layers:
            layer = adapter.layers[path]
            exact = base[path].weight + adapter.scaling * (layer.b @ layer.a)
            assert torch.equal(linear.weight, exact.bfloat16().float()), path


@tied_and_not
def test_a_merged_base_is_promoted_as_a_base_model_and_loads_the_same(model_directory, tmp_path):
    engine = open_engine(model_directory, tmp_path, policy=LoraSpec(rank=4, alpha=8.0, seed=1))
    train(engine, "policy", seed=0)
    save(engine, "merged", "merged_base")
    result = promote(
        PromoteSpec(
            store_root=str(tmp_path),
            account="local",
            job="job-1",
            slot="policy",
            identity="merged",
            base_model_dir=str(model_directory),
            destination=str(tmp_path / "promoted"),
            result_file="",
        )
    )
    assert result.kind is CheckpointKind.BASE
    of_snapshot = row_by_row(hugging_face(snapshot(tmp_path, "merged")))
    promoted = row_by_row(hugging_face(tmp_path / "promoted"))
    assert promoted.tolist() == of_snapshot.tolist()


@tied_and_not
def test_a_deployment_of_the_base_serves_a_merged_base_and_goes_back(model_directory, tmp_path):
    engine = open_engine(model_directory, tmp_path, policy=LoraSpec(rank=4, alpha=8.0, seed=1))
    train(engine, "policy", seed=0)
    save(engine, "merged", "merged_base")
    directory = snapshot(tmp_path, "merged")
    tensors = read_model_directory(directory)
    served = ServedWeights(Identity("merged"), whole_digest(digest_tensors(tensors)))
    bench = open_bench(model_directory)
    asked = SequenceRequest(prompt(7, 7), 15, seed=1)
    for weights, source in (
        (WeightSet(served, CheckpointKind.BASE, tensors), directory),
        (bench.scheduler._network.base_weights(), model_directory),
    ):
        swap(bench, weights)
        _, recorder = bench.submit(asked)
        bench.run()
        assert worst(reference(source), asked, recorder) < 1e-4


@tied_and_not
def test_a_head_of_another_shape_is_refused_before_anything_changes(model_directory, tmp_path):
    network = EmbeddedNetwork(model_directory, max_running=2, max_context_length=64, threads=1)
    before = network.resident_weights().served.digest
    tensors = dict(network.base_weights().tensors)
    tensors["lm_head.weight"] = tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(InvalidArgument, match=r"lm_head\.weight"):
        network.install(WeightSet(ServedWeights(Identity("x"), ""), CheckpointKind.BASE, tensors))
    assert network.resident_weights().served.digest == before


@tied_and_not
def test_merging_leaves_the_slot_as_it_was_and_is_adopted_on_replay(model_directory, tmp_path):
    engine = open_engine(model_directory, tmp_path, policy=LoraSpec(rank=4, alpha=8.0, seed=1))
    train(engine, "policy", seed=0)
    adapter = save(engine, "adapter", "base")
    before = forward(engine, "policy")
    merged = save(engine, "merged", "merged_base")
    assert save(engine, "merged", "merged_base").digest == merged.digest
    assert forward(engine, "policy").tolist() == before.tolist()
    assert save(engine, "again", "base").digest == adapter.digest
    adopted = engine.adopt_snapshot(AdoptSnapshot("policy", "merged"))
    assert (adopted.kind, adopted.digest) == ("base", merged.digest)


@tied_and_not
def test_a_model_that_trains_all_parameters_has_nothing_to_merge(model_directory, tmp_path):
    engine = open_engine(model_directory, tmp_path)
    engine.open_slot(OpenSlot(slot="policy", kind=SlotKind.FULL))
    with pytest.raises(InvalidArgument, match="merged_base"):
        save(engine, "merged", "merged_base")


# peft -----------------------------------------------------------------------------------------


@pytest.fixture
def peft():
    """Its own warnings are not ours: that a tied head is adapted (it is meant to be), and what it
    still asks of transformers under an older name."""
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module


@tied_and_not
def test_peft_loads_our_export_with_equal_logits(model_directory, tmp_path, peft):
    engine = open_engine(model_directory, tmp_path, policy=LoraSpec(rank=4, alpha=8.0, seed=1))
    train(engine, "policy", seed=0)
    save(engine, "adapter", "base")
    base, directory = hugging_face(model_directory), str(snapshot(tmp_path, "adapter"))
    theirs = row_by_row(peft.PeftModel.from_pretrained(base, directory).eval())
    ours = forward(engine, "policy")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=PEFT_TOLERANCE)
    assert np.abs(row_by_row(hugging_face(model_directory)) - ours).max() > 0.5


@tied_and_not
def test_what_peft_saves_loads_here_with_equal_logits(model_directory, tmp_path, peft):
    """With what peft itself writes: short target names, and its own initial values."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False, lora_dropout=0.1
    )
    wrapped = peft.get_peft_model(hugging_face(model_directory), config).eval()
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    spec = LoraSpec(rank=3, alpha=7.0, train_mlp=False, train_unembed=False)
    engine = open_engine(model_directory, tmp_path, policy=spec)
    digest = read_adapter_directory(tmp_path / "theirs").digest
    engine.load_adapter(
        LoadAdapter(slot="policy", directory=str(tmp_path / "theirs"), digest=digest)
    )
    np.testing.assert_allclose(
        forward(engine, "policy"), row_by_row(wrapped), rtol=0, atol=PEFT_TOLERANCE
    )


@pytest.mark.parametrize("model_directory", [True], indirect=True, ids=["tied"])
def test_an_adapter_of_other_modules_is_refused_naming_both(model_directory, tmp_path):
    engine = open_engine(model_directory, tmp_path, policy=LoraSpec(rank=4, alpha=8.0, seed=1))
    save(engine, "all", "base")
    directory = snapshot(tmp_path, "all")
    digest = read_adapter_directory(directory).digest
    other = open_engine(
        model_directory, tmp_path / "other", policy=LoraSpec(rank=4, alpha=8.0, train_mlp=False)
    )
    with pytest.raises(InvalidArgument, match=r"22 modules, this model 13: .*mlp.down_proj"):
        other.load_adapter(LoadAdapter(slot="policy", directory=str(directory), digest=digest))


@pytest.mark.parametrize("option", ["use_dora", "use_rslora", "rank_pattern", "bias"])
def test_adapters_that_mean_something_else_are_refused_by_name(tmp_path, option):
    value = {"rank_pattern": {"q_proj": 2}, "bias": "all"}.get(option, True)
    config = {"r": 2, "lora_alpha": 4, option: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "adapter_model.safetensors", {})
    with pytest.raises(Unsupported, match=option):
        read_adapter_directory(tmp_path)


# Beside each other ----------------------------------------------------------------------------


def state_of(engine, slot: str) -> dict[str, bytes]:
    """Every bit of a slot: masters, moments, accumulated gradient."""
    files = engine._slots.get(slot).trainable().files()
    parts = {"masters": files.masters, "optimizer": files.optimizer, "gradient": files.gradient}
    return {
        f"{part}:{name}": tensor.data.tobytes()
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


TWO = {"one": LoraSpec(rank=4, alpha=8.0, seed=1), "two": LoraSpec(rank=2, alpha=32.0, seed=2)}


@pytest.mark.parametrize("model_directory", [True], indirect=True, ids=["tied"])
def test_an_idle_adapter_is_untouched_bit_for_bit_while_another_trains(model_directory, tmp_path):
    engine = open_engine(model_directory, tmp_path, **TWO)
    train(engine, "two", seed=50, steps=1)
    backward(engine, "two", seed=51)  # a gradient that waits for its step
    before, logprobs = state_of(engine, "two"), forward(engine, "two")
    train(engine, "one", seed=0, steps=3)
    save(engine, "merged", "merged_base", slot="one")
    assert state_of(engine, "two") == before
    assert forward(engine, "two").tolist() == logprobs.tolist()
    assert any(key.startswith("gradient:") for key in before)


@pytest.mark.parametrize("model_directory", [True], indirect=True, ids=["tied"])
def test_each_adapter_ends_bit_for_bit_as_if_it_had_been_alone(model_directory, tmp_path):
    """In passes of their own nothing could differ: the tolerance is 0. Packed: test_packed_adapters.py."""
    together = open_engine(model_directory, tmp_path / "together", **TWO)
    for round_ in range(3):
        for slot, seed in (("one", 0), ("two", 70)):
            train(together, slot, seed + round_, steps=1)
    for slot, seed in (("one", 0), ("two", 70)):
        alone = open_engine(model_directory, tmp_path / slot, **{slot: TWO[slot]})
        train(alone, slot, seed, steps=3)
        assert state_of(alone, slot) == state_of(together, slot)
