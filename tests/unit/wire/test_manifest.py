from __future__ import annotations

from homefire.wire.manifest import TensorEntry, weights_header, whole_digest


def entry(digest: str = "aa", dtype: str = "BF16", shape: tuple[int, ...] = (2, 3)) -> TensorEntry:
    return TensorEntry(dtype, shape, digest)


def test_the_whole_digest_does_not_depend_on_the_order_of_names():
    one = {"a": entry("1"), "b": entry("2")}
    other = {"b": entry("2"), "a": entry("1")}
    assert whole_digest(one) == whole_digest(other)


def test_the_whole_digest_changes_with_any_part_of_any_tensor():
    digests = {
        whole_digest({"a": entry()}),
        whole_digest({"b": entry()}),
        whole_digest({"a": entry(digest="bb")}),
        whole_digest({"a": entry(dtype="F16")}),
        whole_digest({"a": entry(shape=(3, 2))}),
        whole_digest({"a": entry(), "b": entry()}),
    }
    assert len(digests) == 6


def test_the_header_names_identity_and_digest():
    assert weights_header("step_1", "ff") == "step_1; sha=ff"
