"""Results of `asample` on Tinker's binary wire."""

from __future__ import annotations

import numpy as np

from homefire.wire import tinker_public_pb2 as public_pb
from homefire.wire import tinker_sampling_pb2 as pb
from homefire.wire.tinker_sampling import (
    AltTokens,
    FloatTensor,
    SampledTokens,
    SampleOutput,
    StopReason,
    TopkLogprobs,
)

_STOP_REASONS = {
    StopReason.STOP: pb.STOP_REASON_STOP,
    StopReason.LENGTH: pb.STOP_REASON_LENGTH,
}


def encode_sample(output: SampleOutput) -> bytes:
    """Everything but the weights' name, for which this wire has no field; the header has it."""
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.prompt_cache_hit_tokens)
    for sequence in output.sequences:
        message.sequences.append(_sequence(sequence))
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = output.prompt_logprobs
    if output.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(output.topk_prompt_logprobs))
    if output.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_tensor(output.target_prompt_logprobs))
    if output.prompt_alt_tokens is not None:
        message.prompt_alt_tokens.CopyFrom(_alt_tokens(output.prompt_alt_tokens))
    return message.SerializeToString()


def _sequence(sequence: SampledTokens) -> pb.SampledSequence:
    message = pb.SampledSequence(
        stop_reason=_STOP_REASONS[sequence.stop_reason],
        tokens=sequence.tokens,
        logprobs=sequence.logprobs,
    )
    if sequence.topk is not None:
        message.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk))
    return message


def _topk(topk: TopkLogprobs) -> pb.TopkLogprobs:
    return pb.TopkLogprobs(
        token_ids=topk.token_ids, logprobs=topk.logprobs, k=topk.k, length=topk.length
    )


def _tensor(tensor: FloatTensor) -> public_pb.Tensor:
    message = public_pb.Tensor(dtype=public_pb.DTYPE_FLOAT32, shape=tensor.shape)
    if tensor.sparse_crow_indices is None:
        message.dense = tensor.data
        return message
    message.sparse_csr.values = tensor.data
    message.sparse_csr.crow_indices = np.array(tensor.sparse_crow_indices, np.int64).tobytes()
    message.sparse_csr.col_indices = np.array(tensor.sparse_col_indices, np.int64).tobytes()
    return message


def _alt_tokens(alt: AltTokens) -> pb.PromptAltTokens:
    return pb.PromptAltTokens(
        tokens=public_pb.Tensor(dense=alt.tokens, dtype=public_pb.DTYPE_INT64, shape=alt.shape),
        logprobs=public_pb.Tensor(
            dense=alt.logprobs, dtype=public_pb.DTYPE_FLOAT32, shape=alt.shape
        ),
    )
