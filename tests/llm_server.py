"""A real HTTP server on this machine that speaks chat completions, and misbehaves on demand."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PATH = "/v1/chat/completions"
# Faults of an answer whose HTTP status is 200.
NOT_JSON = "not JSON"
NO_COMPLETION = "no completion"
WRONG_COUNT = "wrong count"
WRONG_IDS = "wrong ids"
BLANK = "blank"
CUT_OFF = "cut off"
REFUSAL = "refusal"
FENCED = "fenced"
ENDLESS = "endless"
SLOW = "slow"
SLOW_S = 1.5


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    at: float
    path: str
    authorization: str | None
    body: dict[str, Any]

    @property
    def captions(self) -> list[str]:
        return [item["caption"] for item in json.loads(self.body["messages"][1]["content"])]


@dataclass
class LlmServer:
    """What the server was asked, and how it answers: `poison` maps captions to the fault of every batch they are in."""

    url: str = ""
    api_key: str | None = None
    delay_s: float = 0.0
    requests: list[Asked] = field(default_factory=list)
    poison: dict[str, int | str] = field(default_factory=dict)
    most_at_once: int = 0
    _faults: deque[tuple[int | str, dict[str, str]]] = field(default_factory=deque)
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def inject(self, kind: int | str, times: int = 1, **headers: str) -> None:
        """The next `times` requests go wrong: an HTTP status with these headers (`_` is `-`), or a bad answer."""
        with self._lock:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            self._faults.extend([(kind, named)] * times)

    @property
    def asked(self) -> Counter[str]:
        """How often each caption was asked for."""
        return Counter(caption for request in self.requests for caption in request.captions)

    def enter(self, request: Asked) -> tuple[int | str | None, dict[str, str]]:
        """Note a request; the fault that is due."""
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if self.api_key is not None and request.authorization != f"Bearer {self.api_key}":
                return 401, {}
            if self._faults:
                return self._faults.popleft()
        return next((self.poison[caption] for caption in request.captions if caption in self.poison), None), {}

    def leave(self) -> None:
        """A request is about to be answered."""
        with self._lock:
            self._at_once -= 1


def sub_captions(caption: str) -> list[str]:
    """What the server makes of a caption when it is told to take it apart."""
    return [f"part: {part.strip()}" for part in caption.split(".") if part.strip()][:8]


def rewritten(caption: str) -> str:
    """What the server makes of a caption when it is told to rewrite it."""
    return f"In short, {caption}"


def completion(content: str, finish_reason: str = "stop", refusal: str | None = None) -> dict[str, Any]:
    """The body of a chat completion."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "test-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, "refusal": refusal},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12},
    }


def answer(request: Asked, fault: str | None) -> dict[str, Any]:
    """The completion that a request gets, sound or with a fault."""
    items = json.loads(request.body["messages"][1]["content"])
    decompose = "sub_captions" in request.body["messages"][0]["content"]
    answers = [
        {"id": item["id"], "sub_captions": sub_captions(item["caption"])}
        if decompose
        else {"id": item["id"], "caption": rewritten(item["caption"])}
        for item in items
    ]
    if fault == WRONG_COUNT:
        answers = answers[1:]
    elif fault == WRONG_IDS:
        answers = [{**each, "id": each["id"] + 1} for each in answers]
    elif fault == BLANK:
        answers = [{"id": each["id"], "sub_captions": [], "caption": " "} for each in answers]
    content = json.dumps({"answers": answers}, ensure_ascii=False)
    if fault == NOT_JSON:
        content = "Sure! Here are your captions: 1. a lesion"
    elif fault == FENCED:
        content = f"```json\n{content}\n```"
    elif fault == CUT_OFF:
        return completion(content[: len(content) // 2], finish_reason="length")
    elif fault == REFUSAL:
        return completion("", refusal="I cannot help with that.")
    return {"hello": "world"} if fault == NO_COMPLETION else completion(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_side: LlmServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Asked(time.monotonic(), self.path, self.headers.get("Authorization"), body)
        fault, headers = self.server_side.enter(request)
        time.sleep(SLOW_S if fault == SLOW else self.server_side.delay_s)
        # Before the answer: whoever has it may ask again at once.
        self.server_side.leave()
        try:
            if self.path != PATH:
                fault = 404
            if isinstance(fault, int):
                # Some servers repeat the key that they do not like.
                said = f"injected {fault} for {request.authorization}"
                self._send(fault, headers, json.dumps({"error": {"message": said, "code": fault}}).encode())
            elif fault == ENDLESS:
                # What follows the spaces is sound.
                self._send(200, {}, b" " * (9 << 20) + json.dumps(answer(request, None)).encode())
            else:
                self._send(200, {}, json.dumps(answer(request, fault)).encode())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # More than a few connections at the same moment.
    request_queue_size = 128


@contextmanager
def llm_server() -> Iterator[LlmServer]:
    """A server on a free port; `url` is its base, as `rewrite.endpoint` takes it."""
    state = LlmServer()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_side": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
