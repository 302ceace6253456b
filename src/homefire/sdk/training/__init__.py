"""The training client: tinker's public API, and what Fireworks adds to it.

The only package that imports tinker. tinker numbers, chunks, encodes, retries and polls; here live
the checks that must come before, the calls that tinker has no words for, and their order.
"""

from homefire.sdk.training.client import (
    DATA_PLANE_ERRORS,
    FiretitanTrainingClient,
    LoadAdapterResponse,
    LoadStateResponse,
    SaveSamplerResult,
)
from homefire.sdk.training.ordered import OrderedFuture
from homefire.sdk.training.service import FiretitanServiceClient

__all__ = [
    "DATA_PLANE_ERRORS",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "LoadAdapterResponse",
    "LoadStateResponse",
    "OrderedFuture",
    "SaveSamplerResult",
]
