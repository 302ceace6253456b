"""Sampling in the Tinker protocol: `asample`, the sampling session around it, and its result.

Requests are JSON in every version; results are JSON for clients up to 0.24 and protobuf for those that
accept it (see `tinker_sampling_proto`).
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Any

import msgspec
import numpy as np

from homefire.wire.engine import Array

EMPTY_LOGPROB = -99999.0
"""In a top-k place that holds nothing; its token is 0."""

# Requests ------------------------------------------------------------------------------------


class PromptChunk(msgspec.Struct, frozen=True):
    """Clients up to 0.16 send no `type`: the keys tell."""

    type: str | None = None
    tokens: list[int] | None = None
    dmel: str | None = None

    @property
    def kind(self) -> str:
        if self.tokens is not None:
            return "encoded_text"
        return self.type or ("dmel" if self.dmel is not None else "image")


class Prompt(msgspec.Struct, frozen=True):
    chunks: list[PromptChunk]


class SamplingParams(msgspec.Struct, frozen=True):
    """Null and absent are the same."""

    max_tokens: int | None = None
    """Up to the end of the context."""
    seed: int | None = None
    stop: str | list[str | int] | None = None
    """Texts or token ids; null: the model's end of sequence alone; empty: nothing stops."""
    temperature: float | None = None
    """1."""
    top_k: int | None = None
    """-1: no limit."""
    top_p: float | None = None
    """1."""


class IdTensor(msgspec.Struct, frozen=True):
    """Token ids [positions after the first, K], dense or sparse (CSR)."""

    data: list[int]
    dtype: str
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST asample."""

    prompt: Prompt
    sampling_session_id: str | None = None
    seq_id: int | None = None
    """Counts per sampling client; a repeated request has the same one. Up to 64 bits."""
    num_samples: int | None = None
    sampling_params: SamplingParams = SamplingParams()
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int | None = None
    topk_sample_logprobs: int | None = None
    target_prompt_logprobs: IdTensor | None = None
    prompt_alt_tokens_k: int | None = None
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    base_model: str | None = None
    """With `model_path`, the form without a session; clients that have sessions never send it."""
    model_path: str | None = None
    type: str | None = None

    def digest(self) -> str:
        """Of what is asked, however it was spelled."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()


def unknown_fields(body: bytes) -> list[str]:
    """Fields of a valid `asample` body that this version does not know and that ask for something: newer
    clients also send what they have switched off."""
    request = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    params = msgspec.json.decode(
        request.get("sampling_params", msgspec.Raw(b"{}")), type=dict[str, msgspec.Raw]
    )
    unknown = _unknown(request, SampleRequest, "")
    return unknown + _unknown(params, SamplingParams, "sampling_params.")


def _unknown(given: dict[str, msgspec.Raw], kind: type[msgspec.Struct], prefix: str) -> list[str]:
    names = sorted(given.keys() - set(kind.__struct_fields__))
    return [prefix + name for name in names if msgspec.json.decode(given[name])]


class SamplingSessionRef(msgspec.Struct, frozen=True):
    """Body of POST join_sampling_session."""

    sampling_session_id: str


class CancelFuture(msgspec.Struct, frozen=True):
    request_id: str


# Results -------------------------------------------------------------------------------------


class StopReason(StrEnum):
    """Why a sampled sequence ended: the protocol has these two."""

    STOP = "stop"
    """A stop token, which is its last token, or a stop text."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""


class TopkLogprobs(msgspec.Struct, frozen=True):
    """[length, k], likeliest first."""

    token_ids: bytes
    """int32"""
    logprobs: bytes
    """float32"""
    length: int
    k: int

    @classmethod
    def of(cls, rows: list[list[tuple[int, float]]], k: int) -> TopkLogprobs:
        """A row that is too short is filled up."""
        token_ids = np.zeros((len(rows), k), np.int32)
        logprobs = np.full((len(rows), k), EMPTY_LOGPROB, np.float32)
        for i, row in enumerate(rows):
            for j, (token, logprob) in enumerate(row[:k]):
                token_ids[i, j], logprobs[i, j] = token, logprob
        return cls(token_ids.tobytes(), logprobs.tobytes(), len(rows), k)

    def rows(self) -> list[list[tuple[int, float]] | None]:
        """As JSON has them: None for an empty one."""
        token_ids = np.frombuffer(self.token_ids, np.int32).reshape(self.length, self.k)
        logprobs = np.frombuffer(self.logprobs, np.float32).reshape(self.length, self.k)
        pairs = zip(token_ids.tolist(), logprobs.tolist(), strict=True)
        filled = ([p for p in zip(*row, strict=True) if p[1] != EMPTY_LOGPROB] for row in pairs)
        return [row or None for row in filled]


class SampledTokens(msgspec.Struct, frozen=True, kw_only=True):
    """One sample."""

    stop_reason: StopReason
    tokens: bytes
    """int32, the stop token included."""
    logprobs: bytes
    """float32, one per token: of the model itself, at temperature 1 and uncut."""
    topk: TopkLogprobs | None = None


class FloatTensor(msgspec.Struct, frozen=True, kw_only=True):
    """float32, in the layout of the ids that it answers."""

    data: bytes
    shape: list[int]
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class AltTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Draws at the prompt's positions after the first, [positions, k]."""

    tokens: bytes
    """int64"""
    logprobs: bytes
    """float32, of the model itself."""
    shape: list[int]


class WeightsName(msgspec.Struct, frozen=True):
    """Whose samples they are. Example: WeightsName("step_00010", "9f86d0…", "tinker://ts-…:train:0/…")."""

    identity: str
    digest: str
    model_path: str | None
    """None: the base model."""


class SampleOutput(msgspec.Struct, frozen=True, kw_only=True):
    """Result of an `asample`."""

    sequences: list[SampledTokens]
    weights: WeightsName
    prompt_logprobs: bytes | None = None
    """float32, one per prompt token; NaN where there is none."""
    topk_prompt_logprobs: TopkLogprobs | None = None
    target_prompt_logprobs: FloatTensor | None = None
    prompt_alt_tokens: AltTokens | None = None
    prompt_cache_hit_tokens: int = 0


def sample_json(output: SampleOutput) -> dict[str, Any]:
    """For clients up to 0.24. What nobody asked for is left out, so that they see their own fields."""
    optional = {
        "prompt_logprobs": _optional_floats(output.prompt_logprobs),
        "topk_prompt_logprobs": _topk_json(output.topk_prompt_logprobs),
        "target_prompt_logprobs": _tensor_json(output.target_prompt_logprobs),
        "prompt_alt_tokens": _alt_tokens_json(output.prompt_alt_tokens),
    }
    return {
        "type": "sample",
        "sequences": [_sequence_json(sequence) for sequence in output.sequences],
        "prompt_cache_hit_tokens": output.prompt_cache_hit_tokens,
        "homefire": {"weights": output.weights},
        **{name: value for name, value in optional.items() if value is not None},
    }


def _sequence_json(sequence: SampledTokens) -> dict[str, Any]:
    body: dict[str, Any] = {
        "stop_reason": sequence.stop_reason,
        "tokens": np.frombuffer(sequence.tokens, np.int32).tolist(),
        "logprobs": np.frombuffer(sequence.logprobs, np.float32).tolist(),
    }
    if sequence.topk is not None:
        body["topk_logprobs"] = sequence.topk.rows()
    return body


def _optional_floats(data: bytes | None) -> list[float | None] | None:
    if data is None:
        return None
    values: Array = np.frombuffer(data, np.float32)
    return [
        None if is_nan else v for v, is_nan in zip(values.tolist(), np.isnan(values), strict=True)
    ]


def _topk_json(topk: TopkLogprobs | None) -> list[list[tuple[int, float]] | None] | None:
    return None if topk is None else topk.rows()


def _tensor_json(tensor: FloatTensor | None) -> dict[str, Any] | None:
    if tensor is None:
        return None
    body: dict[str, Any] = {
        "data": np.frombuffer(tensor.data, np.float32).tolist(),
        "dtype": "float32",
        "shape": tensor.shape,
    }
    if tensor.sparse_crow_indices is not None:
        body["sparse_crow_indices"] = tensor.sparse_crow_indices
        body["sparse_col_indices"] = tensor.sparse_col_indices
    return body


def _alt_tokens_json(alt: AltTokens | None) -> dict[str, Any] | None:
    if alt is None:
        return None
    tokens = np.frombuffer(alt.tokens, np.int64).tolist()
    logprobs = np.frombuffer(alt.logprobs, np.float32).tolist()
    return {
        "tokens": {"data": tokens, "dtype": "int64", "shape": alt.shape},
        "logprobs": {"data": logprobs, "dtype": "float32", "shape": alt.shape},
    }
