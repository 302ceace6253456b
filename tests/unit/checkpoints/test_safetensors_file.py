from __future__ import annotations

import hashlib
import struct

import msgspec
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.checkpoints import RawTensor, raw_tensor, read_safetensors, write_safetensors
from homefire.checkpoints.dtypes import ITEM_BYTES
from homefire.checkpoints.safetensors_file import read_metadata
from homefire.wire.errors import DigestMismatch, InvalidArgument


@st.composite
def tensors(draw) -> RawTensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = int(np.prod(shape, dtype=int)) * ITEM_BYTES[dtype]
    data = draw(st.binary(min_size=size, max_size=size))
    return RawTensor(dtype, shape, np.frombuffer(data, np.uint8))


def file_of(header: object, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else msgspec.json.encode(header)
    return struct.pack("<Q", len(encoded)) + encoded + data


@settings(deadline=None)
@given(
    content=st.dictionaries(st.text(min_size=1).filter(lambda t: t != "__metadata__"), tensors())
)
def test_what_is_written_is_read_back_bit_for_bit(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("safetensors") / "file.safetensors"
    entry = write_safetensors(path, content, {"format": "pt"})
    found = read_safetensors(path)
    assert {n: (t.dtype, t.shape, t.data.tobytes()) for n, t in found.items()} == {
        n: (t.dtype, t.shape, t.data.tobytes()) for n, t in content.items()
    }
    assert entry.size_bytes == path.stat().st_size
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_metadata(path) == {"format": "pt"}


def test_the_reference_implementation_reads_our_files(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([1, 2, 3], np.int8),
        "c": np.array(7, np.int64),
    }
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, {n: raw_tensor(a) for n, a in arrays.items()}, {"format": "pt"})
    found = safetensors.numpy.load_file(path)
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }


def test_we_read_files_of_the_reference_implementation(tmp_path):
    path = tmp_path / "theirs.safetensors"
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    safetensors.numpy.save_file({"a": array}, path)
    found = read_safetensors(path)["a"]
    assert (found.dtype, found.shape, found.data.tobytes()) == ("F16", (2, 3), array.tobytes())


def test_every_tensor_is_aligned_to_its_elements(tmp_path, make_tensors):
    path = tmp_path / "aligned.safetensors"
    content = {"flag": raw_tensor(np.array([True])), **make_tensors()}
    write_safetensors(path, content)
    for name, tensor in read_safetensors(path).items():
        address = tensor.data.__array_interface__["data"][0]
        assert address % ITEM_BYTES[tensor.dtype] == 0, name


def test_read_tensors_cannot_be_written_to(tmp_path, make_tensors):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, make_tensors())
    with pytest.raises(ValueError, match="read-only"):
        read_safetensors(path)["steps"].data[0] = 1


def test_bytes_that_do_not_fit_the_shape_are_not_written(tmp_path):
    wrong = RawTensor("BF16", (3,), np.zeros(5, np.uint8))
    with pytest.raises(InvalidArgument, match=r"'w'.*5 bytes"):
        write_safetensors(tmp_path / "file.safetensors", {"w": wrong})
    assert not (tmp_path / "file.safetensors").exists()


def entry(start: int, stop: int, shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "only 0 bytes", id="empty"),
        pytest.param(b"\1\0\0", "only 3 bytes", id="shorter than its prefix"),
        pytest.param(struct.pack("<Q", 1 << 62) + b"{}", "header claims", id="endless header"),
        pytest.param(file_of(b"{", b""), "header is not valid", id="header cut"),
        pytest.param(file_of(b'{"a": 1}', b""), "header is not valid", id="not an entry"),
        pytest.param(file_of(b"\xff\xfe{}", b""), "header is not valid", id="not UTF-8"),
        pytest.param(file_of({"a": entry(0, 4, [5])}, b"1234"), "'a' lies", id="shape too large"),
        pytest.param(
            file_of({"a": entry(0, 8, [8])}, b"1234"), "end at byte 8 of 4", id="past end"
        ),
        pytest.param(file_of({"a": entry(0, 2, [2])}, b"1234"), "end at byte 2 of 4", id="surplus"),
        pytest.param(file_of({"a": entry(2, 4, [2])}, b"1234"), "'a' lies", id="gap"),
        pytest.param(
            file_of({"a": entry(0, 3, [3]), "b": entry(2, 4, [2])}, b"1234"),
            "'b' lies",
            id="overlap",
        ),
        pytest.param(
            file_of({"a": entry(0, 4, [-2, -2])}, b"1234"), r"shape \(-2, -2\)", id="negative shape"
        ),
        pytest.param(
            file_of({"a": entry(0, 4, [4], "F3")}, b"1234"), "dtype F3", id="unknown dtype"
        ),
        pytest.param(file_of({"a": entry(-4, 0, [4])}, b"1234"), "'a' lies", id="negative offset"),
    ],
)
def test_a_malformed_file_is_refused_with_its_fault(tmp_path, content, reason):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(DigestMismatch, match=reason):
        read_safetensors(path)
