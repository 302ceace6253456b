"""The test kit of hot-load faults: each by name, injected into a store or a live replica, and a witness
that sees every draw.

A fault strikes once, so that a second, whole reading can be seen to heal what is only wrong in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey, DirectoryStore, materialize
from homefire.checkpoints.delta_file import DELTA_FILE, DeltaFile
from homefire.checkpoints.file_digest import file_entry
from homefire.checkpoints.manifest_file import decode_manifest, encode_manifest
from homefire.checkpoints.snapshots import SnapshotInfo, write_base
from homefire.inference.engine import embedded
from homefire.inference.engine.prefix_cache import PrefixCache
from homefire.inference.engine.protocol import WeightSet
from homefire.model import lora
from homefire.model.tensors import memory_digest, raw
from homefire.wire.errors import Unavailable
from homefire.wire.manifest import MANIFEST_FILE, Manifest, whole_digest
from homefire.wire.tensors import RawTensor, digest_tensors


@dataclass
class Witness:
    """Looks at the memory of a torch replica each time that it draws tokens for somebody."""

    engine: Any
    base_digest: str
    manifests: dict[str, Manifest]
    num_draws: int = 0
    wrong: list[str] = field(default_factory=list)
    """Draws from weights, or over cached prompts, that are not those which their answer names."""
    _made_with: dict[int, str] = field(default_factory=dict)
    """Block -> the digest that served when it was filled."""

    def watch(self) -> None:
        network = self.engine._network
        prefill, decode, keep = network.prefill, network.decode, network.keep

        def watched_prefill(rows: Any, plan: Any, uniforms: Any) -> Any:
            if any(row.slots for row in rows):
                self._look()
            for row in rows:
                self._look_at_blocks(row.held)
                self._note_blocks(row.kept)
            return prefill(rows, plan, uniforms)

        def watched_decode(*args: Any) -> Any:
            self._look()
            return decode(*args)

        def watched_keep(slot: int, *, first: int, blocks: Any) -> None:
            self._note_blocks(blocks)
            keep(slot, first=first, blocks=blocks)

        network.prefill, network.decode, network.keep = (
            watched_prefill,
            watched_decode,
            watched_keep,
        )

    def _look(self) -> None:
        self.num_draws += 1
        served = self.engine.serving()
        if (found := what_is_in_memory(self.engine._network)) != self._expected(served.name):
            self.wrong.append(f"{served.name} from {found}")

    def _expected(self, name: str) -> tuple[str, str, float]:
        """Digests of base and adapter, and the adapter's scale."""
        base, manifest = self.base_digest, self.manifests.get(name)
        if manifest is None:
            return base, "", 0.0
        if manifest.lora is None:
            return manifest.digest, "", 0.0
        return base, manifest.digest, manifest.lora.alpha / manifest.lora.rank

    def _look_at_blocks(self, blocks: Any) -> None:
        digest = self.engine.serving().digest
        self.wrong += [
            f"block {b} of other weights" for b in blocks if self._made_with[b] != digest
        ]

    def _note_blocks(self, blocks: Any) -> None:
        self._made_with |= dict.fromkeys(blocks, self.engine.serving().digest)


def what_is_in_memory(network: Any) -> tuple[str, str, float]:
    head = network._head
    base = memory_digest(network._model, head.own_tensors())
    if head._copy is not None and not head._is_own:
        is_fresh = np.array_equal(head._copy.numpy(), network._model.head_weight.detach().numpy())
        base = base if is_fresh else "a stale head"
    adapter = network._installed
    if adapter is None:
        return base, "", 0.0
    tensors = {name: raw(tensor) for name, tensor in lora.peft_tensors(adapter).items()}
    return base, whole_digest(digest_tensors(tensors)), adapter.scaling


@dataclass(frozen=True)
class Place:
    """Where faults strike: a store with the snapshots of one learning rate, and a live replica."""

    store: DirectoryStore
    engine: Any
    monkeypatch: pytest.MonkeyPatch

    @property
    def network(self) -> Any:
        return self.engine._network

    def directory(self, identity: str, job: str = "full") -> Path:
        return self.store.directory(key(identity, job))

    def once(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        """The next call goes to `replacement(original, *args)`, the later ones to the original."""
        original = getattr(owner, name)

        def struck(*args: Any, **options: Any) -> Any:
            self.monkeypatch.setattr(owner, name, original)
            return replacement(original, *args, **options)

        self.monkeypatch.setattr(owner, name, struck)


def key(identity: str, job: str = "full") -> CheckpointKey:
    return CheckpointKey("local", job, "policy", CheckpointFamily.SAMPLER, identity)


def skipped_apply(place: Place) -> None:
    """The new tensors are never copied into the module."""
    place.once(embedded, "load_serving_tensors", lambda original, model, tensors: None)


def wrong_base(place: Place) -> None:
    """The weights that are held, and that the delta is applied to, are not what they are called."""
    held = place.engine.serving_set()
    name = next(iter(held.tensors))
    bits = held.tensors[name].data.copy()
    bits[0] ^= 1
    tensor = held.tensors[name]
    held.tensors[name] = RawTensor(tensor.dtype, tensor.shape, bits)


def torn_file(place: Place) -> None:
    """The end of the delta's file never reached the disk."""
    path = place.directory("s1") / DELTA_FILE
    path.write_bytes(path.read_bytes()[:-64])


def stale_adapter(place: Place) -> None:
    """Rows go on with the adapter that was installed before."""
    place.once(place.network, "_use_adapter", lambda original, adapter: None)


def double_apply(place: Place) -> None:
    """The delta is applied to its own result."""

    def twice(apply: Any, file: Any, name: str, base: RawTensor, **options: Any) -> RawTensor:
        return apply(file, name, apply(file, name, base, **options), **options)

    place.once(DeltaFile, "apply", twice)


def cache_reuse(place: Place) -> None:
    """Prompts cached under other weights are found."""
    keys = PrefixCache._keys

    def of_any_version(self: PrefixCache, lease: Any, tokens: Any) -> Any:
        for _, before, own in keys(self, lease, tokens):
            yield "any", before, own

    place.monkeypatch.setattr(PrefixCache, "_keys", of_any_version)


def stale_tied_head(place: Place) -> None:
    """The head's own copy is not made again from the embedding."""
    place.once(place.network._head, "refresh", lambda original, own=None: None)


def dropped_lora_scale(place: Place) -> None:
    """The adapter is added as it is, without alpha / rank."""

    def unscaled(read: Any, weights: WeightSet, device: Any) -> lora.LoraAdapter:
        adapter = read(weights, device)
        return lora.LoraAdapter(adapter.rank, float(adapter.rank), adapter.layers)

    place.once(embedded, "_adapter_of", unscaled)


def wrong_dtype(place: Place) -> None:
    """The snapshot was written in float32, not in the serving dtype."""
    store, name = place.store, key("s1")
    found = materialize(store, "local", "full", "policy", "s1")
    wide = {
        n: RawTensor("F32", t.shape, (t.data.view("<u2").astype("<u4") << 16).view(np.uint8))
        for n, t in found.tensors.items()
    }
    old = found.manifest
    store.delete(name)
    info = SnapshotInfo(
        step=old.step, base_model=old.base_model, created_at=old.created_at, canary=old.canary
    )
    write_base(store, name, wide, info, model_files=place.directory("s0"))


def truncated_delta(place: Place) -> None:
    """The writer's buffer was cut, and the manifest attests the cut file."""
    directory = place.directory("s1")
    path = directory / DELTA_FILE
    path.write_bytes(path.read_bytes()[:-64])
    manifest_file = directory / MANIFEST_FILE
    manifest = decode_manifest(manifest_file.read_bytes(), source="test")
    files = manifest.files | {DELTA_FILE: file_entry(path)}
    manifest_file.write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))


def lost_acknowledgement(place: Place) -> None:
    """The weights are swapped, and nobody hears of it."""

    def unheard(swap: Any, weights: WeightSet, **options: Any) -> Any:
        swap(weights, **options).result(20)
        raise Unavailable("the answer was lost")

    place.once(place.engine, "swap_weights", unheard)
