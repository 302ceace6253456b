"""Names: how resources and checkpoints are called, and which strings may be names at all.

A name is an id, never a path: `NAME` has no slash, and `..` is refused.
"""

from __future__ import annotations

import re
import secrets
from typing import NewType

from homefire.wire.errors import InvalidArgument

AccountId = NewType("AccountId", str)
JobId = NewType("JobId", str)
DeploymentId = NewType("DeploymentId", str)
ModelId = NewType("ModelId", str)
"""A Tinker model id, `{session_id}:train:{model_seq_id}`: a handle on a slot."""
SessionId = NewType("SessionId", str)
RequestId = NewType("RequestId", str)
Identity = NewType("Identity", str)
"""A sampler snapshot's name, e.g. `step_00010-4b50536f`."""

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")
DEFAULT_ACCOUNT = AccountId("local")
BASE_IDENTITY = Identity("base")
"""What a deployment serves before any snapshot."""
POLICY_SLOT = "policy"
"""The one slot of a dedicated job that trains."""
_SESSION_MARK = "-s"


def check_name(name: str, *, field: str) -> str:
    """`name` itself when it may be a name, else an error that says which field and what is allowed."""
    if not NAME.match(name) or ".." in name:
        raise InvalidArgument(
            f"{field} {name!r} is not a valid name",
            hint="use 1 to 128 of [A-Za-z0-9._:-], starting with a letter or digit, without '..'",
            field=field,
        )
    return name


def new_id(prefix: str) -> str:
    """A fresh id such as `job-3f9a1c2e`."""
    return f"{prefix}-{secrets.token_hex(4)}"


def job_name(account: str, job: str) -> str:
    return f"accounts/{account}/rlorTrainerJobs/{job}"


def deployment_name(account: str, deployment: str) -> str:
    return f"accounts/{account}/deployments/{deployment}"


def model_name(account: str, model: str) -> str:
    return f"accounts/{account}/models/{model}"


def checkpoint_name(account: str, job: str, checkpoint: str) -> str:
    return f"{job_name(account, job)}/checkpoints/{checkpoint}"


def model_id(session_id: str, model_seq_id: int) -> ModelId:
    """tinker 0.38 derives this id itself (tinker.md §0.5), so the rule is part of the protocol."""
    return ModelId(f"{session_id}:train:{model_seq_id}")


def session_prefix(job: str) -> str:
    """A dedicated job's session ids begin with this, so that a model id says which job it is of."""
    return f"{job}{_SESSION_MARK}"


def job_of_model(model: str) -> str | None:
    """`job-3f9a1c2e-s9c…:train:0` -> `job-3f9a1c2e`; None for a run of the root plane."""
    return model.partition(":")[0].rpartition(_SESSION_MARK)[0] or None
