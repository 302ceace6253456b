"""`sessions/search`: which sessions match, in which order, and where the next page starts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from homefire.control.db.rows import TinkerSessionRow
from homefire.foundation.clock import rfc3339
from homefire.wire.errors import InvalidArgument
from homefire.wire.tinker_rest import SearchCursor, SessionSearch, StatusQuery

LARGEST_LIMIT = 200
ACTIVE_S = 180.0
"""A session that was heard of so lately is running: rows of heartbeats are up to a minute old."""
_STATUSES = ("active", "cancelled", "failed", "client_finished")
_OWNERS = ("own", "accessible", "user")


def check_search(search: SessionSearch) -> None:
    if not 1 <= search.limit <= LARGEST_LIMIT:
        raise InvalidArgument(
            f"limit is {search.limit}", hint=f"use 1 to {LARGEST_LIMIT}", field="limit"
        )
    if search.owner.type not in _OWNERS:
        raise _unknown("owner.type", search.owner.type, _OWNERS)
    for query in search.statuses or []:
        if query.type not in _STATUSES:
            raise _unknown("statuses.type", query.type, _STATUSES)
    _start(search.cursor)


def search_sessions(
    sessions: Iterable[TinkerSessionRow], search: SessionSearch, *, now: float
) -> tuple[list[TinkerSessionRow], SearchCursor | None]:
    """A page of an account's sessions, newest first, and the cursor of the next one."""
    start = _start(search.cursor)
    found = sorted((s for s in sessions if _matches(s, search, now)), key=_place, reverse=True)
    if start is not None:
        found = [s for s in found if _place(s) < start]
    page = found[: search.limit]
    if len(found) <= search.limit:
        return page, None
    return page, SearchCursor(rfc3339(page[-1].created_at), page[-1].id)


def status_of(session: TinkerSessionRow, *, now: float) -> dict[str, object] | None:
    """As the protocol says it; None: neither finished nor known to be running."""
    if session.finished_at is not None:
        reason = {"type": session.finish_reason}
        detail = session.finish_detail or None
        return {"type": "client_finished", "reason": reason, "detail": detail}
    return {"type": "active"} if now - session.heartbeat_at < ACTIVE_S else None


def _matches(session: TinkerSessionRow, search: SessionSearch, now: float) -> bool:
    return (
        _has_owner(session, search)
        and _has_name(session, search)
        and (search.project_ids is None or session.project_id in search.project_ids)
        and _has_metadata(session.user_metadata, search.user_metadata)
        and (search.statuses is None or any(_has_status(session, q, now) for q in search.statuses))
    )


def _has_owner(session: TinkerSessionRow, search: SessionSearch) -> bool:
    return search.owner.type != "user" or session.account in search.owner.owner_urns


def _has_name(session: TinkerSessionRow, search: SessionSearch) -> bool:
    """The id or the words of the display name; either will do where both are given."""
    if search.session_id is None and search.display_name is None:
        return True
    if search.session_id == session.id:
        return True
    name = (session.display_name or "").lower()
    words = (search.display_name or "").lower().split()
    return bool(words) and all(word in name for word in words)


def _has_metadata(given: Mapping[str, object], wanted: Mapping[str, str]) -> bool:
    return all(key in given and str(given[key]) == value for key, value in wanted.items())


def _has_status(session: TinkerSessionRow, query: StatusQuery, now: float) -> bool:
    status = status_of(session, now=now)
    if status is None or status["type"] != query.type:
        return False
    return query.reasons is None or session.finish_reason in query.reasons


def _place(session: TinkerSessionRow) -> tuple[datetime, str]:
    """Sessions in the order of their making; clients give times back in microseconds."""
    return datetime.fromtimestamp(session.created_at, tz=UTC), session.id


def _start(cursor: SearchCursor | None) -> tuple[datetime, str] | None:
    if cursor is None:
        return None
    try:
        created_at = datetime.fromisoformat(cursor.last_created_at)
    except ValueError as exc:
        raise _bad_cursor(cursor) from exc
    if created_at.tzinfo is None:
        raise _bad_cursor(cursor)
    return created_at, cursor.last_session_id


def _bad_cursor(cursor: SearchCursor) -> InvalidArgument:
    return InvalidArgument(
        f"cursor.last_created_at {cursor.last_created_at[:40]!r} is no time",
        hint="give the next_cursor of the page before, unchanged",
        field="cursor",
    )


def _unknown(field: str, value: str, known: Iterable[str]) -> InvalidArgument:
    return InvalidArgument(
        f"{field} {value!r} is unknown", hint=f"use {', '.join(known)}", field=field
    )
