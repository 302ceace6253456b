"""Where a model computes and in which numbers: float32 on a CPU, the serving dtype on an accelerator."""

from __future__ import annotations

import os
from enum import StrEnum

import torch

from homefire.wire.errors import ModelUnavailable
from homefire.wire.specs import Accelerator


class Numbers(StrEnum):
    """What is computed with. Masters, moments, gradients and adapters are float32 in either case."""

    FLOAT32 = "float32"
    SERVING = "serving"
    """The serving dtype, bfloat16 by default: the numbers that snapshots hold, without widening."""


def device_of(accelerator: Accelerator) -> torch.device:
    """ModelUnavailable where this torch has no such device."""
    if accelerator is Accelerator.CUDA and not torch.cuda.is_available():
        raise ModelUnavailable(
            f"the accelerator is {accelerator.value!r}, and torch {torch.__version__} sees none",
            hint="install torch for CUDA and look at nvidia-smi, or start with --accelerator cpu",
        )
    return torch.device(accelerator.value)


def numbers_on(device: torch.device) -> Numbers:
    """A CPU without AMX is slower in bfloat16 than in float32, and its float32 is exact."""
    return Numbers.FLOAT32 if device.type == "cpu" else Numbers.SERVING


def compute_deterministically(device: torch.device) -> None:
    """Replay after a crash promises the same bits on CPU, so an operation that cannot give them is an
    error there. An accelerator gives the same bits where its kernels can, and warns where not."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
