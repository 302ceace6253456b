from __future__ import annotations

import pytest

from homefire.checkpoints import (
    CheckpointKind,
    Manifest,
    SnapshotInfo,
    resolve_chain,
)
from homefire.checkpoints.lineage import MAX_CHAIN
from homefire.checkpoints.snapshots import new_manifest
from homefire.wire.errors import (
    DigestMismatch,
    FailedPrecondition,
    UnknownSnapshot,
    WrongCheckpointKind,
)
from homefire.wire.manifest import TensorEntry


@pytest.fixture
def slot(make_key):
    """A slot's manifests by name: `slot(base=None, a="base")` is a base and its delta `a`."""

    def make(**parents: str | None):
        manifests: dict[str, Manifest] = {}

        def of(name: str) -> Manifest:
            if name not in parents:
                raise UnknownSnapshot(f"no {name}")
            return manifests.setdefault(name, build(name, parents[name]))

        def build(name: str, parent: str | None) -> Manifest:
            return new_manifest(
                make_key(name),
                CheckpointKind.DELTA if parent else CheckpointKind.BASE,
                SnapshotInfo(step=0, base_model="tiny", created_at=0.0),
                {"w": TensorEntry("BF16", (1,), name)},
                {},
                num_elements=1,
                parent=parent,
                parent_digest=digest_of(parent) if parent else None,
            )

        def digest_of(name: str) -> str:
            return build(name, None).digest

        return of

    return make


def names(chain: list[Manifest]) -> list[str]:
    return [manifest.identity for manifest in chain]


def test_a_base_stands_by_itself(slot):
    assert names(resolve_chain(slot(a=None), "a")) == ["a"]


def test_a_delta_is_walked_back_to_its_base_in_order_of_application(slot):
    assert names(resolve_chain(slot(a=None, b="a", c="b"), "c")) == ["a", "b", "c"]


def test_the_walk_ends_at_what_is_held(slot):
    of = slot(a=None, b="a", c="b", d="c")
    assert names(resolve_chain(of, "d", held="b")) == ["c", "d"]


def test_nothing_is_applied_for_what_is_held(slot):
    assert resolve_chain(slot(a=None), "a", held="a") == []


def test_something_held_that_is_no_ancestor_is_ignored(slot):
    of = slot(a=None, b="a", c="a")
    assert names(resolve_chain(of, "c", held="b")) == ["a", "c"]


def test_what_is_held_may_be_gone_from_the_store(slot):
    assert names(resolve_chain(slot(c="b"), "c", held="b")) == ["c"]


def test_a_base_that_is_newer_than_what_is_held_is_loaded_by_itself(slot):
    of = slot(a=None, b="a", c=None, d="c")
    assert names(resolve_chain(of, "d", held="b")) == ["c", "d"]


def test_an_unknown_identity_is_unknown(slot):
    with pytest.raises(UnknownSnapshot, match="no z"):
        resolve_chain(slot(a=None), "z")


def test_a_missing_link_is_named_with_the_snapshot_that_needs_it(slot):
    with pytest.raises(UnknownSnapshot, match="'c' is a delta of 'b', which is not in the store"):
        resolve_chain(slot(a=None, c="b"), "c")


def test_a_parent_with_other_weights_is_refused(slot, make_key):
    of = slot(a=None, b="a")
    changed = new_manifest(
        make_key("a"),
        CheckpointKind.BASE,
        SnapshotInfo(step=0, base_model="tiny", created_at=0.0),
        {"w": TensorEntry("BF16", (1,), "other")},
        {},
        num_elements=1,
    )
    with pytest.raises(DigestMismatch, match="'b' is a delta of another 'a'"):
        resolve_chain(lambda name: changed if name == "a" else of(name), "b")


def test_a_training_state_cannot_be_served(slot, make_key):
    state = new_manifest(
        make_key("s"),
        CheckpointKind.STATE,
        SnapshotInfo(step=0, base_model="tiny", created_at=0.0),
        {},
        {},
        num_elements=0,
    )
    with pytest.raises(WrongCheckpointKind, match="'s' is a training state"):
        resolve_chain(lambda _: state, "s")


def test_a_circle_of_parents_ends_in_an_error(slot):
    with pytest.raises(FailedPrecondition, match="reach no base"):
        resolve_chain(slot(a="c", b="a", c="b"), "c")


def test_the_length_of_a_chain_is_bounded(slot):
    parents = {f"s{i}": f"s{i - 1}" if i else None for i in range(MAX_CHAIN + 2)}
    of = slot(**parents)
    assert len(resolve_chain(of, f"s{MAX_CHAIN}")) == MAX_CHAIN + 1
    with pytest.raises(FailedPrecondition, match=str(MAX_CHAIN)):
        resolve_chain(of, f"s{MAX_CHAIN + 1}")
