"""Rows and manifests as the Tinker protocol's management calls answer them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from homefire.control.db.rows import TinkerSessionRow
from homefire.control.tinker.listing import RunView, SessionView
from homefire.control.tinker.search import status_of
from homefire.foundation.clock import rfc3339
from homefire.wire.checkpoint_paths import CheckpointPath
from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.tinker_rest import (
    Checkpoint,
    Session,
    SessionSummary,
    TrainingRun,
    WeightsDescription,
)

_TYPES = {
    CheckpointFamily.STATE: "training",
    CheckpointFamily.SAMPLER: "sampler",
    CheckpointFamily.EXTERNAL: "external",
}


def checkpoint(manifest: Manifest) -> Checkpoint:
    """A run's slot is called as the run."""
    path = CheckpointPath(manifest.slot, manifest.family, manifest.identity)
    expires = manifest.expires_at
    return Checkpoint(
        checkpoint_id=path.checkpoint_id,
        checkpoint_type=_TYPES[manifest.family],
        time=rfc3339(manifest.created_at),
        tinker_path=str(path),
        size_bytes=manifest.size_bytes,
        public=manifest.public,
        user_metadata=manifest.metadata or None,
        expires_at=None if expires is None else rfc3339(expires),
    )


def training_run(view: RunView) -> TrainingRun:
    row = view.row
    return TrainingRun(
        training_run_id=row.id,
        base_model=row.base_model,
        model_owner=row.account,
        is_lora=row.lora_rank > 0,
        lora_rank=row.lora_rank or None,
        corrupted=view.corrupted,
        last_request_time=rfc3339(view.last_request_at),
        last_checkpoint=None if view.last_state is None else checkpoint(view.last_state),
        last_sampler_checkpoint=None
        if view.last_snapshot is None
        else checkpoint(view.last_snapshot),
        user_metadata=row.user_metadata or None,
    )


def session(view: SessionView) -> Session:
    return Session(
        training_run_ids=[run.id for run in view.runs],
        sampler_ids=[sampler.id for sampler in view.samplers],
        user_metadata=text_metadata(view.row.user_metadata),
        display_name=view.row.display_name,
    )


def session_summary(
    row: TinkerSessionRow, manifests: Sequence[Manifest], *, now: float
) -> SessionSummary:
    return SessionSummary(
        session_id=row.id,
        created_at=rfc3339(row.created_at),
        owner=row.account,
        project_id=row.project_id or "",
        status=status_of(row, now=now),
        checkpoints_count=len(manifests),
        display_name=row.display_name,
        user_metadata=text_metadata(row.user_metadata),
        checkpoint_storage_bytes=sum(m.size_bytes for m in manifests),
    )


def text_metadata(metadata: Mapping[str, object]) -> dict[str, str] | None:
    """Clients validate values as text."""
    return {key: str(value) for key, value in metadata.items()} or None


def weights_description(manifest: Manifest, *, base_model: str) -> WeightsDescription:
    lora = manifest.lora
    if lora is None:
        # Releases of tinker before 0.38 create the run again with this rank; 0 trains all parameters.
        return WeightsDescription(base_model=base_model, is_lora=False, lora_rank=0)
    return WeightsDescription(
        base_model=base_model,
        is_lora=True,
        lora_rank=lora.rank,
        train_unembed=lora.train_unembed,
        train_mlp=lora.train_mlp,
        train_attn=lora.train_attn,
    )
