"""How this job's batches are cut: as its spec says, or as its engine first found on an accelerator.

What was found is kept beside the journal, so that every engine of the job, whatever is free when it starts,
cuts batches alike. Requests that were accepted before the first engine was up are cut by the spec; each
request's plan is in the journal in either case.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from homefire.foundation.durable import write_file
from homefire.trainer.front.plan import execution_plan
from homefire.wire.engine import ExecutionPlan
from homefire.wire.specs import PassBudget, TrainerSpec

_FILE = "pass_budget.json"


class JobBudget:
    """Owned by the front's event loop. Reads a small file when it is made."""

    def __init__(self, spec: TrainerSpec) -> None:
        self._spec = spec
        self._path = Path(spec.job_dir) / _FILE
        self._found = self._read()

    @property
    def micro_batch_tokens(self) -> int:
        return self._found.micro_batch_tokens if self._found else self._spec.micro_batch_tokens

    def note(self, found: PassBudget | None) -> None:
        """The first one counts. A small durable write."""
        if found is not None and self._found is None:
            write_file(self._path, msgspec.json.encode(found))
            self._found = found

    def plan(self, lengths: list[int]) -> ExecutionPlan:
        """Of a pass with rows of these lengths."""
        return execution_plan(
            lengths,
            token_budget=self.micro_batch_tokens,
            threads=self._spec.threads,
            ranks=self._spec.ranks,
            activations=self._found.activations if self._found else self._spec.activations,
        )

    def _read(self) -> PassBudget | None:
        if not self._path.exists():
            return None
        return msgspec.json.decode(self._path.read_bytes(), type=PassBudget)
