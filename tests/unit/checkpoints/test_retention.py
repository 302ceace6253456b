"""Which checkpoints stay: the pure decision against a plain oracle, and the worker that acts on it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    CheckpointKind,
    Doomed,
    Manifest,
    decide,
    in_order_of_deletion,
    materialize,
)
from homefire.checkpoints.removal import remove
from homefire.wire.errors import InvalidArgument, UnknownSnapshot
from homefire.wire.records import Evaluation
from homefire.wire.retention import RetentionPolicy

NOW = 1000.0


def manifest(number: int, kind=CheckpointKind.BASE, *, parent=None, slot="policy", **fields):
    return Manifest(
        **{
            "identity": f"s{number}",
            "kind": kind,
            "account": "local",
            "job": "j1",
            "slot": slot,
            "step": number,
            "parent": parent,
            "base_model": "tiny",
            "created_at": float(number),
            "tensors": {},
            "digest": f"{number:04d}",
            "files": {},
            "size_bytes": 1,
            **fields,
        }
    )


def evaluation(number: int, **scores: float) -> Evaluation:
    return Evaluation(
        id=f"e{number}", at=0.0, name="held-out", deployment="d", identity=f"s{number}",
        digest=f"{number:04d}", scores=scores,
    )  # fmt: skip


def kept(checkpoints, policy, *, needed=lambda m: None, **options):
    verdicts = decide(checkpoints, policy, now=NOW, needed=needed, **options)
    return [v.manifest.identity for v in verdicts if v.keep]


@st.composite
def jobs(draw):
    """Some snapshots and states of two slots; a delta descends from an earlier one of its slot."""
    made: list[Manifest] = []
    for number in range(draw(st.integers(0, 14))):
        slot = draw(st.sampled_from(["a", "b"]))
        kind = draw(st.sampled_from(list(CheckpointKind)))
        earlier = [m for m in made if m.slot == slot and m.kind is not CheckpointKind.STATE]
        parent = None
        if kind is CheckpointKind.DELTA:
            if not earlier:
                kind = CheckpointKind.BASE
            else:
                parent = draw(st.sampled_from(earlier)).identity
        pinned = draw(st.integers(0, 9)) == 0
        made.append(manifest(number, kind, parent=parent, slot=slot, pinned=pinned))
    return made


policies = st.builds(
    RetentionPolicy,
    keep_last=st.none() | st.integers(1, 5),
    keep_every=st.none() | st.integers(1, 5),
    ttl_seconds=st.none() | st.floats(NOW - 14, NOW),
    keep_best=st.none() | st.just("reward"),
)
marks = st.sets(st.integers(0, 13))


@given(jobs(), policies, marks, marks)
def test_nothing_that_something_rests_on_ever_goes(checkpoints, policy, served, evaluated):
    """After the deletion every snapshot that stays still reaches its base, and what is needed is there."""
    verdicts = decide(
        checkpoints,
        policy,
        now=NOW,
        needed=lambda m: "served" if m.step in served else None,
        evaluations=[evaluation(n, reward=float(n % 5)) for n in sorted(evaluated)],
    )
    going = in_order_of_deletion(verdicts)
    staying = [v.manifest for v in verdicts if v.keep]
    assert {id(m) for m in going} | {id(m) for m in staying} == {id(m) for m in checkpoints}
    snapshots = {(m.slot, m.identity) for m in staying if m.kind is not CheckpointKind.STATE}
    for m in staying:
        assert m.parent is None or (m.slot, m.parent) in snapshots
    for m in going:
        assert not m.pinned
        assert m.step not in served
        if policy.keep_best is None and m.kind is not CheckpointKind.STATE:
            assert m.step not in evaluated
    if policy.is_empty:
        assert going == []


@given(jobs(), policies)
def test_children_go_before_their_parents(checkpoints, policy):
    verdicts = decide(checkpoints, policy, now=NOW, needed=lambda m: None, is_live=False)
    going = in_order_of_deletion(verdicts)
    for at, m in enumerate(going):
        later = {(other.slot, other.identity) for other in going[at + 1 :]}
        children = {(c.slot, c.identity) for c in going[at + 1 :] if c.parent == m.identity}
        if m.kind is not CheckpointKind.STATE:
            assert not {(s, i) for s, i in children if s == m.slot} & later


@given(jobs(), policies)
def test_every_rule_keeps_exactly_what_it_says(checkpoints, policy):
    """An oracle that knows no deltas: without parents the rules alone decide."""
    plain = [
        manifest(m.step, CheckpointKind.BASE, slot=m.slot)
        if m.kind is not CheckpointKind.STATE
        else manifest(m.step, CheckpointKind.STATE, slot=m.slot)
        for m in checkpoints
    ]
    expected = set()
    for m in plain:
        group = [o for o in plain if (o.slot, o.family) == (m.slot, m.family)]
        by_age = sorted(group, key=lambda o: -o.step).index(m)
        if (
            policy.is_empty
            or by_age == 0
            or (policy.keep_last is not None and by_age < policy.keep_last)
            or (policy.keep_every is not None and m.step % policy.keep_every == 0)
            or (policy.ttl_seconds is not None and NOW - m.step < policy.ttl_seconds)
        ):
            expected.add(m.identity)
    assert set(kept(plain, policy)) == expected


def test_the_best_by_a_score_stays_and_other_evaluated_ones_do_not():
    checkpoints = [manifest(n) for n in range(5)]
    scores = [evaluation(n, reward=r, loss=-r) for n, r in ((0, 0.2), (1, 0.9), (2, 0.5))]
    best = RetentionPolicy(keep_last=1, keep_best="reward")
    assert kept(checkpoints, best, evaluations=scores) == ["s1", "s4"]
    lowest = RetentionPolicy(keep_last=1, keep_best="loss", lower_is_better=True)
    assert kept(checkpoints, lowest, evaluations=scores) == ["s1", "s4"]
    every = RetentionPolicy(keep_last=1)
    assert kept(checkpoints, every, evaluations=scores) == ["s0", "s1", "s2", "s4"]


def test_a_record_of_other_weights_under_the_same_name_keeps_nothing():
    checkpoints = [manifest(0), manifest(1)]
    other = Evaluation(
        id="e", at=0.0, name="n", deployment="d", identity="s0", digest="ffff", scores={}
    )
    assert kept(checkpoints, RetentionPolicy(keep_last=1), evaluations=[other]) == ["s1"]


def test_every_reason_is_told():
    base = manifest(4, pinned=True)
    delta = manifest(5, CheckpointKind.DELTA, parent="s4")
    (first, second) = decide(
        [base, delta], RetentionPolicy(keep_last=1, keep_every=2), now=NOW, needed=lambda m: None
    )
    assert first.reasons == ("it is pinned", "step 4 is a multiple of 2", "the parent of 's5'")
    assert second.reasons == ("one of the last 1", "the newest")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"keep_last": 0}, "retention.keepLast"),
        ({"keep_every": -1}, "retention.keepEvery"),
        ({"ttl_seconds": float("nan")}, "retention.ttlSeconds"),
        ({"ttl_seconds": 0.0}, "retention.ttlSeconds"),
        ({"keep_best": ""}, "retention.keepBest"),
        ({"lower_is_better": True}, "retention.lowerIsBetter"),
    ],
)
def test_a_rule_that_makes_no_sense_is_named(fields, named):
    with pytest.raises(InvalidArgument) as refused:
        RetentionPolicy(**fields).check()
    assert refused.value.field == named


def doomed(*manifests: Manifest) -> list[Doomed]:
    return [Doomed(CheckpointKey.of(m), m.digest) for m in manifests]


def test_the_worker_removes_what_was_named_and_spares_what_changed(
    store, trainer, make_tensors, nudge
):
    tensors = make_tensors()
    a, b = trainer.base("a", tensors), trainer.base("b", tensors)
    c = trainer.base("c", tensors)
    trainer.delta("d", nudge(tensors), "c")
    store.pin(CheckpointKey.of(b), pinned=True)
    state = trainer.state("s", tensors)
    trainer.state("s", make_tensors(1), overwrite=True)
    result = remove(store, doomed(a, b, c, state))
    assert [key.name for key in result.removed] == ["a"]
    assert {key.rpartition("/")[2]: why for key, why in result.spared.items()} == {
        "b": "it was pinned meanwhile",
        "c": "it is the parent of 'd'",
        "s": "it was replaced meanwhile",
    }
    assert materialize(store, "local", "job-1", "policy", "d").chain == ["c", "d"]
    assert remove(store, doomed(a)).removed == []


def test_a_pinned_checkpoint_does_not_expire(store, trainer, clock, make_tensors):
    key = CheckpointKey.of(trainer.base("a", make_tensors(), expires_at=clock.now() + 10))
    assert store.pin(key, pinned=True).pinned
    clock.advance(10_000.0)
    assert store.loadable(key).identity == "a"
    assert store.prune(lambda m: False) == []
    store.pin(key, pinned=False)
    with pytest.raises(UnknownSnapshot, match="expired"):
        store.loadable(key)
    assert [k.name for k in store.prune(lambda m: False)] == ["a"]


def test_a_copy_is_not_pinned(store, trainer, make_key, make_tensors):
    key = CheckpointKey.of(trainer.base("a", make_tensors()))
    store.pin(key, pinned=True)
    copied = store.copy(key, make_key("b", CheckpointFamily.SAMPLER), expires_at=None)
    assert not copied.pinned
