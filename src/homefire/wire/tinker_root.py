"""Tinker messages that only the root plane has: sessions of the whole server, and samplers."""

from __future__ import annotations

import msgspec


class FinishReason(msgspec.Struct, frozen=True):
    type: str
    """`success`, `errored` or `interrupted`."""


class FinishSession(msgspec.Struct, frozen=True):
    """Body of POST sessions/{id}/finish."""

    reason: FinishReason | None = None
    detail: str | None = None


class SessionCreated(msgspec.Struct, frozen=True):
    session_id: str
    type: str = "create_session"


class CreateSamplingSession(msgspec.Struct, frozen=True):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None
    """`tinker://<run>/sampler_weights/<name>`; `base_model` may stand beside it."""


class SamplingSessionCreated(msgspec.Struct, frozen=True):
    sampling_session_id: str
    type: str = "create_sampling_session"


class Sampler(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a sampling session samples from."""

    sampler_id: str
    base_model: str
    """As the client named it: it finds its tokenizer by this name."""
    model_path: str | None = None


class SupportedModel(msgspec.Struct, frozen=True):
    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


class ServerCapabilities(msgspec.Struct, frozen=True):
    supported_models: list[SupportedModel]
