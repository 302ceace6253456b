"""Deltas piece by piece: exact across pieces and threads, in bounded memory, readable by others."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from homefire.checkpoints import (
    RawTensor,
    encode_tensor,
    materialize,
    tensor_digest,
    write_safetensors,
)
from homefire.checkpoints.delta_file import DELTA_FILE, read_delta_file
from homefire.checkpoints.delta_pieces import decode_pieces, encode_pieces
from homefire.checkpoints.dtypes import ITEM_BYTES
from homefire.checkpoints.safetensors_file import BlobFileWriter, read_safetensors
from homefire.wire.errors import DigestMismatch, InvalidArgument

from .conftest import BUCKET

SPECIAL_BF16 = [0x0000, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0x7FC1, 0xFFFF, 0x007F]


def moved(old: RawTensor, share: float, seed: int) -> RawTensor:
    bits = old.data.view(f"<u{ITEM_BYTES[old.dtype]}").copy()
    chosen = np.random.default_rng(seed).random(bits.size) < share
    bits[chosen] += np.array(1, bits.dtype)
    return RawTensor(old.dtype, old.shape, bits.view(np.uint8))


def random_tensor(dtype: str, size: int, seed: int) -> RawTensor:
    data = np.random.default_rng(seed).bytes(size * ITEM_BYTES[dtype])
    return RawTensor(dtype, (size,), np.frombuffer(data, np.uint8))


@settings(deadline=None, max_examples=80)
@given(
    dtypes=st.lists(st.sampled_from(sorted(ITEM_BYTES)), min_size=1, max_size=4),
    size=st.integers(0, 300),
    piece_elements=st.integers(1, 100),
    threads=st.sampled_from([1, 3]),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_pieces_together_are_the_new_tensors(dtypes, size, piece_elements, threads, share, seed):
    old = {f"{n}.{d}": random_tensor(d, size + n, seed + n) for n, d in enumerate(dtypes)}
    new = {name: moved(tensor, share, seed) for name, tensor in old.items()}
    found: dict[str, list] = {name: [] for name in old}
    for piece in encode_pieces(old, new, threads=threads, piece_elements=piece_elements):
        found[piece.name].append(piece.encoded)
    for name, pieces in found.items():
        decoded = decode_pieces(old[name], pieces, piece_elements, threads=threads)
        assert (decoded.dtype, decoded.shape) == (new[name].dtype, new[name].shape)
        assert decoded.data.tobytes() == new[name].data.tobytes()


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from(SPECIAL_BF16), st.sampled_from(SPECIAL_BF16)), min_size=1
    ),
    piece_elements=st.integers(1, 8),
)
def test_nans_infinities_zeros_and_subnormals_keep_their_bits(pairs, piece_elements):
    def tensor(bits: list[int]) -> RawTensor:
        return RawTensor("BF16", (len(bits),), np.array(bits, "<u2").view(np.uint8))

    old, new = (tensor([pair[side] for pair in pairs]) for side in (0, 1))
    pieces = encode_pieces({"t": old}, {"t": new}, threads=1, piece_elements=piece_elements)
    decoded = decode_pieces(old, [p.encoded for p in pieces], piece_elements, threads=1)
    assert decoded.data.tobytes() == new.data.tobytes()


@pytest.mark.parametrize(
    "dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL"]
)
def test_a_delta_of_any_dtype_materializes(trainer, store, same, dtype):
    old = {"t": random_tensor(dtype, 3000, 1), "u": random_tensor(dtype, 7, 2)}
    trainer.base("s0", old)
    trainer.delta("s1", {**old, "t": moved(old["t"], 0.05, 3)}, "s0")
    assert same(materialize(store, *BUCKET, "s1").tensors, trainer.published["s1"])


@pytest.mark.parametrize("change", ["new", "removed", "reshaped", "retyped"])
def test_other_names_shapes_or_dtypes_are_refused_as_a_delta(trainer, make_tensors, change):
    """The trainer writes a base then."""
    tensors = make_tensors()
    trainer.base("s0", tensors)
    norm = tensors["norm.weight"]
    changed = {
        "new": {**tensors, "more": norm},
        "removed": {name: t for name, t in tensors.items() if name != "scale"},
        "reshaped": {**tensors, "norm.weight": RawTensor("BF16", (2, 4), norm.data)},
        "retyped": {**tensors, "norm.weight": RawTensor("F16", (8,), norm.data)},
    }[change]
    with pytest.raises(InvalidArgument, match="cannot be a delta"):
        trainer.delta("s1", changed, "s0")


def large_model() -> dict[str, RawTensor]:
    """48 MiB of bfloat16, half of it in one tensor."""
    sizes = {"embed": 12 << 20, **{f"layer.{n}": 1 << 20 for n in range(12)}}
    return {name: random_tensor("BF16", size, n) for n, (name, size) in enumerate(sizes.items())}


def peak_bytes(work) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_delta_is_written_in_a_fraction_of_the_models_memory(trainer, store, same):
    """And applied with the changed tensors beside the old ones, and little else."""
    old = large_model()
    size_bytes = sum(tensor.data.nbytes for tensor in old.values())
    new = {name: moved(tensor, 0.09, 5) for name, tensor in old.items()}
    trainer.base("s0", old)
    assert peak_bytes(lambda: trainer.delta("s1", new, "s0")) < 0.4 * size_bytes
    found = []
    read = peak_bytes(lambda: found.append(materialize(store, *BUCKET, "s1").tensors))
    assert size_bytes <= read < 1.4 * size_bytes
    assert same(found[0], new)


def test_a_planted_second_copy_would_be_counted():
    old = large_model()
    size_bytes = sum(tensor.data.nbytes for tensor in old.values())
    assert peak_bytes(lambda: [t.data.copy() for t in old.values()]) >= size_bytes


@pytest.mark.parametrize("hold_bytes", [0, 10, 1 << 20])
def test_a_file_of_blobs_is_safetensors_whether_they_were_held_or_not(tmp_path, hold_bytes):
    path = tmp_path / "blobs.safetensors"
    with BlobFileWriter(path, header_room_bytes=400, hold_bytes=hold_bytes) as file:
        for name, data in [("a", b"123"), ("a", b"4567"), ("b", b"x" * 20)]:
            file.append(name, data)
        entry = file.finish({"format": "mine"})
    assert entry.size_bytes == path.stat().st_size
    for found in (load_file(path), {n: t.data for n, t in read_safetensors(path).items()}):
        assert {name: bytes(data) for name, data in found.items()} == {
            "a": b"1234567",
            "b": b"x" * 20,
        }


def test_a_header_without_room_is_an_error_not_a_broken_file(tmp_path):
    with BlobFileWriter(tmp_path / "f", header_room_bytes=8, hold_bytes=0) as file:
        file.append("a", b"123")
        with pytest.raises(InvalidArgument, match="room was for 8"):
            file.finish({})


def write_format_1(path: Path, old: RawTensor, new: RawTensor) -> None:
    """As the first release wrote a delta of one tensor."""
    encoded = encode_tensor(old, new)
    assert encoded is not None
    header = {
        "codec": encoded.codec,
        "num_changed": encoded.num_changed,
        "part_bytes": [len(part) for part in encoded.parts],
        "base_digest": tensor_digest(old),
        "result_digest": tensor_digest(new),
    }
    blob = np.frombuffer(b"".join(encoded.parts), np.uint8)
    metadata = {
        "format": "homefire-delta/1",
        "tensors": msgspec.json.encode({"t": header}).decode(),
    }
    write_safetensors(path, {"t": RawTensor("U8", (blob.size,), blob)}, metadata)


def test_the_first_format_is_still_read(tmp_path):
    old = random_tensor("BF16", 5000, 1)
    new = moved(old, 0.1, 2)
    write_format_1(tmp_path / DELTA_FILE, old, new)
    file = read_delta_file(tmp_path / DELTA_FILE)
    assert file.deltas["t"].result_digest == tensor_digest(new)
    assert file.apply("t", old).data.tobytes() == new.data.tobytes()


def test_a_file_with_too_few_pieces_is_refused(trainer, store, make_key, make_tensors, nudge):
    trainer.base("s0", make_tensors())
    trainer.delta("s1", nudge(make_tensors()), "s0")
    file = read_delta_file(store.directory(make_key("s1")) / DELTA_FILE)
    file.deltas["embed.weight"].pieces.pop()
    with pytest.raises(DigestMismatch, match="0 pieces"):
        file.apply("embed.weight", trainer.published["s0"]["embed.weight"])
