"""From tokens to `tinker.Datum`: position t of a row predicts token t + 1 of the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tinker

from homefire.sdk import SampledCompletion


def supervised_datum(
    prompt: Sequence[int], answer: Sequence[int], *, weight: float
) -> tinker.Datum:
    """Cross-entropy on the answer's tokens, each with `weight`; the prompt's weigh nothing."""
    tokens = [*prompt, *answer]
    weights_T = _aligned(np.full(len(answer), weight, np.float32), num_tokens=len(tokens))
    return _datum(tokens, {"weights": tinker.TensorData.from_numpy(weights_T)})


def rollout_datum(completion: SampledCompletion, advantage: float) -> tinker.Datum:
    """A sampled row with what the objective needs at each position: the advantage of its reward and
    the logprob under the weights that sampled it. Both are 0 on the prompt."""
    tokens = completion.full_tokens
    if completion.inference_logprobs is None:
        raise ValueError("the completion has no logprobs: sample with logprobs=True")
    sampled = np.asarray(completion.inference_logprobs, np.float32)
    advantages_T = _aligned(np.full_like(sampled, advantage), num_tokens=len(tokens))
    return _datum(
        tokens,
        {
            "advantages": tinker.TensorData.from_numpy(advantages_T),
            "logprobs": tinker.TensorData.from_numpy(_aligned(sampled, num_tokens=len(tokens))),
        },
    )


def _datum(tokens: Sequence[int], inputs: dict[str, tinker.TensorData]) -> tinker.Datum:
    targets_T = np.asarray(tokens[1:], np.int64)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={"target_tokens": tinker.TensorData.from_numpy(targets_T), **inputs},
    )


def _aligned(completion: npt.NDArray[np.float32], *, num_tokens: int) -> npt.NDArray[np.float32]:
    """One value per position of the row: zeros on the prompt, then the completion's values."""
    values_T = np.zeros(num_tokens - 1, np.float32)
    values_T[num_tokens - 1 - len(completion) :] = completion
    return values_T
