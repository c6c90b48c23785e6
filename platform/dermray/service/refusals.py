"""Every refusal in OpenAI's error shape, and how the faults underneath become one. No stack trace ever leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

RETRY_AFTER_S = 1
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


class Refusal(HTTPException):
    """A request that gets an error instead of an answer.

    Args:
        status: HTTP status code.
        message: one sentence for the person who sent it.
        code: short stable word for programs.
        param: the field or header at fault.
        retry: the same request may succeed a moment later.
    """

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None, retry: bool = False) -> None:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if retry else None
        if status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        super().__init__(status_code=status, detail=message, headers=headers)
        self.code = code
        self.param = param
        self.retry = retry

    def __reduce__(self) -> tuple[Callable[..., Refusal], tuple[int, str, str, str | None, bool]]:
        # An encoder's refusal travels from its replica to the gateway.
        return _refusal, (self.status_code, str(self.detail), self.code, self.param, self.retry)


def _refusal(status: int, message: str, code: str, param: str | None, retry: bool) -> Refusal:
    return Refusal(status, message, code=code, param=param, retry=retry)


def too_large(what: str, limit: str) -> Refusal:
    """The 413 of a body or of a list of inputs."""
    return Refusal(413, f"{what}; the limit is {limit}", code="too_large")


def unavailable(message: str) -> Refusal:
    """The 503 of a model that cannot answer now."""
    return Refusal(503, message, code="model_unavailable", retry=True)


def respond(refusal: HTTPException) -> JSONResponse:
    """An error as HTTP: status, `Retry-After` where it helps, and the body."""
    code = getattr(refusal, "code", None) or _CODES.get(refusal.status_code, "invalid_request")
    body = error_body(refusal.status_code, str(refusal.detail), code, getattr(refusal, "param", None))
    return JSONResponse(body, status_code=refusal.status_code, headers=refusal.headers)


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    if status == 429:
        kind = "rate_limit_error"
    elif status in (401, 403):
        kind = "authentication_error"
    elif status >= 500:
        kind = "server_error"
    else:
        kind = "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def from_validation(error: RequestValidationError) -> Refusal:
    """A body that does not fit its schema: 422, naming the first field at fault and never echoing its value."""
    return from_details(error.errors())


def from_details(details: Sequence[Mapping[str, Any]]) -> Refusal:
    """As `from_validation`, from pydantic's own list of errors."""
    first = details[0]
    # A field's name may be anything the sender likes: it is shown short, and whole as UTF-8.
    path = [str(part)[:80].encode("utf-8", "replace").decode() for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Refusal(422, "the request body is not valid JSON", code="invalid_json")
    if first["type"] in ("model_attributes_type", "model_type") or (not path and first["type"] == "missing"):
        return Refusal(422, "send a JSON object with Content-Type: application/json", code="invalid_body")
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        message = f"{param}: no such field"
    else:
        message = f"{param}: {first['msg']}" if param else first["msg"]
    if first["type"] == "token_numbers":
        return Refusal(400, message, code="token_numbers", param=param)
    if len(details) > 1:
        message += f" (and {len(details) - 1} more)"
    return Refusal(422, message, code="invalid_field", param=param)
