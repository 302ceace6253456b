from __future__ import annotations

import asyncio

from homefire.foundation.versioned import Versioned


async def test_a_waiter_with_an_old_version_is_answered_at_once():
    status = Versioned("a")
    status.set("b")
    assert await status.wait_beyond(after=1, timeout_s=60) == (2, "b")


async def test_a_waiter_with_the_current_version_wakes_at_the_change():
    status = Versioned("a")
    waiting = asyncio.create_task(status.wait_beyond(after=1, timeout_s=60))
    await asyncio.sleep(0)
    assert not waiting.done()
    status.set("b")
    assert await waiting == (2, "b")


async def test_a_waiter_that_sees_no_change_gets_the_same_version_after_its_time():
    assert await Versioned("a").wait_beyond(after=1, timeout_s=0) == (1, "a")


async def test_a_reader_without_a_version_never_waits():
    assert await Versioned("a").wait_beyond(after=None, timeout_s=60) == (1, "a")
