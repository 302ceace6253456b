"""How many engine ranks a job gets. Pure.

What a request and a training shape call an accelerator is one rank here: a process with its share of
the machine's threads. A count of hardware that this machine lacks (`acceleratorType`
NVIDIA_H200_141GB, or a hosted shape's name) describes where the same job ran before: such a job gets
one rank, and its status message says so.
"""

from __future__ import annotations

from homefire.control.shapes import ACCELERATOR, Shape
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.resources import TrainerJobRequest

COUNT_FIELD = "trainingConfig.acceleratorCount"
LARGEST_RANK_COUNT = 64
"""The links of rank 0 are inherited descriptors, one per rank."""


def rank_count(request: TrainerJobRequest, shape: Shape | None) -> int:
    """InvalidArgument or Unsupported, by field, for what cannot be."""
    asked = asked_here(request)
    if shape is not None and not shape.is_alias:
        if asked not in (None, shape.ranks):
            raise InvalidArgument(
                f"acceleratorCount {asked} does not fit training shape {shape.name}, whose engine has"
                f" {shape.ranks}",
                hint="leave acceleratorCount out: the shape decides",
                field=COUNT_FIELD,
            )
        return _checked(shape.ranks, field="trainingShape")
    if asked is None:
        return 1
    if (request.node_count or 1) > 1:
        raise Unsupported(
            f"nodeCount {request.node_count}: the ranks of a job run on one machine",
            hint=f"leave nodeCount out and ask for all ranks with {COUNT_FIELD}",
            field="nodeCount",
        )
    return _checked(asked, field=COUNT_FIELD)


def asked_here(request: TrainerJobRequest) -> int | None:
    """The request's own count, of what this machine has; None where it names other hardware."""
    return None if names_other_hardware(request) else request.training_config.accelerator_count


def names_other_hardware(request: TrainerJobRequest) -> bool:
    return request.training_config.accelerator_type not in (None, "", ACCELERATOR)


def _checked(count: int, *, field: str) -> int:
    if not 1 <= count <= LARGEST_RANK_COUNT:
        raise InvalidArgument(
            f"{count} engine ranks are not between 1 and {LARGEST_RANK_COUNT}",
            hint="ask for one rank, or for as many as the machine has cores",
            field=field,
        )
    return count
