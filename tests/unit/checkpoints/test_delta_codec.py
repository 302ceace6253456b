from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.checkpoints import DeltaCodec, RawTensor, decode_tensor, encode_tensor
from homefire.checkpoints.dtypes import ITEM_BYTES
from homefire.wire.errors import DigestMismatch

exhaustive = settings(deadline=None, max_examples=150)


def tensor(dtype: str, data: bytes) -> RawTensor:
    array = np.frombuffer(data, np.uint8)
    return RawTensor(dtype, (array.size // ITEM_BYTES[dtype],), array)


def bf16(bits: list[int]) -> RawTensor:
    return tensor("BF16", np.array(bits, "<u2").tobytes())


def random_pair(dtype: str, size: int, share: float, largest: int, seed: int):
    """A tensor of random bits, and one in which a share of the elements moved by up to `largest`."""
    generator = np.random.default_rng(seed)
    item_bytes = ITEM_BYTES[dtype]
    old = np.frombuffer(generator.bytes(size * item_bytes), f"<u{item_bytes}")
    new = old.copy()
    moved = generator.random(size) < share
    steps = generator.integers(-largest, largest, size=size, endpoint=True)
    new[moved] += steps[moved].astype(new.dtype)
    return tensor(dtype, old.tobytes()), tensor(dtype, new.tobytes())


@exhaustive
@given(
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    size=st.integers(0, 3000),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 0.59, 0.61, 1.0]),
    largest=st.sampled_from([1, 2, 100, 127, 128, 255, 256, 40_000, 2**31]),
    seed=st.integers(0, 2**32),
)
def test_decoding_gives_back_every_bit_whatever_moved(dtype, size, share, largest, seed):
    old, new = random_pair(dtype, size, share, largest, seed)
    encoded = encode_tensor(old, new)
    if encoded is None:
        assert old.data.tobytes() == new.data.tobytes()
    else:
        decoded = decode_tensor(old, encoded)
        assert (decoded.dtype, decoded.shape) == (new.dtype, new.shape)
        assert decoded.data.tobytes() == new.data.tobytes()


@exhaustive
@given(
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64", "I8", "BOOL"]),
    pairs=st.lists(st.tuples(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8))),
)
def test_any_bytes_become_any_other_bytes(dtype, pairs):
    old = tensor(dtype, b"".join(left for left, _ in pairs))
    new = tensor(dtype, b"".join(right for _, right in pairs))
    encoded = encode_tensor(old, new)
    result = old if encoded is None else decode_tensor(old, encoded)
    assert result.data.tobytes() == new.data.tobytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(0x0000, 0x8000, id="zero to minus zero"),
        pytest.param(0x7F80, 0xFF80, id="infinity to minus infinity"),
        pytest.param(0x7FC0, 0x7FC1, id="one NaN payload to another"),
        pytest.param(0x0001, 0x8001, id="subnormal to its negative"),
        pytest.param(0xFFFF, 0x0000, id="highest pattern to lowest"),
        pytest.param(0x0000, 0xFFFF, id="lowest pattern to highest"),
        pytest.param(0x0000, 0x8000, id="half the range away"),
    ],
)
def test_special_values_survive_as_gaps(old, new):
    base = [0x3F80] * 400
    before, after = bf16([*base, old, *base]), bf16([*base, new, *base])
    encoded = encode_tensor(before, after)
    assert encoded is not None
    assert encoded.codec is DeltaCodec.GAPS
    assert decode_tensor(before, encoded).data.tobytes() == after.data.tobytes()


def test_an_unchanged_tensor_needs_nothing():
    assert encode_tensor(bf16([1, 2, 3]), bf16([1, 2, 3])) is None


def test_few_changes_are_counted_and_take_a_fraction_of_the_tensor():
    old, new = random_pair("BF16", 100_000, 0.01, 1, seed=1)
    encoded = encode_tensor(old, new)
    assert encoded is not None
    assert encoded.codec is DeltaCodec.GAPS
    assert encoded.num_changed == np.count_nonzero(old.data.view("<u2") != new.data.view("<u2"))
    assert encoded.size_bytes < 0.01 * old.data.nbytes


def test_gaps_longer_than_a_byte_are_exact():
    old = bf16([0] * 200_000)
    bits = np.zeros(200_000, "<u2")
    bits[[0, 254, 255, 510, 511, 1021, 65_790, 199_999]] = 5
    new = tensor("BF16", bits.tobytes())
    encoded = encode_tensor(old, new)
    assert encoded is not None
    assert encoded.num_changed == 8
    assert decode_tensor(old, encoded).data.tobytes() == new.data.tobytes()


def test_when_most_elements_moved_byte_planes_are_used():
    old, new = random_pair("BF16", 10_000, 0.9, 1, seed=2)
    encoded = encode_tensor(old, new)
    assert encoded is not None
    assert encoded.codec is DeltaCodec.XOR_PLANES
    assert encoded.size_bytes < old.data.nbytes


def test_when_nothing_pays_the_bytes_are_plain():
    generator = np.random.default_rng(3)
    old, new = tensor("BF16", generator.bytes(10_000)), tensor("BF16", generator.bytes(10_000))
    encoded = encode_tensor(old, new)
    assert encoded is not None
    assert encoded.codec is DeltaCodec.PLAIN
    assert encoded.size_bytes == old.data.nbytes


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_damaged_parts_never_crash_the_decoder_or_change_the_size(share):
    old, new = random_pair("BF16", 2_000, share, 300, seed=4)
    encoded = encode_tensor(old, new)
    assert encoded is not None
    generator = np.random.default_rng(5)
    num_refused = 0
    for _ in range(200):
        parts = [bytearray(part) for part in encoded.parts]
        part = parts[generator.integers(len(parts))]
        part[generator.integers(len(part))] ^= 1 << generator.integers(8)
        damaged = replace(encoded, parts=[bytes(part) for part in parts])
        try:
            assert decode_tensor(old, damaged).data.size == old.data.size
        except DigestMismatch:
            num_refused += 1
    assert num_refused > 0


def test_a_part_that_claims_a_terabyte_is_refused_before_memory_is_reserved():
    old, new = random_pair("BF16", 2_000, 0.01, 1, seed=6)
    encoded = encode_tensor(old, new)
    assert encoded is not None
    bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(DigestMismatch, match="claims"):
        decode_tensor(old, replace(encoded, parts=[bomb, *encoded.parts[1:]]))
