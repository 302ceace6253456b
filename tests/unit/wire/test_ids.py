from __future__ import annotations

import pytest

from homefire.wire.errors import InvalidArgument
from homefire.wire.ids import check_name, model_id, new_id


@pytest.mark.parametrize("name", ["step_00010-4b50536f", "a", "A.b:c-d_e", "x" * 128])
def test_ordinary_names_pass(name):
    assert check_name(name, field="path") == name


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "a..b", ".hidden", "-x", "x" * 129, "a b", "a\0"]
)
def test_anything_that_could_be_a_path_is_refused_by_field(name):
    with pytest.raises(InvalidArgument) as caught:
        check_name(name, field="path")
    assert caught.value.field == "path"
    assert caught.value.hint


def test_fresh_ids_differ_and_are_names():
    ids = {new_id("job") for _ in range(50)}
    assert len(ids) == 50
    assert all(check_name(i, field="id") for i in ids)


def test_the_model_id_follows_the_clients_own_rule():
    assert model_id("sess-1", 0) == "sess-1:train:0"
