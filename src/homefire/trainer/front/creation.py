"""Which slot a new model becomes a handle on, and whether it may.

A job has one base model and one kind of policy; the first model of a LoRA job fixes its adapter.
"""

from __future__ import annotations

import hashlib

from homefire.trainer.front.operations import (
    BASE_ONLY_KEY,
    CreateHandle,
    LoadTrainState,
    text_metadata,
)
from homefire.trainer.front.sessions import POLICY_SLOT, REFERENCE_SLOT, Ledger
from homefire.wire.engine import LoraSpec, SlotKind
from homefire.wire.errors import InvalidArgument, UnknownModel, Unsupported
from homefire.wire.manifest import Manifest
from homefire.wire.specs import TrainerMode, TrainerSpec
from homefire.wire.tinker import CreateModel, LoadWeights, LoraConfig, OptimizerConfig

_DEFAULT_RANK = 32


def plan_creation(request: CreateModel, spec: TrainerSpec, ledger: Ledger) -> CreateHandle:
    """Raises UnknownModel, InvalidArgument or Unsupported; nothing is fenced then."""
    _check_base_model(request.base_model, spec)
    _check_optimizer(request.optimizer_config)
    metadata = text_metadata(request.user_metadata)
    base_only = request.base_only or metadata.get(BASE_ONLY_KEY, "").lower() == "true"
    reference = base_only or spec.mode is TrainerMode.FORWARD_ONLY
    lora = None if reference else _policy_lora(request.lora_config, spec, ledger)
    return CreateHandle(
        session_id=request.session_id,
        model_seq_id=request.model_seq_id,
        slot=REFERENCE_SLOT if reference else POLICY_SLOT,
        kind=SlotKind.REFERENCE if reference else _policy_kind(spec),
        lora=lora,
        metadata=metadata,
    )


def plan_creation_from_state(
    request: LoadWeights, manifest: Manifest, spec: TrainerSpec, ledger: Ledger
) -> CreateHandle:
    """The adapter's shape comes from the job, or else from the state that will be loaded."""
    if request.base_model:
        _check_base_model(request.base_model, spec)
    _check_optimizer(request.optimizer_config)
    if spec.mode is TrainerMode.FORWARD_ONLY:
        raise InvalidArgument("this job only runs forward: it loads no state", field="path")
    config = _lora_config_of(manifest) if ledger.lora is None else None
    return CreateHandle(
        session_id=request.session_id or "",
        model_seq_id=request.model_seq_id or 0,
        slot=POLICY_SLOT,
        kind=_policy_kind(spec),
        lora=_policy_lora(config, spec, ledger),
        load=LoadTrainState(request.path, bool(request.optimizer)),
        metadata=text_metadata(request.user_metadata),
    )


def _check_base_model(asked: str, spec: TrainerSpec) -> None:
    if asked not in {spec.base_model, spec.tokenizer_id, spec.model_dir}:
        raise UnknownModel(
            f"this job trains {spec.base_model}, not {asked!r}",
            hint="create a trainer job of that base model",
            field="base_model",
        )


def _check_optimizer(config: OptimizerConfig | None) -> None:
    if config is not None and config.type != "adamw":
        raise Unsupported(
            f"optimizer {config.type!r} is not supported",
            hint="use adamw",
            field="optimizer_config",
        )


def _policy_kind(spec: TrainerSpec) -> SlotKind:
    return SlotKind.FULL if spec.mode is TrainerMode.FULL else SlotKind.LORA


def _policy_lora(config: LoraConfig | None, spec: TrainerSpec, ledger: Ledger) -> LoraSpec | None:
    if spec.mode is TrainerMode.FULL:
        if config is not None and config.rank > 0:
            raise _rank_mismatch(config.rank, "trains all parameters (lora_rank 0)")
        return None
    if config is None and ledger.lora is not None:
        return ledger.lora
    asked = _lora_spec(config or LoraConfig(rank=spec.lora_rank or _DEFAULT_RANK), spec)
    return _same_adapter(asked, ledger.lora) if ledger.lora is not None else asked


def _lora_spec(config: LoraConfig, spec: TrainerSpec) -> LoraSpec:
    if config.rank <= 0:
        raise _rank_mismatch(config.rank, "trains an adapter")
    if spec.lora_rank and config.rank > spec.lora_rank:
        raise _rank_mismatch(config.rank, f"allows ranks up to {spec.lora_rank}")
    return LoraSpec(
        rank=config.rank,
        alpha=config.alpha if config.alpha is not None else 32.0,
        seed=config.seed if config.seed is not None else _seed_of(spec.job),
        train_attn=config.train_attn is not False,
        train_mlp=config.train_mlp is not False,
        train_unembed=config.train_unembed is not False,
    )


def _same_adapter(asked: LoraSpec, live: LoraSpec) -> LoraSpec:
    """The live adapter, if that is what was asked for; its seed has had its effect."""
    for name in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed"):
        wanted, found = getattr(asked, name), getattr(live, name)
        if wanted != found:
            raise InvalidArgument(
                f"lora_config.{name} is {wanted}, this job's live adapter has {found}",
                hint="ask for the same adapter, or create another trainer job",
                field=f"lora_config.{name}",
            )
    return live


def _seed_of(job: str) -> int:
    """Fixed per job, so that replay from nothing begins with the same adapter."""
    return int.from_bytes(hashlib.sha256(job.encode()).digest()[:4])


def _lora_config_of(manifest: Manifest) -> LoraConfig | None:
    lora = manifest.lora
    if lora is None:
        return None
    return LoraConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        seed=lora.seed,
        train_unembed=lora.train_unembed,
        train_mlp=lora.train_mlp,
        train_attn=lora.train_attn,
    )


def _rank_mismatch(asked: int, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"lora_config.rank is {asked}, but this job {what}",
        hint="ask for the job's rank, or create another trainer job",
        field="lora_config.rank",
    )
