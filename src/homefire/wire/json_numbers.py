"""Arrays of numbers in JSON, to numpy and back without a Python object for each number.

A training batch is almost nothing but such arrays: as lists they take longer to read than all the rest
of a request. What simdjson does not take as plain numbers of one kind (3.0 among integers, integers
beyond 64 bits, anything that is no number) is read again, slowly, to say what is wrong with it.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import msgspec
import numpy as np
import orjson
import simdjson

from homefire.wire.engine import Array
from homefire.wire.errors import InvalidArgument

if sys.byteorder != "little":
    raise ImportError("homefire's wire arrays are little-endian, this machine is not")

_Code = Literal["i", "d"]
_DTYPES: dict[str, str] = {"i": "int64", "d": "float64"}
_INT32 = np.iinfo(np.int32)


class NumberReader:
    """Keeps its working memory from one array to the next. For one request, on one thread."""

    def __init__(self) -> None:
        self._parser = simdjson.Parser()

    def tokens(self, raw: msgspec.Raw, field: str) -> bytes:
        """Little-endian int32; what does not fit is far outside any vocabulary, and stays so."""
        found = self._plain(raw, "i")
        if found is None:
            return token_bytes(_slowly(raw, list[int], field))
        if len(found) and found.view(np.uint64).max() > _INT32.max:  # or below zero
            found = found.clip(_INT32.min, _INT32.max)
        return found.astype("<i4").tobytes()

    def values(self, raw: msgspec.Raw, dtype: str, field: str) -> Array:
        """Flat, of that dtype: float32 or int64."""
        check_dtype(dtype, field)
        if dtype == "int64":
            found = self._plain(raw, "i")
            return _whole_numbers(raw, field) if found is None else found
        found = self._plain(raw, "d")
        if found is None:
            found = np.array(_slowly(raw, list[float], field), np.float64)
        with np.errstate(over="ignore"):
            return found.astype(np.float32)

    def _plain(self, raw: msgspec.Raw, code: _Code) -> Array | None:
        """None unless it is a flat array of numbers that all fit: `as_buffer` looks into nested ones."""
        text = bytes(raw)
        if not text.startswith(b"[") or text.find(b"[", 1) >= 0:
            return None
        try:
            found = self._parser.parse(text)
            if not isinstance(found, simdjson.Array):
                return None
            return np.frombuffer(found.as_buffer(of_type=code), dtype=_DTYPES[code])
        except (ValueError, TypeError, RuntimeError):  # all of simdjson's errors
            return None


def token_bytes(tokens: list[int]) -> bytes:
    """Little-endian int32, saturated."""
    saturated = [max(min(token, _INT32.max), _INT32.min) for token in tokens]
    return np.array(saturated, "<i4").tobytes()


def check_dtype(dtype: str, field: str) -> str:
    if dtype not in {"float32", "int64"}:
        raise InvalidArgument(
            f"{field} has dtype {dtype!r}", hint="use float32 or int64", field=field
        )
    return dtype


def _whole_numbers(raw: msgspec.Raw, field: str) -> Array:
    """Integers that were written as 3.0."""
    given = _slowly(raw, list[int | float], field)
    limits = np.iinfo(np.int64)
    if any(not limits.min <= value <= limits.max for value in given):
        raise InvalidArgument(f"{field} holds a number beyond int64", field=field)
    if any(value != int(value) for value in given):
        raise InvalidArgument(f"{field} is int64 but holds fractions", field=field)
    return np.array([int(value) for value in given], np.int64)


def _slowly(raw: msgspec.Raw, kind: Any, field: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as exc:
        raise InvalidArgument(f"{field} is no array of numbers: {exc}", field=field) from exc


def encode_with_arrays(value: Any) -> bytes:
    """JSON of a value that may hold numpy arrays of at least one axis. NaN becomes null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
