"""What a new model is: which slot, which kind of weights, which adapter. Or why it cannot be."""

from __future__ import annotations

from homefire.trainer.front.operations import (
    BASE_ONLY_KEY,
    OWN_PASSES_KEY,
    CreateHandle,
    LoadTrainState,
    text_metadata,
)
from homefire.trainer.front.slot_policy import SlotPolicy, rank_mismatch
from homefire.wire.engine import LoraSpec, SlotKind
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.ids import model_id
from homefire.wire.manifest import Manifest
from homefire.wire.specs import TrainerMode, TrainerSpec
from homefire.wire.tinker import CreateModel, LoadWeights, LoraConfig


def plan_creation(request: CreateModel, spec: TrainerSpec, policy: SlotPolicy) -> CreateHandle:
    """Raises UnknownModel, InvalidArgument or Unsupported; nothing is fenced then."""
    policy.check_base_model(request.base_model)
    _check_features(request)
    metadata = text_metadata(request.user_metadata)
    base_only = request.base_only or metadata.get(BASE_ONLY_KEY, "").lower() == "true"
    reference = base_only or spec.mode is TrainerMode.FORWARD_ONLY
    kind = SlotKind.REFERENCE if reference else _trained_kind(spec)
    model = model_id(request.session_id, request.model_seq_id)
    return CreateHandle(
        session_id=request.session_id,
        model_seq_id=request.model_seq_id,
        slot=policy.slot(model, kind),
        kind=kind,
        lora=None if reference else _adapter(model, request.lora_config, spec, policy),
        base_model=request.base_model,
        metadata=metadata,
    )


def plan_creation_from_state(
    request: LoadWeights, manifest: Manifest, spec: TrainerSpec, policy: SlotPolicy
) -> CreateHandle:
    """The adapter's shape comes from the state that will be loaded."""
    if request.base_model:
        policy.check_base_model(request.base_model)
    _check_features(request)
    if spec.mode is TrainerMode.FORWARD_ONLY:
        raise InvalidArgument("this job only runs forward: it loads no state", field="path")
    session, number = request.session_id or "", request.model_seq_id or 0
    model, kind = model_id(session, number), _trained_kind(spec)
    _check_kind(manifest, kind, request.path)
    return CreateHandle(
        session_id=session,
        model_seq_id=number,
        slot=policy.slot(model, kind),
        kind=kind,
        lora=_adapter(model, _lora_config_of(manifest), spec, policy),
        load=LoadTrainState(request.path, bool(request.optimizer)),
        base_model=request.base_model or spec.base_model,
        metadata=text_metadata(request.user_metadata),
    )


def _check_features(request: CreateModel | LoadWeights) -> None:
    config = request.optimizer_config
    if config is not None and config.type != "adamw":
        raise Unsupported(
            f"optimizer {config.type!r} is not supported",
            hint="use adamw",
            field="optimizer_config",
        )
    own_passes = text_metadata(request.user_metadata).get(OWN_PASSES_KEY, "false")
    if own_passes.lower() not in {"true", "false"}:
        raise InvalidArgument(
            f"user_metadata {OWN_PASSES_KEY!r} is {own_passes!r}",
            hint="use 'true' for results that do not depend on other models of the server, or leave it out",
            field="user_metadata",
        )
    if request.projection_head_dim:
        raise Unsupported(
            f"projection_head_dim {request.projection_head_dim}: models have no projection head here",
            hint="use embeddings and project in your own loss",
            field="projection_head_dim",
        )


def _check_kind(manifest: Manifest, kind: SlotKind, path: str) -> None:
    if (manifest.lora is not None) != (kind is SlotKind.LORA):
        found = (
            f"a LoRA adapter of rank {manifest.lora.rank}" if manifest.lora else "all parameters"
        )
        wanted = "LoRA adapters" if kind is SlotKind.LORA else "all parameters"
        raise InvalidArgument(
            f"state {path!r} holds {found}, this job trains {wanted}",
            hint="load it where the same kind is trained",
            field="path",
        )


def _trained_kind(spec: TrainerSpec) -> SlotKind:
    return SlotKind.FULL if spec.mode is TrainerMode.FULL else SlotKind.LORA


def _adapter(
    model: str, config: LoraConfig | None, spec: TrainerSpec, policy: SlotPolicy
) -> LoraSpec | None:
    if spec.mode is TrainerMode.LORA:
        return policy.adapter(model, config)
    if config is not None and config.rank > 0:
        raise rank_mismatch(config.rank, "trains all parameters (lora_rank 0)")
    return None


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
