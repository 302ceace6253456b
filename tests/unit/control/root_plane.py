"""Rows and checkpoints as the root plane's services leave them, for tests of the management calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    LoraManifest,
    Manifest,
    RawTensor,
    SnapshotInfo,
    raw_tensor,
    write_lora,
    write_state,
)
from homefire.control.db import tinker_tables
from homefire.control.db.rows import SamplingSessionRow, TinkerRunRow, TinkerSessionRow
from homefire.wire.peft import adapter_config

JOB = "pool-0123456789ab"
SESSION = "ts-00000000000000aa"
RUN = f"{SESSION}:train:0"
LORA = LoraManifest(rank=2, alpha=32.0, train_unembed=False)
TARGET = "model.layers.0.self_attn.q_proj"


def adapter_tensors(seed: int) -> dict[str, RawTensor]:
    generator = np.random.default_rng(seed)
    prefix = f"base_model.model.{TARGET}"
    return {
        f"{prefix}.lora_A.weight": raw_tensor(generator.normal(size=(2, 8)).astype(np.float32)),
        f"{prefix}.lora_B.weight": raw_tensor(generator.normal(size=(4, 2)).astype(np.float32)),
    }


class RootPlane:
    """One pooled job of the account `local`; runs, sessions and checkpoints are made as asked."""

    def __init__(self, bench: Any, control: Any) -> None:
        self.bench = bench
        self.control = control
        self.store = bench.store
        self.clock = bench.clock

    async def session(
        self, session: str = SESSION, *, account: str = "local", **fields: Any
    ) -> TinkerSessionRow:
        self.clock.advance(1.0)
        now = self.clock.now()
        row = TinkerSessionRow(
            id=session, account=account, created_at=now, heartbeat_at=now, **fields
        )
        await self._transact(tinker_tables.insert_session, row)
        return row

    async def finish(self, session: str, reason: str, detail: str = "") -> None:
        await self.control.plane.database.transact(
            lambda c: tinker_tables.finish_session(
                c, session, reason=reason, detail=detail, now=self.clock.now()
            )
        )

    async def run(self, run: str = RUN, *, account: str = "local", **fields: Any) -> TinkerRunRow:
        """Its session must be there."""
        self.clock.advance(1.0)
        now = self.clock.now()
        session, _, seq_id = run.partition(":train:")
        values = {"job": JOB, "base_model": "tiny", "lora_rank": LORA.rank, **fields}
        row = TinkerRunRow(
            id=run,
            account=account,
            session=session,
            model_seq_id=int(seq_id),
            created_at=now,
            last_request_at=now,
            **values,
        )
        await self._transact(tinker_tables.insert_run, row)
        return row

    async def heartbeat(self, session: str) -> None:
        now = self.clock.now()
        await self.control.plane.database.transact(
            lambda c: tinker_tables.touch_session(c, session, heartbeat_at=now)
        )

    async def sampling_session(
        self, sampling_session: str, *, session: str = SESSION, model_path: str | None = None
    ) -> None:
        row = SamplingSessionRow(
            id=sampling_session,
            account="local",
            session=session,
            seq_id=0,
            sampler=f"{JOB}-sampler",
            base_model="tiny",
            model_path=model_path,
            created_at=self.clock.now(),
        )
        await self._transact(tinker_tables.insert_sampling_session, row)

    def save(
        self,
        name: str,
        family: CheckpointFamily = CheckpointFamily.STATE,
        *,
        run: str = RUN,
        account: str = "local",
        seed: int = 0,
        overwrite: bool = False,
        **fields: Any,
    ) -> Manifest:
        """An adapter's training state, snapshot or external weights, a second after what came before."""
        self.clock.advance(1.0)
        key = CheckpointKey(account, JOB, run, family, name)
        info = SnapshotInfo(step=3, base_model="tiny", created_at=self.clock.now(), **fields)
        tensors = adapter_tensors(seed)
        if family is CheckpointFamily.STATE:
            files = {"weights.safetensors": tensors, "optimizer.safetensors": tensors}
            return write_state(self.store, key, files, info, lora=LORA, overwrite=overwrite)
        config = adapter_config(
            rank=LORA.rank, alpha=LORA.alpha, base_model="tiny", target_modules=[TARGET]
        )
        return write_lora(self.store, key, tensors, info, adapter_config=config, lora=LORA)

    async def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        return await self.control.call(method, f"/api/v1/{path}", body, **options)

    async def names(self, path: str = f"training_runs/{RUN}/checkpoints") -> list[str]:
        return [c["checkpoint_id"] for c in (await self.call("GET", path))["checkpoints"]]

    async def _transact(self, insert: Any, row: Any) -> None:
        await self.control.plane.database.transact(lambda c: insert(c, row))
