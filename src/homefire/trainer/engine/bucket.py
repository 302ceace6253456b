"""This job's corner of the snapshot store, and what every manifest of it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from homefire.checkpoints import CheckpointFamily, CheckpointKey, CheckpointStore, SnapshotInfo
from homefire.foundation.clock import Clock
from homefire.wire.ids import check_name
from homefire.wire.manifest import Canary


@dataclass(frozen=True)
class Bucket:
    store: CheckpointStore
    account: str
    job: str
    base_model: str
    model_dir: Path
    cap_bytes: int
    clock: Clock

    def key(self, slot: str, family: CheckpointFamily, name: str) -> CheckpointKey:
        return CheckpointKey(self.account, self.job, slot, family, check_name(name, field="path"))

    def info(
        self,
        *,
        step: int,
        metadata: dict[str, str],
        ttl_seconds: int | None,
        canary: Canary | None = None,
    ) -> SnapshotInfo:
        now = self.clock.now()
        return SnapshotInfo(
            step=step,
            base_model=self.base_model,
            created_at=now,
            metadata=metadata,
            expires_at=None if ttl_seconds is None else now + ttl_seconds,
            cap_bytes=self.cap_bytes,
            canary=canary,
        )
