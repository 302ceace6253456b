from __future__ import annotations

import os

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from homefire.http.ranged import CHUNK_BYTES, Body, Bytes, OpenFile, ranged_response

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def make_body(tmp_path):
    """Two files with a few bytes around them; what was opened is remembered."""
    opened = []

    def make(first: bytes = CONTENT, second: bytes = b"tail") -> Body:
        pieces = []
        for name, data in (("a", first), ("b", second)):
            (tmp_path / name).write_bytes(data)
            file = OpenFile(tmp_path / name)
            opened.append(file)
            pieces += [Bytes(f"<{name}>".encode()), file]
        return Body(pieces, "application/x-test", "test.bin", "tag")

    make.opened = opened
    return make


WHOLE = b"<a>" + CONTENT + b"<b>tail"


async def ask(body: Body, method: str = "GET", **headers: str) -> httpx.Response:
    async def answer(request):
        return ranged_response(request, body)

    app = Starlette(routes=[Route("/", answer, methods=["GET", "HEAD"])])
    transport = httpx.ASGITransport(app=app)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, "/", headers=headers)


def is_closed(file: OpenFile) -> bool:
    try:
        os.fstat(file._descriptor)
    except OSError:
        return True
    return False


async def test_the_whole_body_with_its_length_and_its_tag(make_body):
    answer = await ask(make_body())
    assert (answer.status_code, answer.content) == (200, WHOLE)
    assert answer.headers["content-length"] == str(len(WHOLE))
    assert answer.headers["etag"] == '"tag"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert all(map(is_closed, make_body.opened))


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=2-4", 2, 5),
        ("bytes=3-5122", 3, 5123),
        ("bytes=5120-", 5120, len(WHOLE)),
        ("bytes=-6", len(WHOLE) - 6, len(WHOLE)),
        ("bytes=-99999999", 0, len(WHOLE)),
        ("bytes=5125-99999999", 5125, len(WHOLE)),
    ],
)
async def test_a_range_goes_over_the_borders_of_pieces(make_body, asked, start, end):
    answer = await ask(make_body(), range=asked)
    assert (answer.status_code, answer.content) == (206, WHOLE[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(WHOLE)}"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize("asked", ["bytes=5130-", "bytes=5130-6000", "bytes=-0"])
async def test_a_range_outside_is_refused_with_the_size(make_body, asked):
    assert len(WHOLE) == 5130
    answer = await ask(make_body(), range=asked)
    assert (answer.status_code, answer.content) == (416, b"")
    assert answer.headers["content-range"] == "bytes */5130"
    assert all(map(is_closed, make_body.opened))


@pytest.mark.parametrize(
    "asked", ["bytes=-", "bytes=1-2,4-5", "lines=1-2", "bytes=5-2", "bytes=a-b", "1-2", "bytes=1"]
)
async def test_what_is_no_single_range_gets_the_whole(make_body, asked):
    answer = await ask(make_body(), range=asked)
    assert (answer.status_code, answer.content) == (200, WHOLE)


async def test_a_range_of_another_version_gets_the_whole(make_body):
    same = await ask(make_body(), range="bytes=0-1", if_range='"tag"')
    other = await ask(make_body(), range="bytes=0-1", if_range='"older"')
    assert (same.status_code, other.status_code) == (206, 200)


async def test_a_head_says_how_much_there_is_and_opens_nothing_for_long(make_body):
    answer = await ask(make_body(), "HEAD")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(WHOLE))
    assert all(map(is_closed, make_body.opened))


async def test_a_file_that_is_deleted_meanwhile_is_sent_to_its_end(make_body, tmp_path):
    body = make_body()
    (tmp_path / "a").unlink()
    assert (await ask(body)).content == WHOLE


def test_no_chunk_is_larger_than_the_bound(make_body):
    body = make_body(bytes(3 * CHUNK_BYTES + 5))
    sizes = [len(chunk) for chunk in body.chunks(0, body.size)]
    assert max(sizes) == CHUNK_BYTES
    assert sum(sizes) == body.size
    body.close()


async def test_a_file_that_shrank_breaks_the_answer_off(make_body, tmp_path):
    body = make_body()
    os.truncate(tmp_path / "a", 10)
    with pytest.raises(OSError, match="shrank"):
        await ask(body)
    assert all(map(is_closed, make_body.opened))
