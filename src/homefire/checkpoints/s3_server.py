"""A small S3 in memory, over HTTP: for tests and benchmarks of the object store, never for data.

It keeps to what the object store asks of S3 (objects, ranges, conditions, listings, multipart uploads,
copies), checks payload digests as S3 does, and can be told to fail and to lie. Signatures are not
checked: it listens on loopback only.

    with S3Server() as server:
        server.faults.append(fail_once("PUT", status=503))
        os.environ |= server.environment()
"""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_PAGE = 1000


@dataclass
class StoredObject:
    data: bytes
    etag: str
    modified: float


@dataclass
class Reply:
    """What goes back. `cut` sends that many bytes of the body and breaks the connection."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    cut: int | None = None


@dataclass(frozen=True)
class Asked:
    method: str
    bucket: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


Fault = Callable[[Asked, Callable[[], Reply]], Reply | None]
"""Given a request and how it would be answered; None: not this one, ask the next fault."""


class S3Server:
    """One bucket space on a loopback port; use as a context manager."""

    def __init__(self) -> None:
        self.objects: dict[str, StoredObject] = {}
        """By `bucket/key`."""
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        """Every request without its body, in order of arrival."""
        self._count = 0
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.s3 = self
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self) -> dict[str, str]:
        """What a client of it has in its environment."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, asked: Asked) -> Reply:
        with self._lock:
            self.asked.append(
                Asked(asked.method, asked.bucket, asked.key, asked.query, asked.headers, b"")
            )
            faults = list(self.faults)
        for fault in faults:
            reply = fault(asked, lambda: self._honest(asked))
            if reply is not None:
                return reply
        return self._honest(asked)

    def _honest(self, asked: Asked) -> Reply:
        with self._lock:
            return _ACTIONS[_action(asked)](self, asked)

    def put(self, asked: Asked) -> Reply:
        name = f"{asked.bucket}/{asked.key}"
        existing = self.objects.get(name)
        if asked.headers.get("if-none-match") == "*" and existing is not None:
            return _error(412, "PreconditionFailed")
        wanted = asked.headers.get("if-match")
        if wanted is not None and (existing is None or existing.etag != wanted):
            return _error(412, "PreconditionFailed")
        if not _payload_is_right(asked):
            return _error(400, "XAmzContentSHA256Mismatch")
        return Reply(headers={"ETag": self._store(name, asked.body)})

    def copy(self, asked: Asked) -> Reply:
        source = self.objects.get(unquote(asked.headers["x-amz-copy-source"]).lstrip("/"))
        if source is None:
            return _error(404, "NoSuchKey")
        etag = self._store(f"{asked.bucket}/{asked.key}", source.data)
        body = f"<CopyObjectResult {_NAMESPACE}><ETag>{escape(etag)}</ETag></CopyObjectResult>"
        return Reply(body=body.encode())

    def get(self, asked: Asked) -> Reply:
        found = self.objects.get(f"{asked.bucket}/{asked.key}")
        if found is None:
            return _error(404, "NoSuchKey")
        headers = {"ETag": found.etag, "Last-Modified": _http_date(found.modified)}
        span = asked.headers.get("range", "")
        if not span.startswith("bytes="):
            return Reply(body=found.data, headers=headers)
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(found.data), len(found.data))
        if start >= len(found.data):
            return _error(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(found.data)}"
        return Reply(206, found.data[start:stop], headers)

    def delete(self, asked: Asked) -> Reply:
        self.objects.pop(f"{asked.bucket}/{asked.key}", None)
        return Reply(204)

    def delete_many(self, asked: Asked) -> Reply:
        keys = [e.text or "" for e in ElementTree.fromstring(asked.body).iter() if _tag(e) == "Key"]
        for key in keys:
            self.objects.pop(f"{asked.bucket}/{key}", None)
        gone = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return Reply(body=f"<DeleteResult {_NAMESPACE}>{gone}</DeleteResult>".encode())

    def list(self, asked: Asked) -> Reply:
        prefix, delimiter = asked.query.get("prefix", ""), asked.query.get("delimiter", "")
        after = asked.query.get("continuation-token") or asked.query.get("start-after", "")
        bucket = f"{asked.bucket}/"
        keys = sorted(n.removeprefix(bucket) for n in self.objects if n.startswith(bucket))
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        shown, truncated = keys[:_PAGE], len(keys) > _PAGE
        folders = dict.fromkeys(
            prefix + key[len(prefix) :].partition(delimiter)[0] + delimiter
            for key in shown
            if delimiter and delimiter in key[len(prefix) :]
        )
        files = [key for key in shown if not delimiter or delimiter not in key[len(prefix) :]]
        parts = [self._listed(asked.bucket, key) for key in files]
        parts += [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders]
        if truncated:
            parts.append(f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>")
        head = f"<Name>{asked.bucket}</Name><KeyCount>{len(shown)}</KeyCount>"
        head += f"<IsTruncated>{'true' if truncated else 'false'}</IsTruncated>"
        body = f"<ListBucketResult {_NAMESPACE}>{head}{''.join(parts)}</ListBucketResult>"
        return Reply(body=body.encode(), headers={"Content-Type": "application/xml"})

    def begin_upload(self, asked: Asked) -> Reply:
        self._count += 1
        upload = f"upload-{self._count}"
        self.uploads[upload] = {}
        inner = f"<UploadId>{upload}</UploadId><Key>{escape(asked.key)}</Key>"
        inner = f"<Bucket>{asked.bucket}</Bucket>{inner}"
        body = (
            f"<InitiateMultipartUploadResult {_NAMESPACE}>{inner}</InitiateMultipartUploadResult>"
        )
        return Reply(body=body.encode())

    def put_part(self, asked: Asked) -> Reply:
        parts = self.uploads.get(asked.query["uploadId"])
        if parts is None:
            return _error(404, "NoSuchUpload")
        if not _payload_is_right(asked):
            return _error(400, "XAmzContentSHA256Mismatch")
        parts[int(asked.query["partNumber"])] = asked.body
        return Reply(headers={"ETag": _etag(asked.body)})

    def finish_upload(self, asked: Asked) -> Reply:
        parts = self.uploads.pop(asked.query["uploadId"], None)
        if parts is None:
            return _error(404, "NoSuchUpload")
        data = b"".join(parts[number] for number in sorted(parts))
        etag = self._store(f"{asked.bucket}/{asked.key}", data)
        inner = f"<Bucket>{asked.bucket}</Bucket><Key>{escape(asked.key)}</Key>"
        inner += f"<ETag>{escape(etag)}</ETag>"
        name = "CompleteMultipartUploadResult"
        return Reply(body=f"<{name} {_NAMESPACE}>{inner}</{name}>".encode())

    def abort_upload(self, asked: Asked) -> Reply:
        self.uploads.pop(asked.query["uploadId"], None)
        return Reply(204)

    def _store(self, name: str, data: bytes) -> str:
        etag = _etag(data)
        self.objects[name] = StoredObject(data, etag, time.time())
        return etag

    def _listed(self, bucket: str, key: str) -> str:
        found = self.objects[f"{bucket}/{key}"]
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.modified))
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
            f"<ETag>{escape(found.etag)}</ETag><Size>{len(found.data)}</Size></Contents>"
        )


def fail_once(method: str, *, status: int, times: int = 1, key: str = "") -> Fault:
    """Answers `status` to the first `times` requests of a method (on keys that end so)."""
    left = times
    lock = threading.Lock()

    def fault(asked: Asked, honest: Callable[[], Reply]) -> Reply | None:
        nonlocal left
        if asked.method != method or not asked.key.endswith(key):
            return None
        with lock:
            left -= 1
            return _error(status, "SlowDown") if left >= 0 else None

    return fault


_ACTIONS: dict[str, Callable[[S3Server, Asked], Reply]] = {
    "put": S3Server.put,
    "copy": S3Server.copy,
    "get": S3Server.get,
    "delete": S3Server.delete,
    "delete_many": S3Server.delete_many,
    "list": S3Server.list,
    "begin_upload": S3Server.begin_upload,
    "put_part": S3Server.put_part,
    "finish_upload": S3Server.finish_upload,
    "abort_upload": S3Server.abort_upload,
}


def _action(asked: Asked) -> str:
    query = asked.query
    if asked.method == "PUT":
        if "partNumber" in query:
            return "put_part"
        return "copy" if "x-amz-copy-source" in asked.headers else "put"
    if asked.method == "POST":
        if "uploads" in query:
            return "begin_upload"
        return "delete_many" if "delete" in query else "finish_upload"
    if asked.method == "DELETE":
        return "abort_upload" if "uploadId" in query else "delete"
    return "list" if "list-type" in query else "get"


def _payload_is_right(asked: Asked) -> bool:
    """By the checksum header where there is one, else by the digest that the signature covers."""
    checksum = asked.headers.get("x-amz-checksum-sha256")
    digest = hashlib.sha256(asked.body)
    if checksum is not None:
        return base64.b64decode(checksum) == digest.digest()
    claimed = asked.headers.get("x-amz-content-sha256", "")
    return len(claimed) != 64 or claimed == digest.hexdigest()


def _etag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _error(status: int, code: str) -> Reply:
    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return Reply(status, body.encode(), {"Content-Type": "application/xml"})


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _http_date(moment: float) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(moment))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    s3: S3Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        reply = self.server.s3.answer(Asked(self.command, bucket, key, query, headers, body))
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.cut])
        if reply.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `asked`."""
