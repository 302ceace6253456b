from __future__ import annotations

import asyncio

from homefire.control.holding import Holder
from homefire.foundation.versioned import Versioned


async def test_what_has_settled_is_answered_at_once() -> None:
    holder = Holder(Versioned(0), hold_s=60.0)
    assert await holder.hold(lambda: _value("done"), settled=lambda seen: True) == "done"


async def test_a_request_is_held_until_a_pass_has_settled_it() -> None:
    passes, values = Versioned(0), ["a", "b", "done"]
    looks = 0

    async def look() -> str:
        nonlocal looks
        looks += 1
        return values[min(looks, 3) - 1]

    holder = Holder(passes, hold_s=60.0)
    held = asyncio.create_task(holder.hold(look, settled=lambda seen: seen == "done"))
    while not held.done():
        await asyncio.sleep(0)
        passes.set(passes.get() + 1)
    assert held.result() == "done"
    assert looks == 3


async def test_without_patience_what_was_seen_is_answered() -> None:
    holder = Holder(Versioned(0), hold_s=0.0)
    assert await holder.hold(lambda: _value("on its way"), settled=lambda s: False) == "on its way"


async def test_release_answers_what_is_held_and_holds_no_more() -> None:
    holder = Holder(Versioned(0), hold_s=60.0)
    held = asyncio.create_task(holder.hold(lambda: _value("as it is"), settled=lambda s: False))
    await asyncio.sleep(0)
    holder.release()
    assert await held == "as it is"
    assert await holder.hold(lambda: _value("later"), settled=lambda s: False) == "later"


async def _value(text: str) -> str:
    return text
