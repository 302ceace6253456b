"""What a researcher imports: the training and sampling lifecycle as one set of names.

    from homefire.sdk import TrainerJobManager, FiretitanServiceClient, WeightSyncer

Importing this package loads nothing. A name loads its module when it is first used, so scripts
that only manage jobs never wait for tinker and torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from homefire.sdk.completions import SampledCompletion
    from homefire.sdk.concurrency import AdaptiveConcurrencyController, FixedConcurrencyController
    from homefire.sdk.config import (
        DEFAULT_CHECKSUM_FORMAT,
        DEFAULT_DELTA_COMPRESSION,
        CreatedTrainerJob,
        DeploymentConfig,
        DeploymentInfo,
        GradAccNormalization,
        TrainerJobConfig,
        TrainerServiceEndpoint,
        TrainingShapeProfile,
    )
    from homefire.sdk.deployment import DeploymentManager
    from homefire.sdk.fireworks import FireworksClient, validate_output_model_id
    from homefire.sdk.metrics import ServerMetrics
    from homefire.sdk.sampling import DeploymentSampler, SamplingRetry
    from homefire.sdk.sync import WeightSyncer
    from homefire.sdk.trainer import TrainerJobManager
    from homefire.sdk.training import (
        FiretitanServiceClient,
        FiretitanTrainingClient,
        LoadAdapterResponse,
        LoadStateResponse,
        SaveSamplerResult,
    )
    from homefire.sdk.weights import WeightsIdentity, WeightsSpan
    from homefire.wire.errors import WeightsMismatch

__all__ = [
    "DEFAULT_CHECKSUM_FORMAT",
    "DEFAULT_DELTA_COMPRESSION",
    "AdaptiveConcurrencyController",
    "CreatedTrainerJob",
    "DeploymentConfig",
    "DeploymentInfo",
    "DeploymentManager",
    "DeploymentSampler",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "FireworksClient",
    "FixedConcurrencyController",
    "GradAccNormalization",
    "LoadAdapterResponse",
    "LoadStateResponse",
    "SampledCompletion",
    "SamplingRetry",
    "SaveSamplerResult",
    "ServerMetrics",
    "TrainerJobConfig",
    "TrainerJobManager",
    "TrainerServiceEndpoint",
    "TrainingShapeProfile",
    "WeightSyncer",
    "WeightsIdentity",
    "WeightsMismatch",
    "WeightsSpan",
    "validate_output_model_id",
]

_MODULES = {
    "completions": ("SampledCompletion",),
    "concurrency": ("AdaptiveConcurrencyController", "FixedConcurrencyController"),
    "config": (
        "DEFAULT_CHECKSUM_FORMAT",
        "DEFAULT_DELTA_COMPRESSION",
        "CreatedTrainerJob",
        "DeploymentConfig",
        "DeploymentInfo",
        "GradAccNormalization",
        "TrainerJobConfig",
        "TrainerServiceEndpoint",
        "TrainingShapeProfile",
    ),
    "deployment": ("DeploymentManager",),
    "fireworks": ("FireworksClient", "validate_output_model_id"),
    "metrics": ("ServerMetrics",),
    "sampling": ("DeploymentSampler", "SamplingRetry"),
    "sync": ("WeightSyncer",),
    "trainer": ("TrainerJobManager",),
    "training": (
        "FiretitanServiceClient",
        "FiretitanTrainingClient",
        "LoadAdapterResponse",
        "LoadStateResponse",
        "SaveSamplerResult",
    ),
    "weights": ("WeightsIdentity", "WeightsMismatch", "WeightsSpan"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
