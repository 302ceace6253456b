from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.front.creation import plan_creation
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.operations import CreateHandle
from homefire.trainer.front.sessions import Ledger
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
        spec = {k: request.pop(k) for k in ("mode", "lora_rank") if k in request}
        ledger = Ledger(Futures(ManualClock()))
        ledger.lora = live
        fields = {"base_model": "tiny", "lora_config": lora or LoraConfig(rank=rank), **request}
        asked = CreateModel(session_id="s", model_seq_id=0, **fields)
        return plan_creation(asked, make_spec(**spec), ledger)

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
