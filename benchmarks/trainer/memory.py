"""Peak memory of a large batch, in a process of its own, beside what it is made of.

Run as a script it measures; `measure` starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from batches import SHAPES, TOKEN_BUDGET, make_batch, plan_of
from models import Model, described
from report import Bar, Report
from torch.utils._python_dispatch import TorchDispatchMode
from trainer import InProcess, one_thread

from homefire.wire.engine import Forward
from homefire.wire.graphs import GraphUse

MIB = 1 << 20
SHAPE = "32x256"


class LargestTensor(TorchDispatchMode):
    """Sees every result of an operation, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.num_elements = max(self.num_elements, item.numel())
        return result


def measure(report: Report, model: Model, root: Path) -> None:
    command = [sys.executable, __file__, str(model.directory), str(root)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    tokens = sum(SHAPES[SHAPE])
    full_logits = 4 * tokens * model.vocab_size / MIB
    report.note(
        **{f"{model.name}_{SHAPE}_{name}": value for name, value in found.items()},
        **{f"{model.name}_{SHAPE}_full_logits_would_be_mib": full_logits},
    )
    report.add(
        Bar(
            f"largest tensor / (tokens x vocabulary), {SHAPE}",
            found["largest_tensor_mib"] / full_logits,
            at_most=0.125,
        ),
        Bar(
            f"peak / (weights, masters, moments, gradients, activations), {SHAPE}",
            found["peak_above_imports_mib"] / found["sum_of_parts_mib"],
            at_most=1.25,
            limited_by="the allocator's own, and a chunk's logits with their derivative",
        ),
    )


def _measure_here(model: Model, root: Path) -> dict[str, float]:
    one_thread()
    before = _peak_mib()
    engine = InProcess(model, root)
    slot = engine.open_full()
    engine.accumulate(slot)
    engine.step(slot)  # the moments' pages are touched
    batch = make_batch(SHAPES[SHAPE], model.vocab_size)
    with LargestTensor() as seen:
        engine.forward_backward(slot, batch)
    peak = _peak_mib()
    parameters, activations = 4 * model.num_parameters / MIB, _activations_mib(engine, slot)
    parts = {
        "weights_mib": parameters,
        "masters_mib": parameters,
        "moments_mib": 2 * parameters,
        "gradients_mib": 2 * parameters,  # accumulated, and of the operation
        "activations_of_a_micro_batch_mib": activations,
    }
    return {
        **parts,
        "sum_of_parts_mib": sum(parts.values()),
        "peak_above_imports_mib": peak - before,
        "imports_mib": before,
        "micro_batch_tokens": TOKEN_BUDGET,
        "largest_tensor_mib": 4 * seen.num_elements / MIB,
    }


def _activations_mib(engine: InProcess, slot: str) -> float:
    """What autograd saves of one micro-batch, as an engine that holds its graph counts it."""
    length = SHAPES[SHAPE][0]
    batch = make_batch([length] * (TOKEN_BUDGET // length), engine.model.vocab_size)
    plan = plan_of(batch, graph=GraphUse.KEEP)
    request = Forward(slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=plan)
    rows, _ = engine.engine.forward(request, batch)
    assert rows.held is not None
    return rows.held.size_bytes / MIB


def _peak_mib() -> float:
    """Of this program alone: `ru_maxrss` goes on from what the process held that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this is measured on Linux only")


if __name__ == "__main__":
    print(json.dumps(_measure_here(described(Path(sys.argv[1])), Path(sys.argv[2]))))
