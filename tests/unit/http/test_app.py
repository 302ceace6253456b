from __future__ import annotations

import secrets

import httpx
import msgspec
import pytest
import zstandard
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.http import bodies
from homefire.http.app import account_of, service_app
from homefire.http.bodies import json_response, read_body, read_json
from homefire.wire.errors import InvalidArgument, Superseded


class Point(msgspec.Struct):
    x: int


async def echo(request: Request) -> Response:
    return json_response((await read_json(request, Point)).x)


async def size(request: Request) -> Response:
    return json_response(len(await read_body(request, max_bytes=1000)))


async def fail(request: Request) -> Response:
    raise Superseded("superseded by session s2", hint="connect again")


async def crash(request: Request) -> Response:
    raise RuntimeError("a bug")


async def whose(request: Request) -> Response:
    return json_response(account_of(request))


@pytest.fixture
def client():
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/size", size, methods=["POST"]),
        Route("/fail", fail),
        Route("/crash", crash),
        Route("/whose", whose),
    ]
    app = service_app(routes, secret="s3cret")
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app, raise_app_exceptions=False),
        base_url="http://service",
        headers={"x-homefire-secret": "s3cret"},
    )


@pytest.mark.parametrize("secret", ["", "wrong", "s3cre", "s3cret "])
async def test_nobody_without_the_secret_reaches_any_route(client, secret):
    for path in ("/echo", "/fail", "/nowhere"):
        answer = await client.get(path, headers={"x-homefire-secret": secret})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "unauthenticated"


async def test_an_error_is_answered_with_its_code_hint_and_request_id(client):
    answer = await client.get("/fail", headers={"x-request-id": "r-7"})
    assert answer.status_code == 400
    assert answer.headers["x-request-id"] == "r-7"
    assert answer.json()["error"] == {
        "code": "superseded",
        "category": "user",
        "message": "superseded by session s2 (connect again)",
        "hint": "connect again",
        "request_id": "r-7",
        "type": "invalid_request_error",
        "param": None,
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "SUPERSEDED",
                "domain": "homefire",
                "metadata": {"request_id": "r-7"},
            }
        ],
    }


async def test_a_bug_is_answered_in_the_same_shape(client):
    answer = await client.get("/crash")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert answer.json()["error"]["request_id"]


async def test_a_request_id_that_could_forge_a_log_line_is_replaced(client):
    answer = await client.get("/fail", headers={"x-request-id": "a b" + "c" * 300})
    assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"]
    assert " " not in answer.headers["x-request-id"]


async def test_unknown_routes_and_methods_are_typed_errors(client):
    assert (await client.get("/nowhere")).json()["error"]["code"] == "not_found"
    answer = await client.get("/echo")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "invalid_argument"


async def test_a_405_does_not_change_what_other_errors_answer(client):
    await client.get("/echo")
    assert (await client.post("/echo", content=b"{")).status_code == 400


@pytest.mark.parametrize(
    ("body", "said"), [(b"{", "not JSON"), (b'{"x":"one"}', "$.x"), (b"{}", "missing")]
)
async def test_a_bad_body_is_refused_naming_what_is_wrong(client, body, said):
    answer = await client.post("/echo", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


async def test_unknown_fields_are_ignored(client):
    assert (await client.post("/echo", content=b'{"x":1,"later":2}')).json() == 1


async def test_a_body_over_the_cap_is_refused_by_its_declared_and_its_real_size(client):
    assert (await client.post("/size", content=b"x" * 1001)).status_code == 413

    async def chunks():
        for _ in range(11):
            yield b"x" * 100

    assert (await client.post("/size", content=chunks())).status_code == 413
    assert (await client.post("/size", content=b"x" * 1000)).json() == 1000


async def test_a_zstd_body_is_decompressed_under_a_cap(client, monkeypatch):
    packed = zstandard.compress(b'{"x":3}')
    headers = {"content-encoding": "zstd"}
    assert (await client.post("/echo", content=packed, headers=headers)).json() == 3
    monkeypatch.setattr(bodies, "MAX_DECOMPRESSED_BYTES", 10_000)
    bomb = zstandard.compress(b"x" * 1_000_000)
    assert len(bomb) < 1000
    answer = await client.post("/size", content=bomb, headers=headers)
    assert answer.status_code == 413


async def test_a_zstd_body_that_unpacks_beyond_any_honest_ratio_is_refused(client, monkeypatch):
    headers = {"content-encoding": "zstd"}
    monkeypatch.setattr(bodies, "_SMALL_BYTES", 10_000)
    honest = zstandard.compress(bytes(range(256)) * 39)
    assert (await client.post("/size", content=honest, headers=headers)).status_code == 200
    bomb = zstandard.compress(b"x" * 1_000_000)
    answer = await client.post("/size", content=bomb, headers=headers)
    assert answer.status_code == 413
    assert "unpacks to more than 10000 bytes" in answer.text


def test_a_zstd_body_of_several_frames_is_read_whole():
    frames = [zstandard.compress(bytes([n]) * (5000 * n + 1)) for n in range(4)]
    unpacked = b"".join(bytes([n]) * (5000 * n + 1) for n in range(4))
    assert bodies.decompress_zstd(b"".join(frames)) == unpacked


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_half_a_zstd_frame_is_refused(kept):
    """A protobuf body cut between two datums would still parse."""
    body = zstandard.compress(secrets.token_bytes(100_000))
    with pytest.raises(InvalidArgument, match="middle of a frame"):
        bodies.decompress_zstd(body[: int(kept * len(body))])


async def test_a_damaged_zstd_body_is_a_user_error(client):
    answer = await client.post("/size", content=b"nonsense", headers={"content-encoding": "zstd"})
    assert answer.status_code == 400


async def test_the_account_comes_from_the_gateway(client):
    assert (await client.get("/whose", headers={"x-homefire-account": "a1"})).json() == "a1"
    assert (await client.get("/whose")).status_code == 401
