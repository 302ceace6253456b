"""What the run remembers: snapshots, steps, evaluations. Plain data, written to the output folder."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Snapshot(msgspec.Struct, frozen=True):
    """A sampler snapshot as the server lists it.

    Example: Snapshot("step_00312-4b50536f", "delta", 312, 141220, "9f86d0…").
    """

    identity: str
    kind: str
    """`base` or `delta`."""
    step: int
    """Optimizer steps applied before it was taken."""
    size_bytes: int
    digest: str


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One step of reinforcement learning: its rollouts, made by one set of weights, and its updates."""

    step: int
    """Counts steps of the loop from 0."""
    snapshot: Snapshot
    """What was hot-loaded, and what every rollout of the step names as its weights."""
    reward: float
    """Mean over all rollouts."""
    loss: float
    """Mean over the updates."""
    logprob_gap: float
    """Largest |trainer - sampler| logprob of a sampled token under the same weights."""
    num_completions: int
    window: int
    """Concurrent requests that the controller allowed at the end of the step."""
    sync_s: float
    sample_s: float
    train_s: float

    def client_metrics(self) -> dict[str, float]:
        """What the server keeps in the job's record."""
        return {
            "reward": self.reward,
            "loss": self.loss,
            "logprob_gap": self.logprob_gap,
            "sync_s": self.sync_s,
            "sample_s": self.sample_s,
            "train_s": self.train_s,
        }


class SupervisedRecord(msgspec.Struct, frozen=True):
    step: int
    loss: float
    """Mean cross-entropy of an answer's token, in nats."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Rewards on the held-out set, through the deployment."""

    name: str
    snapshot: Snapshot
    reward: float
    prompts_sha256: str
    prompts: tuple[str, ...]
    answers: list[str]
    rewards: list[float]


class BranchProof(msgspec.Struct, frozen=True):
    """That a branched job went on exactly where the state was saved."""

    state: str
    branch_job: str
    num_logprobs: int
    """Compared bit for bit, after the load and after one identical step on both jobs."""


class Results(msgspec.Struct, frozen=True):
    job: str
    deployment: str
    before: Evaluation
    after: Evaluation
    steps: list[StepRecord]
    branch: BranchProof

    @property
    def headline(self) -> str:
        before, after = self.before.reward, self.after.reward
        return f"held-out reward {before:.3f} -> {after:.3f} over {len(self.after.prompts)} prompts"


class RunLog:
    """`metrics.jsonl` (a line per step) and `evaluations.jsonl` in the output folder, begun anew."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = folder / "metrics.jsonl"
        self._evaluations = folder / "evaluations.jsonl"
        for file in (self._metrics, self._evaluations):
            file.write_bytes(b"")

    def supervised(self, record: SupervisedRecord) -> None:
        _append(self._metrics, {"phase": "supervised", **msgspec.to_builtins(record)})

    def step(self, record: StepRecord) -> None:
        _append(self._metrics, {"phase": "rl", **msgspec.to_builtins(record)})

    def evaluation(self, evaluation: Evaluation) -> None:
        _append(self._evaluations, msgspec.to_builtins(evaluation))


def _append(file: Path, row: dict[str, object]) -> None:
    with file.open("ab") as lines:
        lines.write(msgspec.json.encode(row) + b"\n")
