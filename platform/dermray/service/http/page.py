"""The web page's files, read once and answered from memory with an ETag; a name that is not theirs is a 404."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi.responses import Response
from starlette.requests import Request

from dermray.service.refusals import Refusal

FOLDER = Path(__file__).resolve().parent / "web"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str


class Page:
    """All files of the page by their path below `web`."""

    def __init__(self, files: dict[str, File]) -> None:
        self._files = files

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Page:
        """Read every file of a known kind."""
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix in MEDIA_TYPES:
                content = path.read_bytes()
                etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
                files[path.relative_to(folder).as_posix()] = File(content, MEDIA_TYPES[path.suffix], etag)
        return cls(files)

    def answer(self, name: str, request: Request) -> Response:
        """The file, or 304 when the browser has it already.

        Raises:
            Refusal: 404.
        """
        file = self._files.get(name)
        if file is None:
            raise Refusal(404, f"no such page: /{name[:80]}", code="not_found")
        headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)
