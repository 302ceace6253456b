from __future__ import annotations

import inspect

import pytest

from homefire.wire import errors
from homefire.wire.errors import ERRORS_BY_CODE, ErrorRecord, HomefireError, error_body

CLASSES = list(ERRORS_BY_CODE.values())


def test_every_error_has_a_code_of_its_own():
    declared = [
        cls for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, HomefireError) and cls is not HomefireError
    ]  # fmt: skip
    assert len(ERRORS_BY_CODE) == len(declared)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_crosses_a_process_and_comes_back_as_the_same_class(cls):
    record = ErrorRecord.of(cls("what happened", hint="what to do", field="data[0]"))
    again = record.exception()
    assert type(again) is cls
    assert (again.message, again.hint, again.field) == ("what happened", "what to do", "data[0]")


@pytest.mark.parametrize("cls", CLASSES)
def test_no_user_error_is_answered_with_a_status_that_clients_retry_for_ever(cls):
    retried = {408, 409, 429, 500, 502, 503, 504}
    if cls.category is errors.Category.USER and cls is not errors.AlreadyExists:
        assert cls.http_status not in retried


@pytest.mark.parametrize("cls", CLASSES)
def test_a_body_carries_all_that_every_client_dialect_reads(cls):
    body = error_body(cls("what", hint="do"), request_id="r1")
    assert set(body["error"]) >= {"code", "category", "message", "hint", "request_id"}
    assert body["error"]["request_id"] == "r1"
    assert isinstance(body["code"], int)
    assert "what" in body["message"]
    assert "do" in body["message"]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_client_finds_the_reason_of_an_error_on_the_level_that_it_reads(cls):
    body = error_body(cls("what", field="data[0]"), request_id="r1")
    for level in (body, body["error"]):
        (info,) = level["details"]
        assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
        assert info["reason"] == cls.code.upper()
        assert info["metadata"] == {"request_id": "r1", "field": "data[0]"}


def test_wrong_weights_are_told_beside_the_right_ones():
    body = error_body(errors.WeightsMismatch("what", current="step_00010"), request_id="r1")
    assert body["error"]["current_identity"] == "step_00010"


def test_the_tree_in_the_docstring_names_every_error():
    drawn = errors.__doc__ or ""
    missing = [cls.__name__ for cls in CLASSES if cls.__name__ not in drawn]
    assert missing == []


def test_an_unknown_code_from_a_newer_peer_becomes_an_internal_error():
    assert type(errors.from_code("from_the_future", "x")) is errors.InternalError


def test_an_error_read_from_its_body_says_its_hint_once():
    told = errors.InvalidArgument("rank is -1", hint="use 1 or more", field="rank")
    read = errors.error_of_body(errors.error_body(told, request_id="r1"))
    assert type(read) is errors.InvalidArgument
    assert (read.message, read.hint, read.field) == ("rank is -1", "use 1 or more", "rank")
    assert str(read) == str(told)
