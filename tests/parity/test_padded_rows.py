"""Training on models whose layers carry state between tokens, against transformers' own forward.

Rows longer than the windows and the chunks of the scans, weights of unit gain; the noise floor is
transformers against itself: a padded batch against one row at a time.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from homefire.model import padded
from homefire.model.attention import ATTENTION
from homefire.model.layout import RowLayout
from homefire.model.loading import LoadedModel
from homefire.model.lora import new_adapter
from homefire.model.packed import packed_hidden, target_logprobs
from homefire.model.packed_lora import reaches_segments
from homefire.trainer.engine.ranks.opening import TorchJoining
from homefire.trainer.engine.ranks.rank_group import RankPlace
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
)
from homefire.wire.errors import Unsupported
from parity.random_decoders import HYBRID, VOCABULARY, load, random_decoder, saved

torch.set_num_threads(1)
LENGTHS = [9, 23, 4, 30, 24, 14]
"""Batches of one, two and three rows."""
TOLERANCE = 3e-5
"""Nats; measured up to 1e-5 where the floor is up to 7e-6."""
GRADIENT_TOLERANCE = 1e-4
"""Of a parameter's largest gradient; measured up to 2e-5 (Qwen3-Next)."""
QUICK = ("qwen3_5", "falcon_h1", "lfm2")
"""A gated delta net, a Mamba mixer beside attention, and a short convolution without a state space."""
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in HYBRID]

Gradients = dict[str, torch.Tensor]


@pytest.fixture
def hybrid(tmp_path, request):
    return load(saved(random_decoder(request.param), tmp_path / "model"))


every_hybrid = pytest.mark.parametrize("hybrid", NAMES, indirect=True)
one_hybrid = pytest.mark.parametrize("hybrid", ["lfm2"], indirect=True)


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def targets() -> torch.Tensor:
    return torch.cat(rows()).roll(-1)


def ours(model: LoadedModel) -> torch.Tensor:
    hidden = packed_hidden(model, torch.cat(rows()), LENGTHS)
    return target_logprobs(hidden, model.logits_head, targets())


def gathered(logits: list[torch.Tensor]) -> torch.Tensor:
    flat = torch.cat(logits).log_softmax(-1)
    return flat.gather(-1, targets()[:, None])[:, 0]


def with_own_attention(model: LoadedModel, run):
    model.module.set_attn_implementation("eager")
    try:
        return run(model.module)
    finally:
        model.module.set_attn_implementation(ATTENTION)


def row_by_row(model: LoadedModel) -> torch.Tensor:
    return with_own_attention(
        model,
        lambda module: gathered(
            [module(input_ids=row[None], use_cache=False).logits[0] for row in rows()]
        ),
    )


def in_one_batch(model: LoadedModel) -> torch.Tensor:
    """What a padded training loop computes."""
    tokens = pad_sequence(rows(), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows()], batch_first=True)
    logits = with_own_attention(
        model,
        lambda module: module(input_ids=tokens, attention_mask=mask, use_cache=False).logits,
    )
    return gathered([row[:length] for row, length in zip(logits, LENGTHS, strict=True)])


def gradients(model: LoadedModel, logprobs: torch.Tensor) -> Gradients:
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(4))
    model.module.zero_grad(set_to_none=True)
    (logprobs * weights).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.module.named_parameters()
        if parameter.grad is not None
    }


def worst_gradient(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(
        float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), 1e-3 * scale)
        for name, gradient in expected.items()
    )


@every_hybrid
def test_logprobs_and_gradients_are_those_of_each_row_alone(hybrid):
    assert hybrid.layout is RowLayout.PADDED
    expected, found = row_by_row(hybrid), ours(hybrid)
    floor = float((in_one_batch(hybrid) - expected).detach().abs().max())
    error = float((found - expected).detach().abs().max())
    gradient_error = worst_gradient(gradients(hybrid, found), gradients(hybrid, expected))
    print(
        f"{hybrid.architecture}: floor {floor:.1e}, error {error:.1e}, gradients {gradient_error:.1e}"
    )
    assert floor <= TOLERANCE
    assert error <= TOLERANCE
    assert gradient_error <= GRADIENT_TOLERANCE


@torch.no_grad()
@every_hybrid
def test_packing_such_a_model_would_show(hybrid):
    """The planted mistake: state runs on from one row into the next."""
    packed = replace(hybrid, layout=RowLayout.PACKED)
    assert float((ours(packed) - row_by_row(hybrid)).abs().max()) > 1.0


@torch.no_grad()
@one_hybrid
def test_padding_on_the_left_would_show(hybrid, monkeypatch):
    def on_the_left(sequences, batch_first):
        return pad_sequence(sequences, batch_first, padding_side="left")

    monkeypatch.setattr(padded, "pad_sequence", on_the_left)
    assert float((ours(hybrid) - row_by_row(hybrid)).abs().max()) > 1.0


def test_rows_of_very_different_lengths_do_not_share_a_batch():
    assert padded.batches([9, 30, 8]) == [[1], [0, 2]]
    assert padded.batches([5, 5, 5]) == [[0, 1, 2]]
    assert padded.batches([100, 75, 74]) == [[0, 1], [2]]


@one_hybrid
def test_adapters_of_several_slots_do_not_share_a_pass(hybrid):
    """Their segments are of packed tokens, which padded rows are not."""
    assert not reaches_segments(hybrid, new_adapter(hybrid, rank=2))


# Through the trainer's engine -----------------------------------------------------------------

PLAN = ExecutionPlan(micro_batches=[[1, 3], [0, 2, 4, 5]], threads=1)


@pytest.fixture
def bfloat16_directory(tmp_path) -> Path:
    """Of values that the serving dtype holds, so that loading rounds nothing."""
    return saved(random_decoder("qwen3_5").bfloat16().float(), tmp_path / "model")


def open_model(directory: Path, store: Path) -> OpenModel:
    return OpenModel(
        model_dir=str(directory),
        base_model="hybrid",
        store_root=str(store),
        account="local",
        job="job-1",
        threads=1,
        max_context_length=64,
    )


def open_engine(directory: Path, store: Path):
    engine = torch_engine()
    engine.open_model(open_model(directory, store))
    return engine


def batch() -> dict[str, np.ndarray]:
    return {
        "tokens": torch.cat(rows()).numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": targets().numpy()[:, None],
    }


def forward(engine, slot: str) -> np.ndarray:
    request = Forward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
    return engine.forward(request, batch())[1]["logprobs"][:, 0]


def train(engine, slot: str) -> None:
    request = ForwardBackward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
    engine.forward_backward(request, batch())
    engine.optim_step(OptimStep(slot=slot, adam=AdamParams(learning_rate=1e-2)))


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_an_engine_trains_such_a_model_from_its_own_logprobs(kind, bfloat16_directory, tmp_path):
    engine = open_engine(bfloat16_directory, tmp_path / "store")
    lora = LoraSpec(rank=4, alpha=8.0, seed=1) if kind is SlotKind.LORA else None
    engine.open_slot(OpenSlot(slot="policy", kind=kind, lora=lora))
    before = forward(engine, "policy")
    with torch.no_grad():
        expected = row_by_row(load(bfloat16_directory)).numpy()
    np.testing.assert_allclose(before, expected, rtol=0, atol=TOLERANCE)
    for _ in range(3):
        train(engine, "policy")
    assert forward(engine, "policy").mean() > before.mean() + 0.5


def test_several_ranks_refuse_such_a_model_by_name(bfloat16_directory, tmp_path):
    """Each of them, once it has read its part and looked."""
    joining = TorchJoining(RankPlace(rank=0, num_ranks=1, rendezvous=tmp_path / "ranks"))
    joining.load(open_model(bfloat16_directory, tmp_path / "store"))
    try:
        with pytest.raises(Unsupported, match="carries state between tokens"):
            joining.join()
    finally:
        torch.distributed.destroy_process_group()
