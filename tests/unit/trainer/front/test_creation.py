from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.front.creation import plan_creation
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.operations import CreateHandle
from homefire.trainer.front.records import Handle, Seen
from homefire.trainer.front.sessions import Ledger
from homefire.trainer.front.slot_policy import slot_policy
from homefire.wire.engine import LoraSpec, SlotKind
from homefire.wire.errors import InvalidArgument, UnknownModel, Unsupported
from homefire.wire.specs import TrainerMode, TrainerSpec
from homefire.wire.tinker import CreateModel, LoraConfig, OptimizerConfig


@pytest.fixture
def plan(make_spec: Callable[..., TrainerSpec]) -> Callable[..., CreateHandle]:
    def make(
        *,
        rank: int = 0,
        live: LoraSpec | None = None,
        lora: LoraConfig | None = None,
        **request: Any,
    ) -> CreateHandle:
        spec = {k: request.pop(k) for k in ("mode", "lora_rank", "pooled") if k in request}
        ledger = Ledger(Futures(ManualClock()))
        if live is not None:
            ledger.handles["live"] = Handle(
                model_id="live",
                session_id="s-live",
                slot="policy",
                kind=SlotKind.LORA,
                lora=live,
                created_by=Seen("r", "d"),
            )
        job = make_spec(**spec)
        fields = {"base_model": "tiny", "lora_config": lora or LoraConfig(rank=rank), **request}
        asked = CreateModel(session_id="s", **{"model_seq_id": 0, **fields})
        return plan_creation(asked, job, slot_policy(job, ledger))

    return make


def test_a_full_parameter_job_gives_its_policy_slot(plan: Callable[..., CreateHandle]) -> None:
    created = plan()
    assert (created.slot, created.kind, created.lora) == ("policy", SlotKind.FULL, None)


@pytest.mark.parametrize(
    "asked",
    [{"base_only": True}, {"user_metadata": {"homefire.base_only": "true"}}],
)
def test_base_only_gives_the_reference_slot_however_it_is_asked(
    plan: Callable[..., CreateHandle], asked: dict[str, Any]
) -> None:
    assert plan(**asked).kind is SlotKind.REFERENCE


def test_a_forward_only_job_gives_references_only(plan: Callable[..., CreateHandle]) -> None:
    assert plan(mode=TrainerMode.FORWARD_ONLY).slot == "reference"


@pytest.mark.parametrize(
    ("asked", "init"), [(None, "kaiming"), ("kaiming", "kaiming"), ("nora", "nora")]
)
def test_an_adapter_begins_as_its_init_method_says(
    plan: Callable[..., CreateHandle], asked: str | None, init: str
) -> None:
    created = plan(mode=TrainerMode.LORA, lora=LoraConfig(rank=8, init_method=asked))
    assert created.lora is not None
    assert created.lora.init == init


def test_an_unknown_init_method_names_the_known_ones(plan: Callable[..., CreateHandle]) -> None:
    with pytest.raises(InvalidArgument, match=r"'pissa' is unknown.*kaiming or nora"):
        plan(mode=TrainerMode.LORA, lora=LoraConfig(rank=8, init_method="pissa"))


def test_a_projection_head_is_refused_by_name(plan: Callable[..., CreateHandle]) -> None:
    with pytest.raises(Unsupported, match="projection_head_dim 64"):
        plan(projection_head_dim=64)
    assert plan(projection_head_dim=0).slot == "policy"


def test_the_first_adapter_is_fixed_and_seeded_the_same_each_time(
    plan: Callable[..., CreateHandle],
) -> None:
    first, again = plan(mode=TrainerMode.LORA, rank=8), plan(mode=TrainerMode.LORA, rank=8)
    assert first.lora == again.lora
    assert first.lora is not None
    assert first.lora.seed is not None
    later = plan(mode=TrainerMode.LORA, lora=LoraConfig(rank=8, seed=99), live=first.lora)
    assert later.lora == first.lora


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"base_model": "other"}, UnknownModel, "trains tiny, not 'other'"),
        ({"rank": 8}, InvalidArgument, "8.*trains all parameters"),
        ({"mode": TrainerMode.LORA, "rank": 0}, InvalidArgument, "0.*an adapter"),
        ({"mode": TrainerMode.LORA, "lora_rank": 4, "rank": 8}, InvalidArgument, "8.*up to 4"),
        (
            {"mode": TrainerMode.LORA, "rank": 8, "live": LoraSpec(rank=4)},
            InvalidArgument,
            "is 8, this job's live adapter has 4",
        ),
        ({"optimizer_config": OptimizerConfig("dimuon")}, Unsupported, "dimuon"),
        (
            {
                "mode": TrainerMode.LORA,
                "lora": LoraConfig(train_attn=False, train_mlp=False, train_unembed=False),
            },
            InvalidArgument,
            "trains nothing",
        ),
        ({"mode": TrainerMode.LORA, "pooled": True, "rank": 257}, InvalidArgument, "up to 256"),
        ({"pooled": True, "rank": 8}, InvalidArgument, "8.*trains all parameters"),
    ],
)
def test_a_mismatch_names_what_was_asked_and_what_the_job_is(
    plan: Callable[..., CreateHandle],
    request_: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        plan(**request_)


def test_a_pooled_model_gets_a_slot_and_a_seed_of_its_own_whatever_lives_beside_it(
    plan: Callable[..., CreateHandle],
) -> None:
    live = LoraSpec(rank=4)
    first = plan(pooled=True, mode=TrainerMode.LORA, rank=8, live=live, base_model="any/name")
    assert (first.slot, first.base_model) == ("s:train:0", "any/name")
    assert first.lora is not None
    assert first.lora.rank == 8
    again = plan(pooled=True, mode=TrainerMode.LORA, rank=8)
    assert again.lora == first.lora
    other = plan(pooled=True, mode=TrainerMode.LORA, rank=8, model_seq_id=1)
    assert other.lora is not None
    assert other.lora.seed != first.lora.seed


def test_a_pools_references_share_the_frozen_base(plan: Callable[..., CreateHandle]) -> None:
    created = plan(pooled=True, mode=TrainerMode.LORA, rank=8, base_only=True)
    assert (created.slot, created.lora) == ("reference", None)
