"""A real S3 server on this machine (moto) behind a proxy that misbehaves on demand."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import boto3
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

BUCKET = "corpora"
# The whole length is announced, half of the body comes, then the connection ends.
SHORT_BODY = "short body"
# The same, but the connection is reset.
RESET = "reset"
# Half of the body, announced as if it were all of it.
HALF = "half"
# The body in small pieces.
SLOW = "slow"
# Nothing at all until the client gives up.
STALLED = "stalled"
# The request is carried out, and the connection ends without an answer.
UNANSWERED = "unanswered"
# 503 with the code that S3 itself sends under load.
SLOW_DOWN = "slow down"
# The store takes half of what was sent and says that all is well.
KEPT_HALF = "kept half"
# As many bytes as were sent, but others.
GARBLED = "garbled"
# The store says that all is well and keeps nothing.
LOST = "lost"
# A listing that does not have anything yet.
UNLISTED = "unlisted"
# Temporary credentials have come to their end: Amazon's answer has the status 400, that of others 403.
EXPIRED = "expired"
EXPIRED_403 = "expired, 403"
CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    500: "InternalError",
    501: "NotImplemented",
    503: "ServiceUnavailable",
}
# What goes with a body that the client sent in chunks of its own, with a checksum behind them.
CHECKSUM_HEADERS = ("content-md5", "content-encoding", "x-amz-checksum", "x-amz-sdk", "x-amz-trailer", "x-amz-decoded")
NUM_PIECES = 20
PAUSE_S = 0.01
PATIENCE_S = 30

Matches = Callable[[str, str], bool]


@dataclass
class Fault:
    """What the proxy does to the next requests that match: an HTTP status, or one of the kinds above."""

    kind: int | str
    matches: Matches
    left: int
    # Requests that still go well before the first that does not.
    spared: int = 0


@dataclass
class FaultyProxy:
    """Passes requests on to the server, except where a fault is due. `fired` counts the faults that really came."""

    upstream: str
    url: str = ""
    fired: int = 0
    # What becomes of `If-None-Match` on a PUT: "honoured", "ignored" or "not implemented", as in older stores.
    conditional: str = "honoured"
    # Listings do not show the last so many changes yet: what was written is missing, what was deleted is there.
    listing_lag: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    _faults: deque[Fault] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # Bytes of the parts of uploads that are not completed.
    uploaded: Counter[str] = field(default_factory=Counter)
    # Each change of the bucket: key, and size and ETag of what was written, or None.
    _changes: list[tuple[str, tuple[int, str] | None]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to know to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def inject(self, kind: int | str, times: int, *, method: str, key: str, spared: int = 0) -> None:
        """The next `times` requests of `method` ("": any) whose path holds `key` go wrong, after `spared` more."""
        with self._lock:
            self._faults.append(Fault(kind, lambda m, path: method in ("", m) and key in path, times, spared))

    def reset(self) -> None:
        """Forget faults and counts."""
        with self._lock:
            self._faults.clear()
            self.conditional = "honoured"
            self.listing_lag = 0
            self.requests.clear()
            self.fired = 0

    def note(self, key: str, written: tuple[int, str] | None) -> None:
        """An object was written, or deleted."""
        with self._lock:
            self._changes.append((key, written))

    def listing(self, query: Mapping[str, str]) -> bytes:
        """The answer to ListObjectsV2 of a store that is behind by `listing_lag` changes; pages have no end."""
        with self._lock:
            seen = dict(self._changes[: max(0, len(self._changes) - self.listing_lag)])
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        shown = quote if query.get("encoding-type") else escape
        entries, folders = [], set()
        for key, written in sorted(seen.items()):
            if written is None or not key.startswith(prefix) or key <= query.get("start-after", ""):
                continue
            folder, slash, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if slash:
                folders.add(f"{prefix}{folder}{slash}")
                continue
            entries.append(
                f"<Contents><Key>{shown(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{written[1]}</ETag><Size>{written[0]}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        prefixes = [f"<CommonPrefixes><Prefix>{shown(one)}</Prefix></CommonPrefixes>" for one in sorted(folders)]
        encoding = "<EncodingType>url</EncodingType>" if query.get("encoding-type") else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{shown(prefix)}</Prefix><Delimiter>{shown(delimiter)}</Delimiter>{encoding}"
            f"<KeyCount>{len(entries) + len(prefixes)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{''.join(entries)}{''.join(prefixes)}</ListBucketResult>"
        ).encode()

    def due(self, method: str, path: str) -> int | str | None:
        """The fault of this request, if there is one; counts it."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if not (fault.left and fault.matches(method, path)):
                    continue
                if fault.spared:
                    fault.spared -= 1
                else:
                    fault.left -= 1
                    self.fired += 1
                    return fault.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body of an answer go out apart; else the second waits 40 ms for the client to acknowledge the first.
    disable_nagle_algorithm = True
    proxy: FaultyProxy

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self) -> None:
        body = self._body()
        fault = self.proxy.due(self.command, self.path)
        if isinstance(fault, int) or fault in (SLOW_DOWN, EXPIRED, EXPIRED_403):
            self._refuse(fault)
            return
        if fault in (KEPT_HALF, GARBLED, LOST):
            body = self._content(body)
        if fault == LOST:
            self._answer(200, {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}, b"", None)
            return
        if fault == STALLED:
            # Ends when the client hangs up.
            self.connection.settimeout(PATIENCE_S)
            self.connection.recv(1)
            self.close_connection = True
            return
        if self.command == "PUT" and self.headers["If-None-Match"] and self.proxy.conditional != "honoured":
            if self.proxy.conditional == "not implemented":
                self._refuse(501)
                return
            del self.headers["If-None-Match"]
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=PATIENCE_S)
        headers = {
            key: value for key, value in self.headers.items() if key.lower() not in ("expect", "transfer-encoding")
        }
        if fault in (KEPT_HALF, GARBLED):
            body = body[: len(body) // 2] if fault == KEPT_HALF else bytes(byte ^ 1 for byte in body)
            headers = {key: value for key, value in headers.items() if not key.lower().startswith(CHECKSUM_HEADERS)}
            headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body=body, headers=headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        if response.status < 300:
            self._note(body, content, response)
        query = dict(parse_qsl(urlsplit(self.path).query))
        if self.proxy.listing_lag and query.get("list-type") == "2":
            content = self.proxy.listing(query)
        if fault == UNLISTED:
            content = re.sub(rb"<(Contents|CommonPrefixes)>.*</\1>", b"", content, flags=re.DOTALL)
        if fault == UNANSWERED:
            self.close_connection = True
            return
        if fault == HALF:
            content = content[: len(content) // 2]
        self._answer(response.status, dict(response.getheaders()), content, fault)

    def _note(self, body: bytes, content: bytes, response: http.client.HTTPResponse) -> None:
        """Have the proxy remember what a request has changed in the bucket."""
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").lstrip("/")
        etag = response.headers.get("ETag", "")
        upload = dict(parse_qsl(parts.query)).get("uploadId", "")
        if self.command == "PUT" and "partNumber" in parts.query:
            self.proxy.uploaded[upload] += len(self._content(body))
        elif self.command == "PUT" and key:
            self.proxy.note(key, (len(self._content(body)), etag))
        elif self.command == "POST" and upload:
            self.proxy.note(key, (self.proxy.uploaded.pop(upload), etag))
        elif self.command == "DELETE" and key and not upload:
            self.proxy.note(key, None)
        elif self.command == "POST" and parts.query.startswith("delete"):
            for gone in re.findall(rb"<Key>(.*?)</Key>", body):
                self.proxy.note(unescape(gone.decode()), None)

    def _content(self, body: bytes) -> bytes:
        """What the client means by a body."""
        if self.headers.get("Content-Encoding") != "aws-chunked":
            return body
        content = b""
        while size := int(body.partition(b"\r\n")[0].partition(b";")[0], 16):
            start = body.index(b"\r\n") + 2
            content, body = content + body[start : start + size], body[start + size + 2 :]
        return content

    def _refuse(self, fault: int | str) -> None:
        named = {SLOW_DOWN: (503, "SlowDown"), EXPIRED: (400, "ExpiredToken"), EXPIRED_403: (403, "ExpiredToken")}
        status, code = named[fault] if isinstance(fault, str) else (fault, CODES[fault])
        message = "The provided token has expired." if fault in (EXPIRED, EXPIRED_403) else "injected"
        document = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
        self._answer(status, {"Content-Type": "application/xml"}, document.encode(), None)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, fault: int | str | None) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(key, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(content)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(content, fault)

    def _send(self, content: bytes, fault: int | str | None) -> None:
        if fault == SLOW:
            size = -(-len(content) // NUM_PIECES)
            for first in range(0, len(content), size):
                self.wfile.write(content[first : first + size])
                time.sleep(PAUSE_S)
            return
        if fault not in (SHORT_BODY, RESET):
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        if fault == RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A proxy on this machine in front of `upstream` (`host:port`)."""
    proxy = FaultyProxy(upstream)
    front = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    front.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{front.server_address[1]}"
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        front.shutdown()
        front.server_close()
        thread.join()


@contextmanager
def faulty_s3() -> Iterator[FaultyProxy]:
    """An empty S3 server with one bucket, reached through the proxy."""
    WSGIRequestHandler.disable_nagle_algorithm = True
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with faulty_proxy(f"{host}:{port}") as proxy:
            connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=30)
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            connection.close()
            yield proxy
    finally:
        server.stop()


def stored_objects(proxy: FaultyProxy) -> dict[str, bytes]:
    """What the bucket holds, by key, past all faults and all clients of the project."""
    settings = {name.lower(): value for name, value in proxy.environment.items() if name.startswith("AWS_")}
    client: Any = boto3.client(
        "s3",
        endpoint_url=f"http://{proxy.upstream}",
        region_name=settings["aws_default_region"],
        aws_access_key_id=settings["aws_access_key_id"],
        aws_secret_access_key=settings["aws_secret_access_key"],
    )
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
