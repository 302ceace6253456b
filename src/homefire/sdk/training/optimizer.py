"""AdamW parameters with Fireworks' gradient normalisation, through tinker's extension class."""

from __future__ import annotations

import tinker
from tinker.types.optimizer import OptimParamsBase

from homefire.sdk.config import GradAccNormalization


def optim_params(
    adam_params: tinker.AdamParams, normalization: GradAccNormalization | str | None
) -> tinker.OptimParams:
    """`adam_params` itself when nothing is to be normalised.

    ValueError for an unknown normalisation; RuntimeError when this tinker would drop the field.
    """
    if normalization is None:
        return adam_params
    try:
        value = GradAccNormalization(normalization).value
    except ValueError as exc:
        raise ValueError(
            f"grad_accumulation_normalization is {normalization!r}: "
            f"use one of {[member.value for member in GradAccNormalization]}, or None"
        ) from exc
    params = OptimParamsBase.model_validate(
        {
            "type": "adamw",
            **adam_params.model_dump(),
            "grad_accumulation_normalization": value,
        }
    )
    _check_field_travels(params)
    return params


def _check_field_travels(params: OptimParamsBase) -> None:
    """A tinker that drops fields which it does not know would train without normalising."""
    probe = tinker.OptimStepRequest(optim_params=params, model_id="probe", seq_id=1)
    if "grad_accumulation_normalization" not in str(probe.model_dump()):
        raise RuntimeError(
            f"tinker {tinker.__version__} drops grad_accumulation_normalization; "
            "install 'tinker>=0.38,<0.50'"
        )
