"""`sessions/search` as a pure function."""

from __future__ import annotations

import pytest

from homefire.control.db.rows import TinkerSessionRow
from homefire.control.tinker.search import ACTIVE_S, check_search, search_sessions, status_of
from homefire.wire.errors import InvalidArgument
from homefire.wire.tinker_rest import Owner, SearchCursor, SessionSearch, StatusQuery

NOW = 1_800_000_000.25


@pytest.fixture
def make_session():
    def make(number: int = 0, **fields) -> TinkerSessionRow:
        values = {"created_at": NOW - 1000.0 + number, "heartbeat_at": NOW, **fields}
        return TinkerSessionRow(id=f"ts-{number:016x}", account="local", **values)

    return make


def found(sessions, **search) -> list[str]:
    page, _ = search_sessions(sessions, SessionSearch(**search), now=NOW)
    return [session.id for session in page]


def test_pages_hold_everything_once_also_what_began_at_the_same_moment(make_session):
    sessions = [make_session(n, created_at=NOW - n // 3) for n in range(10)]
    seen, cursor = [], None
    for _ in range(4):
        search = SessionSearch(limit=3, cursor=cursor)
        page, cursor = search_sessions(sessions, search, now=NOW)
        seen += [session.id for session in page]
    assert cursor is None
    assert sorted(seen) == sorted(session.id for session in sessions)
    assert seen == [
        s.id for s in sorted(sessions, key=lambda s: (-s.created_at, -int(s.id[3:], 16)))
    ]


def test_a_cursor_counts_however_its_time_is_spelled(make_session):
    sessions = [make_session(n, created_at=1_700_000_000.0 + n) for n in range(3)]
    last = sessions[1].id
    for text in (
        "2023-11-14T22:13:21Z",
        "2023-11-14T23:13:21+01:00",
        "2023-11-14T22:13:21.000000Z",
    ):
        assert found(sessions, cursor=SearchCursor(text, last)) == [sessions[0].id]


def test_words_of_the_name_count_in_any_case_and_order(make_session):
    named, other = make_session(1, display_name="Nightly RL run"), make_session(2)
    for name in ("nightly", "RUN night", "rl"):
        assert found([named, other], display_name=name) == [named.id]
    assert found([named, other], display_name="nightly sl") == []
    assert found([named, other], display_name="nightly", session_id=other.id) == [
        other.id,
        named.id,
    ]
    assert found([named, other], session_id=other.id) == [other.id]


def test_metadata_projects_and_owners_restrict(make_session):
    a = make_session(1, user_metadata={"seed": 3, "kind": "rl"}, project_id="p")
    b = make_session(2, user_metadata={"seed": 4})
    assert found([a, b], user_metadata={"seed": "3"}) == [a.id]
    assert found([a, b], user_metadata={"seed": "3", "kind": "sl"}) == []
    assert found([a, b], project_ids=["p", "q"]) == [a.id]
    assert found([a, b], project_ids=[]) == []
    for owner in (Owner("own"), Owner("accessible"), Owner("user", ["local"])):
        assert found([a, b], owner=owner) == [b.id, a.id]
    assert found([a, b], owner=Owner("user", ["somebody"])) == []


def test_a_status_is_what_is_known(make_session):
    running = make_session(1)
    silent = make_session(2, heartbeat_at=NOW - ACTIVE_S)
    done = make_session(3, finished_at=NOW, finish_reason="success")
    broken = make_session(4, finished_at=NOW, finish_reason="errored", finish_detail="OOM")
    sessions = [running, silent, done, broken]
    assert [status_of(s, now=NOW) for s in sessions] == [
        {"type": "active"},
        None,
        {"type": "client_finished", "reason": {"type": "success"}, "detail": None},
        {"type": "client_finished", "reason": {"type": "errored"}, "detail": "OOM"},
    ]
    finished = StatusQuery("client_finished")
    errored = StatusQuery("client_finished", ["errored", "interrupted"])
    assert found(sessions, statuses=[finished]) == [broken.id, done.id]
    assert found(sessions, statuses=[errored]) == [broken.id]
    assert found(sessions, statuses=[errored, StatusQuery("active")]) == [broken.id, running.id]
    assert found(sessions, statuses=[StatusQuery("failed")]) == []


@pytest.mark.parametrize(
    ("search", "field"),
    [
        (SessionSearch(limit=0), "limit"),
        (SessionSearch(limit=201), "limit"),
        (SessionSearch(owner=Owner("nobody")), "owner.type"),
        (SessionSearch(statuses=[StatusQuery("lost")]), "statuses.type"),
        (SessionSearch(cursor=SearchCursor("yesterday", "ts-1")), "cursor"),
        (SessionSearch(cursor=SearchCursor("2023-11-14T22:13:21", "ts-1")), "cursor"),
    ],
)
def test_a_search_that_makes_no_sense_names_the_field(search, field):
    with pytest.raises(InvalidArgument) as caught:
        check_search(search)
    assert caught.value.field == field
