"""A real S3 server on this machine (moto) behind a proxy that misbehaves on demand."""

from __future__ import annotations

import http.client
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from moto.server import ThreadedMotoServer

BUCKET = "corpora"
SHORT_BODY = "short body"
CODES = {403: "AccessDenied", 500: "InternalError", 503: "ServiceUnavailable"}

Matches = Callable[[str, str], bool]


@dataclass
class Fault:
    """What the proxy does to the next requests that match: an HTTP status, or `SHORT_BODY`."""

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
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = self._body()
        fault = self.proxy.due(self.command, self.path)
        if isinstance(fault, int):
            document = f"<Error><Code>{CODES[fault]}</Code><Message>injected</Message></Error>"
            self._answer(fault, {"Content-Type": "application/xml"}, document.encode(), None)
            return
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        headers = {
            key: value for key, value in self.headers.items() if key.lower() not in ("expect", "transfer-encoding")
        }
        headers["Content-Length"] = str(len(body))
        upstream.request(self.command, self.path, body=body, headers=headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        cut = len(content) // 2 if fault == SHORT_BODY else None
        self._answer(response.status, dict(response.getheaders()), content, cut)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: int | None) -> None:
        self.send_response_only(status)
        for key, value in headers.items():
            if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(key, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), str(len(content)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward


@contextmanager
def faulty_s3() -> Iterator[FaultyProxy]:
    """An empty S3 server with one bucket, reached through the proxy."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(f"{host}:{port}")
    front = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    front.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{front.server_address[1]}"
    thread = threading.Thread(target=front.serve_forever, daemon=True)
    thread.start()
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=30)
    connection.request("PUT", f"/{BUCKET}")
    assert connection.getresponse().status == 200
    connection.close()
    try:
        yield proxy
    finally:
        front.shutdown()
        front.server_close()
        thread.join()
        server.stop()
