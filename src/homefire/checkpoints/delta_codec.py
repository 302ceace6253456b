"""The bits of a tensor that changed since a base tensor, small and exact.

Of the elements that one optimizer step at a usual rate changes, 69 to 90 % move by one unit in the last
place of their bfloat16 pattern, so the *step* between bit patterns is coded, not the value. Steps are
taken modulo 2^bits on unsigned patterns, which makes every value exact: NaN payloads, -0.0,
infinities, subnormals. Everything is meaningless on any other base, hence the two digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from homefire.checkpoints.dtypes import ITEM_BYTES, bit_patterns, num_elements
from homefire.wire.errors import DigestMismatch
from homefire.wire.tensors import RawTensor

Bits = npt.NDArray[Any]
"""Unsigned integers, 1-D: bit patterns of elements."""
Bytes = npt.NDArray[np.uint8]

_STEP_DTYPES = {"BF16", "F16", "F32"}
"""Formats whose neighbouring values have neighbouring bit patterns."""
_PLANES_ABOVE = 0.6
"""Share of changed elements above which positions cost more than they save (measured)."""
_GAP_ESCAPE = 255
_STEP_ESCAPE = 0
"""No changed element has step 0."""
_ZSTD_LEVEL = 1
"""Level 3 is slower and, on gaps, even larger."""


class DeltaCodec(StrEnum):
    """How the change of one piece of a tensor is written."""

    GAPS = "gaps"
    """Three parts: unchanged elements before each changed one (bytes, 255 = 255 more), zigzag ulp
    steps (bytes, 0 = look in the third part), and the steps above 255 at full width. zstd each."""
    XOR_PLANES = "xor_planes"
    """One part per byte of an element: that byte of old XOR new for all elements. zstd each."""
    PLAIN = "plain"
    """One part: the new bytes."""


@dataclass(frozen=True)
class EncodedTensor:
    codec: DeltaCodec
    num_changed: int
    parts: Sequence[bytes]

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.parts))


def encode_tensor(old: RawTensor, new: RawTensor) -> EncodedTensor | None:
    """What leads from `old` to `new`, which agree in dtype and shape; None when no bit differs."""
    item_bytes = ITEM_BYTES[new.dtype]
    old_bits, new_bits = bit_patterns(old, item_bytes), bit_patterns(new, item_bytes)
    changed = old_bits != new_bits
    num_changed = int(np.count_nonzero(changed))
    if num_changed == 0:
        return None
    if new.dtype in _STEP_DTYPES and num_changed <= _PLANES_ABOVE * changed.size:
        codec, parts = DeltaCodec.GAPS, _encode_gaps(old_bits, new_bits, np.flatnonzero(changed))
    else:
        codec, parts = DeltaCodec.XOR_PLANES, _encode_planes(old, new, item_bytes)
    if sum(map(len, parts)) >= new.data.nbytes:
        codec, parts = DeltaCodec.PLAIN, [new.data.tobytes()]
    return EncodedTensor(codec, num_changed, parts)


def decode_tensor(old: RawTensor, encoded: EncodedTensor) -> RawTensor:
    """The new tensor. DigestMismatch when the parts are no such encoding; memory stays bounded by the
    tensor's size whatever they hold."""
    if not 0 <= encoded.num_changed <= num_elements(old):
        raise DigestMismatch(
            f"a delta of {num_elements(old)} elements changes {encoded.num_changed}"
        )
    try:
        return RawTensor(old.dtype, old.shape, _DECODERS[encoded.codec](old, encoded))
    except (zstandard.ZstdError, ValueError, IndexError) as exc:
        raise DigestMismatch(f"a {encoded.codec} delta is damaged: {exc}") from exc


def _encode_gaps(old: Bits, new: Bits, positions: npt.NDArray[np.int64]) -> list[bytes]:
    steps = _zigzag(new[positions] - old[positions])
    small = np.where(steps < 256, steps, _STEP_ESCAPE).astype(np.uint8)
    large = steps[steps >= 256]
    return [_compress(part) for part in (_to_gaps(positions), small, large)]


def _decode_gaps(old: RawTensor, encoded: EncodedTensor) -> Bytes:
    bits = bit_patterns(old, ITEM_BYTES[old.dtype]).copy()
    num_changed, (gaps, small, large) = encoded.num_changed, encoded.parts
    longest = num_changed + bits.size // _GAP_ESCAPE + 1
    positions = _from_gaps(_decompress(gaps, at_most=longest))
    steps = _decompress(small, at_most=num_changed).astype(bits.dtype)
    escaped = _decompress(large, at_most=num_changed * bits.itemsize).view(bits.dtype)
    if not positions.size == steps.size == num_changed:
        raise ValueError(f"{positions.size} positions and {steps.size} steps for {num_changed}")
    steps[steps == _STEP_ESCAPE] = escaped
    bits[positions] += _unzigzag(steps)
    return bits.view(np.uint8)


def _encode_planes(old: RawTensor, new: RawTensor, item_bytes: int) -> list[bytes]:
    flips = (old.data ^ new.data).reshape(-1, item_bytes)
    return [_compress(np.ascontiguousarray(flips[:, i])) for i in range(item_bytes)]


def _decode_planes(old: RawTensor, encoded: EncodedTensor) -> Bytes:
    size, item_bytes = num_elements(old), ITEM_BYTES[old.dtype]
    flips = np.empty((size, item_bytes), np.uint8)
    for index, part in zip(range(item_bytes), encoded.parts, strict=True):
        flips[:, index] = _exactly(_decompress(part, at_most=size), size)
    return flips.reshape(-1) ^ old.data


def _decode_plain(old: RawTensor, encoded: EncodedTensor) -> Bytes:
    (data,) = encoded.parts
    return _exactly(np.frombuffer(data, np.uint8), old.data.nbytes)


_DECODERS = {
    DeltaCodec.GAPS: _decode_gaps,
    DeltaCodec.XOR_PLANES: _decode_planes,
    DeltaCodec.PLAIN: _decode_plain,
}


def _to_gaps(positions: npt.NDArray[np.int64]) -> Bytes:
    """Ascending positions as the number of elements skipped before each; 255 = skip 255, and go on."""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.max(initial=0) < _GAP_ESCAPE:  # from a few percent changed on: a fifth of the encoding
        return gaps.astype(np.uint8)
    escapes = gaps // _GAP_ESCAPE
    encoded = np.full(int(gaps.size + escapes.sum()), _GAP_ESCAPE, np.uint8)
    encoded[np.arange(gaps.size) + np.cumsum(escapes)] = gaps - escapes * _GAP_ESCAPE
    return encoded


def _from_gaps(encoded: Bytes) -> npt.NDArray[np.int64]:
    literals = np.flatnonzero(encoded != _GAP_ESCAPE)
    return np.cumsum(encoded, dtype=np.int64)[literals] + np.arange(literals.size)


def _zigzag(steps: Bits) -> Bits:
    """Steps modulo 2^bits, small ones first whatever their sign: 0, -1, 1, -2, … -> 0, 1, 2, 3, …"""
    bits = steps.itemsize * 8
    signed = steps.view(f"<i{steps.itemsize}")
    return ((signed << 1) ^ (signed >> (bits - 1))).view(steps.dtype)


def _unzigzag(zigzag: Bits) -> Bits:
    return (zigzag >> 1) ^ (0 - (zigzag & 1)).astype(zigzag.dtype)


def _compress(array: Bits) -> bytes:
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(array.data)


def _decompress(part: bytes, *, at_most: int) -> Bytes:
    """The frame's declared size is checked first: a damaged one must not reserve all memory."""
    if zstandard.frame_content_size(part) > at_most:
        raise ValueError(f"a part claims {zstandard.frame_content_size(part)} bytes, not {at_most}")
    data = zstandard.ZstdDecompressor().decompress(part, max_output_size=at_most)
    return np.frombuffer(data, np.uint8)


def _exactly(data: Bytes, size: int) -> Bytes:
    if data.size != size:
        raise ValueError(f"{data.size} bytes where {size} belong")
    return data
