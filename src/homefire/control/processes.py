"""The processes that control keeps: what each is started with, and what is watched of it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow
from homefire.foundation.home import Home
from homefire.launch import ProcessSpec
from homefire.wire.pooled import sampler_id
from homefire.wire.specs import Accelerator, EngineKind, ReplicaSpec, TrainerSpec, Upstream


@dataclass(frozen=True)
class ProcessPlan:
    """Turns rows into the specs of their processes."""

    home: Home
    engine: EngineKind
    model_roots: Sequence[str] = ()
    keep_journals: bool = False
    held_graph_bytes: int | None = None
    accelerator: Accelerator = Accelerator.CPU

    def trainer(self, job: JobRow) -> ProcessSpec:
        config, directory = job.config, self.home.job(job.id)
        nonce, listen = _fresh(self.home, f"job-{job.id}")
        name = f"trainer {job.id}"
        spec = TrainerSpec(
            name=name,
            nonce=nonce,
            listen=listen,
            account=job.account,
            job=job.id,
            base_model=config.base_model.name,
            model_dir=config.base_model.directory,
            tokenizer_id=config.base_model.tokenizer_id,
            mode=config.mode,
            lora_rank=config.lora_rank,
            max_context_length=config.max_context_length,
            threads=config.need.threads // config.ranks,
            ranks=config.ranks,
            micro_batch_tokens=config.micro_batch_tokens,
            activations=config.activations,
            accelerator=self.accelerator,
            store_root=self.home.store_root,
            job_dir=str(directory),
            engine=self.engine,
            keep_journal=self.keep_journals,
            held_graph_bytes=self.held_graph_bytes,
            pooled=config.pooled,
            sampler=sampler_id(job.id) if config.pooled else "",
            promoted_models=str(self.home.models),
            model_roots=[str(self.home.models), *self.model_roots],
        )
        return ProcessSpec(
            name=name,
            module="homefire.trainer.front",
            spec_file=str(directory / "spec.json"),
            spec=msgspec.json.encode(spec),
            log_file=str(directory / "front.log"),
            threads=spec.threads,
            nonce=nonce,
            listen=listen,
        )

    def replica(self, deployment: DeploymentRow, replica: ReplicaRow) -> ProcessSpec:
        config, directory = deployment.config, self.home.replica(deployment.id, replica.number)
        nonce, listen = _fresh(self.home, f"replica-{deployment.id}-{replica.number}")
        name = f"replica {deployment.id}/{replica.number}"
        spec = ReplicaSpec(
            name=name,
            nonce=nonce,
            listen=listen,
            account=deployment.account,
            deployment=deployment.id,
            replica=replica.number,
            base_model=config.base_model.name,
            model_dir=config.base_model.directory,
            max_context_length=config.max_context_length,
            threads=config.need.threads,
            store_root=self.home.store_root,
            replica_dir=str(directory),
            engine=self.engine,
            accelerator=self.accelerator,
            samples_job=config.samples_job,
        )
        return ProcessSpec(
            name=name,
            module="homefire.inference.replica",
            spec_file=str(directory / "spec.json"),
            spec=msgspec.json.encode(spec),
            log_file=str(directory / "replica.log"),
            threads=config.need.threads,
            nonce=nonce,
            listen=listen,
        )


def _fresh(home: Home, socket: str) -> tuple[str, Upstream]:
    """A nonce and a secret of this start alone."""
    upstream = Upstream(socket=home.socket(socket), secret=secrets.token_urlsafe(24))
    return secrets.token_hex(16), upstream
