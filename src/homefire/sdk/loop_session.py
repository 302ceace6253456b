"""One HTTP session per event loop, shared by all samplers and closed when the loop shuts down.

Scripts call `asyncio.run` once per step and often make a sampler each time, but sockets belong to a
loop. So sessions hang on the loop, not on the sampler.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import aiohttp

_open: dict[
    asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, AsyncGenerator[None, None]]
] = {}


async def current_session() -> aiohttp.ClientSession:
    """The running loop's session. It limits nothing: who sends decides how much.

    Idle connections are dropped after 15 s.
    """
    loop = asyncio.get_running_loop()
    known = _open.get(loop)
    if known is not None:
        return known[0]
    _forget_closed_loops()
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    lifetime = _lifetime(loop, session)
    _open[loop] = session, lifetime
    await anext(lifetime)
    return session


async def _lifetime(
    loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession
) -> AsyncGenerator[None, None]:
    """Holds a session open. `asyncio.run` ends every live async generator of its loop before it
    closes the loop, which is the one moment at which sockets can still be closed properly."""
    try:
        yield
    finally:
        _open.pop(loop, None)
        await session.close()


def _forget_closed_loops() -> None:
    for loop in [loop for loop in _open if loop.is_closed()]:
        del _open[loop]
