"""A snapshot as a plain directory beside the store: what a promotion makes, without a server."""

from __future__ import annotations

from pathlib import Path

from homefire.checkpoints.lineage import resolve_chain
from homefire.checkpoints.progress import Report, unreported
from homefire.checkpoints.promote import make_directory
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.wire.manifest import Manifest


def export(
    store: CheckpointStore, manifest: Manifest, destination: Path, *, report: Report = unreported
) -> int:
    """Makes `destination`, whole or not at all; returns its size in bytes.

    A base or a delta gives a Hugging Face directory with the configuration and tokenizer of the base
    that the chain begins with, a LoRA snapshot a PEFT directory. One that holds these very weights
    already is left as it is; AlreadyExists when it holds something else; the errors of `materialize`.
    """
    key = CheckpointKey.of(manifest)
    chain = resolve_chain(lambda name: store.manifest(key.sibling(name)), manifest.identity)
    base = store.directory(key.sibling(chain[0].identity))
    destination.parent.mkdir(parents=True, exist_ok=True)
    made = make_directory(store, key, destination, base_model=base, report=report)
    return made.size_bytes
