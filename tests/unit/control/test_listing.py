from __future__ import annotations

from typing import Any

import pytest

from homefire.control.listing import Listing
from homefire.wire.errors import InvalidArgument
from homefire.wire.resources import Model, ModelKind, ModelState, PeftDetails


def model(
    name: str, *, rank: int | None = None, create_time: str = "2026-01-01T00:00:00Z"
) -> Model:
    return Model(
        name=name,
        create_time=create_time,
        state=ModelState.READY,
        kind=ModelKind.HF_BASE_MODEL if rank is None else ModelKind.HF_PEFT_ADDON,
        source="promoted",
        peft_details=None if rank is None else PeftDetails(base_model="tiny", r=rank),
    )


MODELS = [
    model("b", create_time="2026-01-02T00:00:00Z"),
    model("a", create_time="2026-01-03T00:00:00Z"),
    model("c", rank=8),
    model("d", rank=32),
]


def names(**query: str) -> list[str]:
    return [found.name for found in Listing.of(query).apply(MODELS).items]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ["b", "a", "c", "d"]),
        ('kind="HF_PEFT_ADDON"', ["c", "d"]),
        ("kind = HF_PEFT_ADDON AND peft_details.r >= 16", ["d"]),
        ("peftDetails.r<16", ["c"]),
        ('create_time > "2026-01-02T00:00:00Z"', ["a"]),
        ("name!=a", ["b", "c", "d"]),
        ("state=UPLOADING", []),
    ],
)
def test_a_filter_keeps_what_it_says(text: str, found: list[str]) -> None:
    assert names(filter=text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("name", ["a", "b", "c", "d"]),
        ("create_time desc", ["a", "b", "c", "d"]),
        ("kind desc,createTime", ["c", "d", "b", "a"]),
        ("peft_details.r desc", ["d", "c", "b", "a"]),
    ],
)
def test_an_order_sorts_by_its_fields_and_keeps_the_rest(text: str, found: list[str]) -> None:
    assert names(orderBy=text) == found


@pytest.mark.parametrize(
    "query",
    [
        {"filter": "kind"},
        {"filter": "kind=a OR kind=b"},
        {"filter": "no_such_field=1"},
        {"filter": "peft_details=1"},
        {"filter": "peft_details.r=eight"},
        {"orderBy": "no_such_field"},
        {"orderBy": "name sideways"},
    ],
)
def test_what_is_not_understood_is_refused_and_never_left_out(query: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        names(**query)
    assert refused.value.field == next(iter(query))


def test_pages_and_totals_are_of_what_was_kept() -> None:
    query = {"filter": "kind=HF_PEFT_ADDON", "orderBy": "name desc", "pageSize": "1"}
    first = Listing.of(query).apply(MODELS)
    second = Listing.of({**query, "pageToken": first.next_page_token}).apply(MODELS)
    assert [found.name for found in (*first.items, *second.items)] == ["d", "c"]
    assert (first.total_size, second.next_page_token) == (2, "")
