"""How the models of a job share its weights: which slot a model gets, and which adapter.

Dedicated: one policy slot per job. `create_model` gives a new handle at the live weights and fences
the old one, so a later model asks for the adapter that is there. Sessions are this trainer's.
Pooled: every model has a slot of its own, named after it, with the adapter that it asked for; the
slot is closed with the model. Sessions are the control plane's.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Protocol

from homefire.trainer.front.operations import UnloadHandle
from homefire.trainer.front.records import Handle
from homefire.trainer.front.sessions import Ledger
from homefire.wire.checkpoint_paths import CheckpointPath
from homefire.wire.engine import LoraInit, LoraSpec, SlotKind
from homefire.wire.errors import (
    InvalidArgument,
    NotFound,
    TooManyModels,
    UnknownModel,
    Unsupported,
)
from homefire.wire.ids import POLICY_SLOT, check_name, session_prefix
from homefire.wire.manifest import CheckpointFamily
from homefire.wire.specs import TrainerSpec
from homefire.wire.tinker import LoraConfig

REFERENCE_SLOT = "reference"
"""The frozen base, which any number of models share."""
DEFAULT_RANK = 32
DEFAULT_ALPHA = 32.0
MAX_POOLED_RANK = 256


class SlotPolicy(Protocol):
    """Decides; changes nothing. What it decides is journaled with the operation."""

    def new_session_id(self) -> str: ...

    def check_session(self, session_id: str) -> None:
        """NotFound for a session that may not be used here."""
        ...

    def check_base_model(self, asked: str) -> None: ...

    def slot(self, model: str, kind: SlotKind) -> str: ...

    def adapter(self, model: str, config: LoraConfig | None) -> LoraSpec:
        """The adapter of a new model; InvalidArgument for one that it cannot have."""
        ...

    def check_room(self, kind: SlotKind, *, num_arriving: int) -> None:
        """TooManyModels when no further model fits beside those on their way."""
        ...

    def unload(self, handle: Handle) -> UnloadHandle: ...

    def ends_with_session(self, session_id: str) -> list[Handle]:
        """The handles that a finished session leaves behind for nobody."""
        ...

    def path(self, slot: str, family: CheckpointFamily, name: str) -> str:
        """What clients call a checkpoint."""
        ...


def slot_policy(spec: TrainerSpec, ledger: Ledger) -> SlotPolicy:
    return PooledSlots(spec, ledger) if spec.pooled else DedicatedSlots(spec, ledger)


class DedicatedSlots:
    """Implements `SlotPolicy` for a job with one policy slot."""

    def __init__(self, spec: TrainerSpec, ledger: Ledger) -> None:
        self._spec = spec
        self._ledger = ledger

    def new_session_id(self) -> str:
        return f"{session_prefix(self._spec.job)}{secrets.token_hex(8)}"

    def check_session(self, session_id: str) -> None:
        if session_id not in self._ledger.sessions:
            raise NotFound(
                f"no session {session_id!r}",
                hint="create one with create_session",
                field="session_id",
            )

    def check_base_model(self, asked: str) -> None:
        spec = self._spec
        if asked not in {spec.base_model, spec.tokenizer_id, spec.model_dir}:
            raise UnknownModel(
                f"this job trains {spec.base_model}, not {asked!r}",
                hint="create a trainer job of that base model",
                field="base_model",
            )

    def slot(self, model: str, kind: SlotKind) -> str:
        return REFERENCE_SLOT if kind is SlotKind.REFERENCE else POLICY_SLOT

    def adapter(self, model: str, config: LoraConfig | None) -> LoraSpec:
        spec, live = self._spec, self._ledger.adapter(POLICY_SLOT)
        if config is None and live is not None:
            return live
        asked = adapter_of(
            config or LoraConfig(rank=spec.lora_rank or DEFAULT_RANK),
            max_rank=spec.lora_rank,
            default_seed=_seed_of(spec.job),
        )
        return asked if live is None else _same_adapter(asked, live)

    def check_room(self, kind: SlotKind, *, num_arriving: int) -> None:
        """Handles on one slot cost nothing."""

    def unload(self, handle: Handle) -> UnloadHandle:
        return UnloadHandle()

    def ends_with_session(self, session_id: str) -> list[Handle]:
        """The weights outlive their client."""
        return []

    def path(self, slot: str, family: CheckpointFamily, name: str) -> str:
        """The bare name: what the clients of dedicated jobs hot-load and load."""
        return name


class PooledSlots:
    """Implements `SlotPolicy` for a trainer of the root plane."""

    def __init__(self, spec: TrainerSpec, ledger: Ledger) -> None:
        self._spec = spec
        self._ledger = ledger

    def new_session_id(self) -> str:
        raise Unsupported(
            f"{self._spec.job} is a pooled trainer: its sessions are the control plane's",
            hint="call create_session at the server's root",
        )

    def check_session(self, session_id: str) -> None:
        """The gateway and control vouch for it; here it becomes part of names."""
        check_name(session_id, field="session_id")

    def check_base_model(self, asked: str) -> None:
        """Control has resolved it to this job."""

    def slot(self, model: str, kind: SlotKind) -> str:
        if kind is SlotKind.REFERENCE:
            return REFERENCE_SLOT
        return check_name(model, field="session_id")

    def adapter(self, model: str, config: LoraConfig | None) -> LoraSpec:
        return adapter_of(
            config or LoraConfig(rank=DEFAULT_RANK),
            max_rank=self._spec.lora_rank or MAX_POOLED_RANK,
            default_seed=_seed_of(model),
        )

    def check_room(self, kind: SlotKind, *, num_arriving: int) -> None:
        """References are the base itself, and take none. A full-parameter run's job is its own."""
        is_full = kind is SlotKind.FULL
        limit = 1 if is_full else self._spec.max_open_models
        if kind is not SlotKind.REFERENCE and len(self._open()) + num_arriving >= limit:
            raise TooManyModels(
                f"{self._spec.job} holds {limit} open models, which is its limit",
                hint="finish sessions that are over (ServiceClient.close, or `homefire session finish`"
                " for one whose client is gone: `homefire status` shows which); what they saved stays",
            )

    def unload(self, handle: Handle) -> UnloadHandle:
        return UnloadHandle(closes_slot=handle.kind is not SlotKind.REFERENCE)

    def ends_with_session(self, session_id: str) -> list[Handle]:
        return [handle for handle in self._open() if handle.session_id == session_id]

    def path(self, slot: str, family: CheckpointFamily, name: str) -> str:
        return str(CheckpointPath(slot, family, name))

    def _open(self) -> list[Handle]:
        """Handles with weights of their own in memory, or soon."""
        return [
            handle
            for handle in self._ledger.handles.values()
            if handle.kind is not SlotKind.REFERENCE and not handle.unloaded and not handle.failure
        ]


def adapter_of(config: LoraConfig, *, max_rank: int, default_seed: int) -> LoraSpec:
    """`max_rank` 0: any."""
    if config.rank <= 0:
        raise rank_mismatch(config.rank, "trains an adapter")
    if max_rank and config.rank > max_rank:
        raise rank_mismatch(config.rank, f"allows ranks up to {max_rank}")
    trained = [config.train_attn, config.train_mlp, config.train_unembed]
    if all(flag is False for flag in trained):
        raise InvalidArgument(
            "lora_config trains nothing",
            hint="set at least one of train_attn, train_mlp, train_unembed",
            field="lora_config",
        )
    return LoraSpec(
        rank=config.rank,
        alpha=config.alpha if config.alpha is not None else DEFAULT_ALPHA,
        seed=config.seed if config.seed is not None else default_seed,
        train_attn=config.train_attn is not False,
        train_mlp=config.train_mlp is not False,
        train_unembed=config.train_unembed is not False,
        init=_init_of(config),
    )


def _init_of(config: LoraConfig) -> LoraInit:
    try:
        return LoraInit(config.init_method or LoraInit.KAIMING)
    except ValueError as exc:
        raise InvalidArgument(
            f"lora_config.init_method {config.init_method!r} is unknown",
            hint=f"use {' or '.join(LoraInit)}",
            field="lora_config.init_method",
        ) from exc


def rank_mismatch(asked: int, what: str) -> InvalidArgument:
    return InvalidArgument(
        f"lora_config.rank is {asked}, but this job {what}",
        hint="ask for the job's rank, or create another trainer job",
        field="lora_config.rank",
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


def _seed_of(name: str) -> int:
    """Fixed, so that replay from nothing begins with the same adapter."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
