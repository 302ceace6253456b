"""Which deployment an inference request is for: the forms that `model` may take. Pure.

accounts/{a}/deployments/{d}                 that deployment
accounts/{a}/deployments/{d}@{identity}      the same; the replica checks the identity
{anything}#accounts/{a}/deployments/{d}      that deployment (a bare {d} too)
accounts/{a}/models/{m}[@{identity}]         the header `fireworks-deployment`, else the one
                                             deployment that serves the model
tinker://{run}/sampler_weights/{name}        that snapshot: the sampler of its run's job
{d}[@{identity}]                             that deployment of the caller's account, else the one
                                             that serves the base model of that name (a repository,
                                             a directory)
"""

from __future__ import annotations

from homefire.wire.checkpoint_paths import CheckpointPath, parse_checkpoint_path
from homefire.wire.errors import InvalidArgument, UnknownDeployment
from homefire.wire.internal import RouteTable

_INSTEAD = "name one as accounts/<account>/deployments/<deployment>"


def snapshot_path(model: str) -> CheckpointPath | None:
    """None for what names no snapshot of the root plane; InvalidArgument for a path that is none."""
    return parse_checkpoint_path(model, field="model") if model.startswith("tinker://") else None


def deployment_key(table: RouteTable, *, account: str, model: str, header: str = "") -> str:
    """The key in `table.deployments`. Raises InvalidArgument, UnknownDeployment.

    A deployment of another account is as unknown as one that never existed.
    """
    if not model and not header:
        raise InvalidArgument("the request names no model", hint=_INSTEAD, field="model")
    key = _named(table, account, model, header)
    if key not in table.deployments or not key.startswith(f"{account}/"):
        raise UnknownDeployment(
            f"deployment {model or header!r} does not exist", hint=_existing(table, account)
        )
    return key


def _named(table: RouteTable, account: str, model: str, header: str) -> str:
    _, hash_mark, deployment = model.rpartition("#")
    if hash_mark:
        return _key(deployment, account)
    name = model.partition("@")[0]
    serving = table.models.get(f"{account}/{name}")
    if not _is_model_resource(name):
        key = _key(name or header, account)
        return serving if serving is not None and key not in table.deployments else key
    if header:
        return _key(header, account)
    if serving is None:
        raise UnknownDeployment(
            f"no single deployment serves {name!r}", hint=f"{_INSTEAD}; {_existing(table, account)}"
        )
    return serving


def _is_model_resource(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 4 and (parts[0], parts[2]) == ("accounts", "models")


def _key(name: str, account: str) -> str:
    """`accounts/a/deployments/d` -> `a/d`; a bare `d` is looked up in the caller's account."""
    parts = name.partition("@")[0].split("/")
    if len(parts) == 4 and (parts[0], parts[2]) == ("accounts", "deployments"):
        return f"{parts[1]}/{parts[3]}"
    return f"{account}/{'/'.join(parts)}"


def _existing(table: RouteTable, account: str) -> str:
    ids = sorted(
        key.partition("/")[2] for key in table.deployments if key.startswith(f"{account}/")
    )
    return f"existing deployments: {', '.join(ids)}" if ids else "there are no deployments yet"
