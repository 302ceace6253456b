"""A client that only lives on: a heartbeat every 50 ms until its standard input ends.

    python heartbeats.py URL KEY SESSION        prints [[seconds, …], number of failures]

Each is a task of its own, so that a late one does not hide the next.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import aiohttp

_EVERY_S = 0.05


async def main(url: str, key: str, session: str) -> None:
    seconds: list[float] = []
    failed = 0

    async def beat(http: aiohttp.ClientSession) -> None:
        nonlocal failed
        started = time.perf_counter()
        try:
            async with http.post(url, json={"session_id": session}) as response:
                response.raise_for_status()
        except (aiohttp.ClientError, TimeoutError):
            failed += 1
        else:
            seconds.append(time.perf_counter() - started)

    ended = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.cancel)
    async with aiohttp.ClientSession(headers={"x-api-key": key}) as http:
        await beat(http)
        seconds.clear()
        print("beating", flush=True)
        beats: list[asyncio.Task[None]] = []
        while not ended.done():
            beats.append(asyncio.create_task(beat(http)))
            await asyncio.wait({ended}, timeout=_EVERY_S)
        await asyncio.gather(*beats)
    print(json.dumps([seconds, failed]))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
