"""A real S3 server on this machine (moto) behind a proxy that misbehaves on demand."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from moto.server import ThreadedMotoServer

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
# 503 with the code that S3 itself sends under load.
SLOW_DOWN = "slow down"
CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "ServiceUnavailable"}
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


@dataclass
class FaultyProxy:
    """Passes requests on to the server, except where a fault is due. `fired` counts the faults that really came."""

    upstream: str
    url: str = ""
    fired: int = 0
    requests: list[tuple[str, str]] = field(default_factory=list)
    _faults: deque[Fault] = field(default_factory=deque)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to know to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def inject(self, kind: int | str, times: int, *, method: str, key: str) -> None:
        """The next `times` requests of `method` whose path holds `key` go wrong."""
        with self._lock:
            self._faults.append(Fault(kind, lambda m, path: m == method and key in path, times))

    def reset(self) -> None:
        """Forget faults and counts."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self.fired = 0

    def due(self, method: str, path: str) -> int | str | None:
        """The fault of this request, if there is one; counts it."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if fault.left and fault.matches(method, path):
                    fault.left -= 1
                    self.fired += 1
                    return fault.kind
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
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
        if isinstance(fault, int) or fault == SLOW_DOWN:
            self._refuse(fault)
            return
        if fault == STALLED:
            # Ends when the client hangs up.
            self.connection.settimeout(PATIENCE_S)
            self.connection.recv(1)
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=PATIENCE_S)
        headers = {
            key: value for key, value in self.headers.items() if key.lower() not in ("expect", "transfer-encoding")
        }
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body=body, headers=headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        if fault == HALF:
            content = content[: len(content) // 2]
        self._answer(response.status, dict(response.getheaders()), content, fault)

    def _refuse(self, fault: int | str) -> None:
        status, code = (503, "SlowDown") if fault == SLOW_DOWN else (int(fault), CODES[int(fault)])
        document = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
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
