from __future__ import annotations

import numpy as np
import pytest
import torch

from homefire.checkpoints import digest_tensors, read_model_directory, whole_digest
from homefire.model.tensors import (
    from_raw,
    load_serving_tensors,
    memory_digest,
    raw,
    serving_tensors,
)
from homefire.wire.errors import InvalidArgument
from homefire.wire.tensors import RawTensor


def snapshot_of(model):
    return {name: raw(tensor) for name, tensor in serving_tensors(model).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_raw_tensors_round_trip_every_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-128, 128, (6, 8), generator=generator, dtype=torch.int8)
    tensor = bits.view(dtype)
    again = from_raw(raw(tensor))
    assert again.dtype == dtype
    assert again.shape == tensor.shape
    assert torch.equal(again.view(torch.int8), bits)


def test_a_read_only_view_of_a_file_can_be_read():
    data = np.arange(8, dtype=np.uint8)
    data.flags.writeable = False
    tensor = from_raw(RawTensor("BF16", (4,), data))
    assert tensor.view(torch.uint8).tolist() == list(range(8))


def test_the_digest_in_memory_is_that_of_the_files(tiny, tiny_directory):
    on_disk = whole_digest(digest_tensors(read_model_directory(tiny_directory)))
    assert memory_digest(tiny) == on_disk


def test_a_tied_head_is_left_out_of_a_snapshot(tiny):
    assert tiny.tied == {"lm_head.weight"}
    assert "lm_head.weight" not in serving_tensors(tiny)


def test_loading_a_snapshot_brings_the_digest_with_it_and_keeps_ties(tiny):
    before = snapshot_of(tiny)
    digest = memory_digest(tiny)
    with torch.no_grad():
        for parameter in tiny.module.parameters():
            parameter.mul_(1.5)
    assert memory_digest(tiny) != digest
    load_serving_tensors(tiny, before)
    assert memory_digest(tiny) == digest
    assert tiny.head_weight is tiny.module.get_input_embeddings().weight


def wrong_name(tensors):
    tensors["surplus"] = tensors.pop(sorted(tensors)[-1])


def wrong_shape(tensors):
    name, tensor = sorted(tensors.items())[-1]
    tensors[name] = RawTensor(tensor.dtype, (*tensor.shape, 1), tensor.data)


def wrong_dtype(tensors):
    name, tensor = sorted(tensors.items())[-1]
    tensors[name] = RawTensor("F16", tensor.shape, tensor.data)


@pytest.mark.parametrize("spoil", [wrong_name, wrong_shape, wrong_dtype])
def test_a_snapshot_that_does_not_fit_changes_nothing(tiny, spoil):
    digest = memory_digest(tiny)
    tensors = {
        name: RawTensor(t.dtype, t.shape, np.zeros_like(t.data))
        for name, t in snapshot_of(tiny).items()
    }
    spoil(tensors)
    with pytest.raises(InvalidArgument):
        load_serving_tensors(tiny, tensors)
    assert memory_digest(tiny) == digest
