"""Which engine a replica runs. Torch is imported only when its engine is opened."""

from __future__ import annotations

from pathlib import Path

from homefire.inference.engine.adapter_table import AdapterLimits
from homefire.inference.engine.continuous import ContinuousEngine, QueueLimits
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.network import Network
from homefire.inference.engine.protocol import InferenceEngine, Publish, WeightSet
from homefire.inference.engine.scheduler import SchedulerLimits
from homefire.wire.specs import EngineKind, ReplicaSpec


def open_engine(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
    """Loads the base model; blocks for seconds with torch."""
    network, weights = _fake(spec) if spec.engine is EngineKind.FAKE else _embedded(spec)
    return ContinuousEngine(
        network,
        weights,
        publish=publish,
        limits=SchedulerLimits(
            max_running=spec.max_running,
            adapters=AdapterLimits(spec.max_adapters, spec.max_adapter_bytes),
        ),
        queue=QueueLimits(spec.max_queued, spec.max_queued_tokens),
    )


def _fake(spec: ReplicaSpec) -> tuple[Network, WeightSet]:
    network = BigramNetwork(Path(spec.model_dir), max_context_length=spec.max_context_length)
    return network, network.base_weights()


def _embedded(spec: ReplicaSpec) -> tuple[Network, WeightSet]:
    from homefire.inference.engine.embedded import EmbeddedNetwork

    network = EmbeddedNetwork(
        Path(spec.model_dir),
        max_running=spec.max_running,
        max_context_length=spec.max_context_length,
        threads=spec.threads,
        accelerator=spec.accelerator,
        max_prefix_bytes=spec.max_prefix_bytes,
    )
    return network, network.resident_weights()
