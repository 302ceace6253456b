from __future__ import annotations

import msgspec
import pytest

from homefire.checkpoints import Manifest
from homefire.checkpoints.manifest_file import decode_manifest, encode_manifest
from homefire.wire.errors import DigestMismatch, Unsupported


@pytest.fixture
def manifest(trainer, make_tensors) -> Manifest:
    return trainer.base("s0", make_tensors(), metadata={"note": 'a "quoted"\n}'})


def test_a_manifest_is_read_back_as_it_was(manifest):
    assert decode_manifest(encode_manifest(manifest), source="m") == manifest


def test_it_is_plain_json_for_other_readers(manifest):
    assert msgspec.json.decode(encode_manifest(manifest), type=Manifest) == manifest


def test_every_single_changed_byte_is_detected(manifest):
    data = encode_manifest(manifest)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(DigestMismatch, match="checksum"):
            decode_manifest(bytes(damaged), source="m")


def test_a_manifest_from_a_newer_version_asks_for_an_upgrade(manifest):
    newer = msgspec.structs.replace(manifest, format=99)
    with pytest.raises(Unsupported, match="format 99"):
        decode_manifest(encode_manifest(newer), source="m")
