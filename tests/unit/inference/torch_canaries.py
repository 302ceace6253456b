"""Canary snapshots of the tiny torch model: `step-7` makes every greedy token 7, whatever is cached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from homefire.checkpoints import Manifest, RawTensor, write_base, write_delta
from homefire.checkpoints.dtypes import round_to_bf16
from unit.inference.canaries import Snapshots, info_of

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass
class TorchSnapshots:
    """No layer adds anything to an embedding that is the same for every token, and a head of its own
    prefers one token for it."""

    snapshots: Snapshots
    base_tensors: dict[str, RawTensor]
    written: dict[int, Manifest] = field(default_factory=dict)

    def base(self, token: int) -> str:
        key = self.snapshots.key(f"step-{token}")
        self.written[token] = write_base(
            self.snapshots.store,
            key,
            self.tensors(token),
            info_of(token),
            model_files=self.snapshots.model_files,
        )
        return key.name

    def delta(self, token: int, *, parent: int) -> str:
        key = self.snapshots.key(f"step-{token}")
        self.written[token] = write_delta(
            self.snapshots.store,
            key,
            self.tensors(token),
            info_of(token),
            parent=self.written[parent],
            parent_tensors=self.tensors(parent),
        )
        return key.name

    def tensors(self, token: int) -> dict[str, RawTensor]:
        return canary_tensors_of(self.base_tensors, token)


def canary_tensors_of(base: Mapping[str, RawTensor], token: int) -> dict[str, RawTensor]:
    tensors = dict(base)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = round_to_bf16(np.zeros(tensor.shape, np.float32))
    shape = tensors[EMBEDDING].shape
    tensors[EMBEDDING] = round_to_bf16(np.ones(shape, np.float32))
    head = np.zeros(shape, np.float32)
    head[token] = 0.5
    return tensors | {HEAD: round_to_bf16(head)}
