"""Which checkpoints of a job stay under its retention policy, and why. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.records import Evaluation
from homefire.wire.retention import RetentionPolicy


@dataclass(frozen=True)
class Verdict:
    manifest: Manifest
    reasons: tuple[str, ...]
    """Why it stays; none: it goes."""

    @property
    def keep(self) -> bool:
        return bool(self.reasons)


def decide(
    checkpoints: Sequence[Manifest],
    policy: RetentionPolicy,
    *,
    now: float,
    needed: Callable[[Manifest], str | None],
    evaluations: Iterable[Evaluation] = (),
    is_live: bool = True,
) -> list[Verdict]:
    """A verdict for each checkpoint of one job, in their order.

    `needed` says what rests on a checkpoint beside its descendants, if anything does. `is_live`: the
    job may go on, so that the newest of each slot stays: the next delta's parent, and what a new
    session loads. A parent of a snapshot that stays, stays.
    """
    scored = _evaluated(checkpoints, evaluations)
    best = _best(scored, policy)
    newest = {key: group[-1] for key, group in _groups(checkpoints).items()} if is_live else {}
    last = _last(checkpoints, policy.keep_last)
    reasons: dict[int, list[str]] = {}
    for number, manifest in enumerate(checkpoints):
        rules = _by_rule(manifest, policy, now=now, is_last=id(manifest) in last)
        if policy.is_empty:
            rules.append("the policy has no rules")
        if newest.get(_group(manifest)) is manifest:
            rules.append("the newest")
        if number in best:
            rules.append(f"the best by {policy.keep_best}")
        if number in scored and policy.keep_best is None:
            rules.append("it was evaluated")
        if (need := needed(manifest)) is not None:
            rules.append(need)
        reasons[number] = rules
    _keep_parents(checkpoints, reasons)
    return [Verdict(m, tuple(reasons[number])) for number, m in enumerate(checkpoints)]


def in_order_of_deletion(verdicts: Iterable[Verdict]) -> list[Manifest]:
    """Those that go, each before what it descends from: an interruption leaves whole chains."""
    going = [verdict.manifest for verdict in verdicts if not verdict.keep]
    ordered: list[Manifest] = []
    while going:
        parents = {(m.slot, m.parent) for m in going if m.parent is not None}
        leaves = [m for m in going if not (_is_snapshot(m) and (m.slot, m.identity) in parents)]
        leaves = leaves or going  # parents in a circle: none of them loads
        ordered += leaves
        going = [m for m in going if m not in leaves]
    return ordered


def _by_rule(
    manifest: Manifest, policy: RetentionPolicy, *, now: float, is_last: bool
) -> list[str]:
    rules: list[str] = []
    if manifest.family is CheckpointFamily.EXTERNAL:
        rules.append("it was written to be taken elsewhere")
    if manifest.pinned:
        rules.append("it is pinned")
    if is_last:
        rules.append(f"one of the last {policy.keep_last}")
    if policy.keep_every is not None and manifest.step % policy.keep_every == 0:
        rules.append(f"step {manifest.step} is a multiple of {policy.keep_every}")
    if policy.ttl_seconds is not None and now - manifest.created_at < policy.ttl_seconds:
        rules.append(f"younger than {policy.ttl_seconds:g} s")
    return rules


def _last(checkpoints: Sequence[Manifest], count: int | None) -> set[int]:
    if not count:
        return set()
    return {id(m) for group in _groups(checkpoints).values() for m in group[-count:]}


def _groups(checkpoints: Sequence[Manifest]) -> dict[tuple[str, CheckpointFamily], list[Manifest]]:
    """By slot and family, oldest first."""
    groups: dict[tuple[str, CheckpointFamily], list[Manifest]] = {}
    for manifest in sorted(checkpoints, key=lambda m: (m.created_at, m.step, m.identity)):
        groups.setdefault(_group(manifest), []).append(manifest)
    return groups


def _group(manifest: Manifest) -> tuple[str, CheckpointFamily]:
    return manifest.slot, manifest.family


def _evaluated(
    checkpoints: Sequence[Manifest], evaluations: Iterable[Evaluation]
) -> dict[int, list[Evaluation]]:
    """The evaluations of each checkpoint, by its place. A record names weights by identity and, where
    it has one, by digest."""
    found: dict[int, list[Evaluation]] = {}
    known = list(evaluations)
    for number, manifest in enumerate(checkpoints):
        if not _is_snapshot(manifest):
            continue
        own = [e for e in known if is_of(e, manifest)]
        if own:
            found[number] = own
    return found


def is_of(evaluation: Evaluation, manifest: Manifest) -> bool:
    """Whether these weights were evaluated; without a digest the job must be named too."""
    if evaluation.identity != manifest.identity:
        return False
    if evaluation.digest:
        return manifest.digest.startswith(evaluation.digest)
    return evaluation.job.rpartition("/")[2] in ("", manifest.job)


def _best(scored: dict[int, list[Evaluation]], policy: RetentionPolicy) -> set[int]:
    """The place of the snapshot with the best score; of equal ones the later."""
    name = policy.keep_best
    sign = -1.0 if policy.lower_is_better else 1.0
    scores = [
        (sign * evaluation.scores[name], number)
        for number, own in scored.items()
        for evaluation in own
        if name is not None and name in evaluation.scores
    ]
    return {max(scores)[1]} if scores else set()


def _keep_parents(checkpoints: Sequence[Manifest], reasons: dict[int, list[str]]) -> None:
    by_name = {(m.slot, m.identity): n for n, m in enumerate(checkpoints) if _is_snapshot(m)}
    waiting = [number for number, rules in reasons.items() if rules]
    while waiting:
        child = checkpoints[waiting.pop()]
        parent = by_name.get((child.slot, child.parent)) if child.parent is not None else None
        if parent is None:
            continue
        if not reasons[parent]:
            waiting.append(parent)
        reason = f"the parent of {child.identity!r}"
        if reason not in reasons[parent]:
            reasons[parent].append(reason)


def _is_snapshot(manifest: Manifest) -> bool:
    return manifest.family is CheckpointFamily.SAMPLER
