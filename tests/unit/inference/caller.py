"""Calls an ASGI application in the test's own event loop, without sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from homefire.wire.internal import HotLoadStage, ReplicaStatus
from unit.inference.canaries import LOCATION

SECRET = "s3cret"


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """As an SSE client reads them; the last must be [DONE]."""
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Caller:
    """Calls an ASGI application in this event loop; a call can hang up in the middle."""

    def __init__(self, app: Any, model_directory: str = "") -> None:
        self._app = app
        self.model_directory = model_directory

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        query: str = "",
        secret: str = SECRET,
        headers: dict[str, str] | None = None,
        hang_up: Callable[[bytes], bool] = lambda received: False,
        reader: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> Answered:
        """`hang_up` is asked after every piece of the answer; True means the client goes away. `reader`
        takes its time over each."""
        given = {"x-homefire-secret": secret, **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        pending = [
            {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}
        ]
        gone = asyncio.Event()
        answered = Answered(0, {}, b"")

        async def receive() -> dict[str, Any]:
            if pending:
                return pending.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                answered.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                answered.body += message.get("body", b"")
                if reader is not None:
                    await reader(answered.body)
                if hang_up(answered.body):
                    gone.set()

        await self._app(scope, receive, send)
        return answered

    async def post(self, path: str, body: Any, **options: Any) -> Answered:
        return await self.call("POST", path, body, **options)

    async def complete(self, **body: Any) -> Answered:
        return await self.post("/inference/v1/completions", body)

    async def chat(self, **body: Any) -> Answered:
        return await self.post("/inference/v1/chat/completions", body)

    async def status(self, query: str = "") -> ReplicaStatus:
        answered = await self.call("GET", "/internal/status", query=query)
        assert answered.status == 200
        return msgspec.json.decode(answered.body, type=ReplicaStatus)

    async def wait(self, condition: Callable[[ReplicaStatus], bool]) -> ReplicaStatus:
        async with asyncio.timeout(20):
            status = await self.status()
            while not condition(status):
                status = await self.status(f"after={status.version}&wait_s=20")
            return status

    async def hot_load(
        self, identity: str | None, *, reset_prompt_cache: bool = True, **options: Any
    ) -> ReplicaStatus:
        """Requests it and waits for how it ends."""
        await self.begin_hot_load(identity, reset_prompt_cache=reset_prompt_cache, **options)
        return await self.wait(lambda s: s.stage in {HotLoadStage.IDLE, HotLoadStage.ERROR})

    async def begin_hot_load(self, identity: str | None, **options: Any) -> None:
        location = None if identity is None else msgspec.to_builtins(LOCATION)
        body = {"identity": identity, "location": location, **options}
        assert (await self.post("/internal/hot_load", body)).status == 202

    async def until_running(self) -> None:
        async with asyncio.timeout(20):
            while not (await self.status()).running:
                await asyncio.sleep(0)

    async def until_idle(self) -> None:
        """Until the engine holds nothing; each turn lets its messages in."""
        async with asyncio.timeout(20):
            while (status := await self.status()).running or status.queued:
                await asyncio.sleep(0)
