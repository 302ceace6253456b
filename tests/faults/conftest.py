"""Walks of the real `tinker` client beside a front that may die, over a network that may lose."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from faults.preloaded import Nursery
from homefire.wire.specs import EngineKind

if TYPE_CHECKING:
    from faults.kill_cells import Cell, Run

pytest.register_assert_rewrite("faults.kill_cells")
StartWalk = Callable[..., Any]


@pytest.fixture(scope="module")
def tinkers_own_connections() -> Iterator[None]:
    """tinker leaves its sockets to the garbage collector; the warnings about them are not ours."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def start_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinkers_own_connections: None
) -> Iterator[StartWalk]:
    """`start_walk(cells, armed=True)`: a run on a directory of its own; see `kill_cells.walk`."""
    from faults.kill_cells import walk

    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    nurseries: dict[tuple[EngineKind, str], Nursery] = {}
    failpoints = tmp_path / "failpoints"
    roots = (tmp_path / str(number) for number in range(1000))

    def start(
        cells: list[Cell], *, engine: EngineKind = EngineKind.FAKE, bug: str = "", **options: Any
    ) -> Run:
        kind = (engine, bug)
        if kind not in nurseries:
            nurseries[kind] = Nursery(engine.value, failpoints, bug=bug)
        return walk(next(roots), nurseries[kind], failpoints, cells, engine=engine, **options)

    yield start
    for nursery in nurseries.values():
        nursery.close()
