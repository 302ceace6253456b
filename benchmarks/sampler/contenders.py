"""Who is measured: our engine in this process, and transformers' two ways to generate."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import (
    Deliveries,
    Failed,
    Prefilled,
    Sampled,
    SequenceRequest,
    Update,
)
from homefire.wire.specs import ReplicaSpec, Upstream


@dataclass(frozen=True)
class Arrival:
    """One request of a workload."""

    at_s: float
    prompt: tuple[int, ...]
    max_new_tokens: int


@dataclass
class Run:
    """What the engine said of one workload."""

    num_open: int
    num_new: int = 0
    prefilled: list[Prefilled] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def receive(self, update: Update) -> None:
        if isinstance(update, Failed):
            raise update.error
        if isinstance(update, Prefilled):
            self.prefilled.append(update)
        if isinstance(update, Sampled):
            self.num_new += len(update.tokens)
            self.num_open -= update.finish is not None
            if self.num_open == 0:
                self.done.set()


class InProcess:
    """Our engine, without HTTP. Its thread computes; this one waits."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._engine = open_engine(spec, _publish)

    def run(self, workload: Sequence[Arrival], *, as_one_request: bool = False) -> Run:
        """Submits each at its time and waits for the last token."""
        run = Run(len(workload))
        requests = [SequenceRequest(item.prompt, item.max_new_tokens) for item in workload]
        if as_one_request:
            self._engine.submit(requests, run)
        else:
            began_at = time.perf_counter()
            for item, request in zip(workload, requests, strict=True):
                time.sleep(max(0.0, began_at + item.at_s - time.perf_counter()))
                self._engine.submit([request], run)
        run.done.wait()
        return run

    def close(self) -> None:
        self._engine.close()


def _publish(deliveries: Deliveries) -> None:
    for listener, update in deliveries:
        listener.receive(update)


class Generate:
    """`model.generate` with logprobs of the sampled tokens, in batches that wait to be full."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def run(self, workload: Sequence[Arrival], *, batch_size: int) -> None:
        began_at = time.perf_counter()
        for start in range(0, len(workload), batch_size):
            batch = workload[start : start + batch_size]
            time.sleep(max(0.0, began_at + batch[-1].at_s - time.perf_counter()))
            self._generate(batch)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Arrival]) -> None:
        """Padded on the left; the longest decides when the batch ends."""
        longest = max(len(item.prompt) for item in batch)
        num_new = max(item.max_new_tokens for item in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, item in enumerate(batch):
            tokens[row, longest - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, longest - len(item.prompt) :] = 1
        output = self._model.generate(
            tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for step, logits in enumerate(output.logits):
            chosen = output.sequences[:, longest + step, None]
            logits.float().log_softmax(-1).gather(-1, chosen)


class ContinuousBatching:
    """transformers' own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def run(self, workload: Sequence[Arrival]) -> None:
        """All at once, as many new tokens for each as for the first."""
        self._model.generate_batch(
            [list(item.prompt) for item in workload],
            generation_config=GenerationConfig(
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=workload[0].max_new_tokens,
                eos_token_id=-1,
                pad_token_id=0,
            ),
            progress_bar=False,
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.1),
        )


def replica_spec(model: Path, directory: Path, socket: str, secret: str) -> ReplicaSpec:
    return ReplicaSpec(
        name="bench/0",
        nonce="bench",
        listen=Upstream(socket, secret),
        account="local",
        deployment="bench",
        replica=0,
        base_model="accounts/local/models/bench",
        model_dir=str(model),
        max_context_length=2048,
        threads=1,
        store_root=str(directory / "store"),
        replica_dir=str(directory / "replica"),
    )
