"""What a hot-load status means for the snapshot that somebody waits for. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from homefire.sdk.connection import Json


class HotLoadVerdict(StrEnum):
    """Where the load of one identity stands, over all replicas."""

    WAITING = "waiting"
    """Some replica does not serve it yet."""
    SERVING = "serving"
    """Every replica is ready and serves it."""
    FAILED = "failed"
    """A replica tried it and kept its old weights."""


@dataclass(frozen=True)
class HotLoadOutcome:
    """`detail` says what was seen, for progress lines and errors."""

    verdict: HotLoadVerdict
    detail: str

    @property
    def is_serving(self) -> bool:
        return self.verdict is HotLoadVerdict.SERVING


def judge(status: Json, identity: str) -> HotLoadOutcome:
    """`status` is the answer of `GET /hot_load/v1/models/hot_load`.

    An error stage counts only when it names `identity`: one of another target is a leftover.
    Raises RuntimeError when the answer has no list of replicas.
    """
    replicas = replicas_of(status)
    for replica in replicas:
        loading: Json = replica.get("loading_state") or {}
        if loading.get("stage") == "error" and loading.get("target_snapshot_identity") == identity:
            reason = loading.get("error") or loading.get("message") or "see the deployment's log"
            return HotLoadOutcome(
                HotLoadVerdict.FAILED, f"a replica could not load {identity!r}: {reason}"
            )
    if replicas and all(_serves(replica, identity) for replica in replicas):
        return HotLoadOutcome(
            HotLoadVerdict.SERVING, f"{len(replicas)} of {len(replicas)} replicas"
        )
    return HotLoadOutcome(HotLoadVerdict.WAITING, _stages(replicas))


def current_identity(status: Json) -> str | None:
    """What the first replica serves; None for the base weights or when there is no replica."""
    replicas = replicas_of(status)
    return replicas[0].get("current_snapshot_identity") if replicas else None


def replicas_of(status: Json) -> list[Json]:
    replicas = status.get("replicas")
    if not isinstance(replicas, list):
        raise RuntimeError(f"a hot-load status without a list of replicas: {status}")
    return replicas


def _serves(replica: Json, identity: str) -> bool:
    return bool(replica.get("readiness")) and replica.get("current_snapshot_identity") == identity


def _stages(replicas: list[Json]) -> str:
    stages = [
        str((replica.get("loading_state") or {}).get("stage", "unknown")) for replica in replicas
    ]
    return ", ".join(stages) or "no replica yet"
