"""Numbers of JSON arrays without a Python object for each, against Python's own reading."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.wire.errors import InvalidArgument
from homefire.wire.json_numbers import NumberReader, encode_with_arrays

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


@given(st.lists(st.one_of(INT64, INT64.filter(lambda n: abs(n) < 2**53).map(float))))
def test_integers_are_read_as_python_reads_them(values: list[int | float]) -> None:
    found = NumberReader().values(raw(json.dumps(values)), "int64", "x")
    assert found.dtype == np.int64
    assert found.tolist() == [int(value) for value in values]


@given(st.lists(st.one_of(FLOATS, INT64)))
def test_floats_are_read_as_python_reads_them(values: list[float]) -> None:
    found = NumberReader().values(raw(json.dumps(values)), "float32", "x")
    with np.errstate(over="ignore"):
        wanted = np.array(json.loads(json.dumps(values)), np.float64).astype(np.float32)
    assert found.tobytes() == wanted.tobytes()


@given(st.lists(st.integers(-(2**70), 2**70)))
def test_tokens_saturate_and_never_wrap_into_a_vocabulary(tokens: list[int]) -> None:
    limits = np.iinfo(np.int32)
    found = np.frombuffer(NumberReader().tokens(raw(json.dumps(tokens)), "x"), np.int32)
    assert found.tolist() == [max(min(token, limits.max), limits.min) for token in tokens]


@pytest.mark.parametrize(
    "text", ["[[1,2],[3]]", "[1,[2]]", "[true]", "[null]", '["1"]', '{"a":1}', "3", "null", "[1 2]"]
)
@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_what_is_no_flat_array_of_numbers_is_refused_by_name(text: str, dtype: str) -> None:
    with pytest.raises(InvalidArgument, match="x is no array of numbers"):
        NumberReader().values(raw(text), dtype, "x")
    with pytest.raises(InvalidArgument, match="x is no array of numbers"):
        NumberReader().tokens(raw(text), "x")


@pytest.mark.parametrize("text", ["[0.5]", "[1, 1e30]", "[9223372036854775808]"])
def test_what_is_no_int64_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"fractions|beyond int64"):
        NumberReader().values(raw(text), "int64", "x")


@given(st.lists(FLOATS))
def test_arrays_are_written_digit_for_digit(values: list[float]) -> None:
    body = encode_with_arrays({"data": np.array(values, np.float64)})
    assert json.loads(body) == {"data": values}
