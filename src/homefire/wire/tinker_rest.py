"""Answers and bodies of the Tinker protocol's management calls, field by field as its clients
validate them.

Times are RFC 3339. Fields that clients of some version do not know are ignored by them.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Cursor(msgspec.Struct, frozen=True):
    offset: int
    limit: int
    total_count: int


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Example: Checkpoint(checkpoint_id="weights/step-40", checkpoint_type="training", …)."""

    checkpoint_id: str
    checkpoint_type: str
    """`training`, `sampler` or `external`."""
    time: str
    tinker_path: str
    size_bytes: int
    public: bool
    user_metadata: dict[str, str] | None = None
    expires_at: str | None = None


class CheckpointList(msgspec.Struct, frozen=True):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool = False
    lora_rank: int | None = None
    last_request_time: str
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, str] | None = None


class TrainingRunList(msgspec.Struct, frozen=True):
    training_runs: list[TrainingRun]
    cursor: Cursor


class TtlRequest(msgspec.Struct, frozen=True):
    ttl_seconds: int | msgspec.UnsetType | None = msgspec.UNSET
    """None: it never expires."""


class DownloadUrl(msgspec.Struct, frozen=True):
    url: str
    expires: str


class FileUrls(msgspec.Struct, frozen=True):
    urls: dict[str, str]
    """By file, relative to the checkpoint."""
    expires: str


class WeightsDescription(msgspec.Struct, frozen=True, kw_only=True):
    base_model: str
    is_lora: bool
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class CopyWeightsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """To a project, or to the model `model_seq_id` of a session."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = None


class CopyWeightsAnswer(msgspec.Struct, frozen=True):
    tinker_path: str


class SessionList(msgspec.Struct, frozen=True):
    sessions: list[str]


class Session(msgspec.Struct, frozen=True, kw_only=True):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None = None
    display_name: str | None = None


class ProjectRequest(msgspec.Struct, frozen=True):
    project_id: str = ""


class StatusQuery(msgspec.Struct, frozen=True):
    type: str
    """`active`, `cancelled`, `failed` or `client_finished`."""
    reasons: list[str] | None = None
    """Of `client_finished`: `success`, `errored`, `interrupted`; None: any."""


class Owner(msgspec.Struct, frozen=True):
    type: str
    """`own`, `accessible`, or `user` with their URNs."""
    owner_urns: list[str] = []


class SearchCursor(msgspec.Struct, frozen=True):
    last_created_at: str
    last_session_id: str


class SessionSearch(msgspec.Struct, frozen=True, kw_only=True):
    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    owner: Owner = Owner("own")
    statuses: list[StatusQuery] | None = None
    limit: int = 50
    cursor: SearchCursor | None = None


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True):
    session_id: str
    created_at: str
    owner: str
    project_id: str
    status: dict[str, Any] | None = None
    checkpoints_count: int
    display_name: str | None = None
    user_metadata: dict[str, str] | None = None
    checkpoint_storage_bytes: int | None = None


class SessionSearchAnswer(msgspec.Struct, frozen=True):
    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None = None


class OrganizationDetails(msgspec.Struct, frozen=True):
    name: str


class UserDetails(msgspec.Struct, frozen=True):
    email: str


class KeyDetails(msgspec.Struct, frozen=True):
    org_details: OrganizationDetails
    user_details: UserDetails


class ApiKey(msgspec.Struct, frozen=True):
    """Example: ApiKey(1, "local", "the key of this home", KeyDetails(…))."""

    key_id: int
    name: str
    note: str
    details: KeyDetails
