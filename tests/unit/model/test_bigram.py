from __future__ import annotations

import numpy as np
import torch

from homefire.model import bigram


def test_rounding_is_torchs_for_every_kind_of_value():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20_000, dtype=np.uint32)
    edges = [
        0x0,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x7F7FFFFF,
        0x00008000,
        0x3F808000,
        0x3F818000,
    ]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(bigram.bfloat16(values), expected)


def test_the_base_is_fixed_and_small(tmp_path):
    weight = bigram.base_weight(bigram.vocab_size_of(tmp_path))
    assert weight.shape == (320, 320)
    assert np.abs(weight).max() < 0.2
    np.testing.assert_array_equal(weight, bigram.base_weight(320))


def test_serving_tensors_round_trip():
    weight = bigram.base_weight(7)
    raw = bigram.to_raw(weight)
    assert (raw.dtype, raw.shape, raw.data.nbytes) == ("BF16", (7, 7), 98)
    np.testing.assert_array_equal(bigram.from_raw(raw), weight)
