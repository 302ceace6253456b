"""Plants one bug in the processes of a homefire under test; the name is in HOMEFIRE_PLANTED_BUG.

Python imports a module of this name at start when its directory is on PYTHONPATH, which only
`test_planted_bugs.py` sees to. Each bug replaces one function of the module that it names, right
after that module was executed and before another has imported from it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Plant = Callable[[Any], None]


def forward_only_is_ignored(module: Any) -> None:
    import msgspec

    decode = module.decode_forward_backward

    def planted(body: bytes) -> Any:
        request = decode(body)
        return msgspec.structs.replace(
            request, body=msgspec.structs.replace(request.body, forward_only=False)
        )

    module.decode_forward_backward = planted


def losses_are_means(module: Any) -> None:
    evaluate = module.evaluate

    def planted(loss: Any, logprobs: Any, batch: Any) -> Any:
        terms = evaluate(loss, logprobs, batch)
        count = len(logprobs)
        return module.LossTerms(terms.value / count, terms.gradient / count, terms.diagnostics)

    module.evaluate = planted


def named_samplers_follow_the_run(module: Any) -> None:
    """Every request is answered with what the run saved last."""

    async def planted(self: Any, session: Any) -> Any:
        spec = self._spec
        location = module.SnapshotLocation(spec.account, spec.samples_job, session.run)
        sampler = module.CheckpointFamily.SAMPLER
        saved = self._store.list(spec.account, spec.samples_job, slot=session.run, family=sampler)
        return module._snapshot(location, saved[-1])

    module.SessionWeights._find = planted


def gradients_are_not_clipped(module: Any) -> None:
    import msgspec

    step = module.BigramTrained.step

    def planted(self: Any, adam: Any, *others: Any) -> dict[str, float]:
        return step(self, msgspec.structs.replace(adam, grad_clip_norm=0.0), *others)

    module.BigramTrained.step = planted


def retries_are_applied_again(module: Any) -> None:
    accept_in_order = module.Admission.accept_in_order

    async def planted(self: Any, model: str, seq: int, submission: Any) -> str:
        request_id = await accept_in_order(self, model, seq, submission)
        again = (model, seq) in _accepted
        _accepted.add((model, seq))
        if again:
            await self._accept(model, None, "", submission)
        return request_id

    module.Admission.accept_in_order = planted


_accepted: set[tuple[str, int]] = set()

BUGS: dict[str, tuple[str, Plant]] = {
    "forward_only_is_ignored": ("homefire.wire.tinker_proto", forward_only_is_ignored),
    "losses_are_means": ("homefire.trainer.engine.losses", losses_are_means),
    "named_samplers_follow_the_run": (
        "homefire.inference.replica.session_weights",
        named_samplers_follow_the_run,
    ),
    "gradients_are_not_clipped": (
        "homefire.trainer.engine.bigram_weights",
        gradients_are_not_clipped,
    ),
    "retries_are_applied_again": (
        "homefire.trainer.front.admission",
        retries_are_applied_again,
    ),
}


class _Planting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the one module as usual, and plants the bug when it has been executed."""

    def __init__(self, name: str, plant: Plant) -> None:
        self._name = name
        self._plant = plant
        self._loader: Any = None

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        assert spec is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._plant(module)


if bug := os.environ.get("HOMEFIRE_PLANTED_BUG"):
    sys.meta_path.insert(0, _Planting(*BUGS[bug]))
