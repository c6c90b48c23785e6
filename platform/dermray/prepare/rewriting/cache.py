"""Answers that were paid for once: segments of JSON lines under a URI, each written whole and never changed.

A segment is named by kind, number and the digest of its content, so that a damaged one is recognised. Kinds are
`answers` and `failed`, the captions that had to stay as they were: without that segment they are asked again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dermray import storage
from dermray.errors import CorpusError
from dermray.prepare.rewriting.answers import AnswerError, Reason, checked
from dermray.raw.fetch import ahead

MAX_SEGMENT_BYTES = 256 << 20
NUM_READERS = 8
_NAME = re.compile(r"(answers|failed)-(\d{6})-([0-9a-f]{16})\.jsonl")
# Texts hold no line break, so one string keeps them all.
_BREAK = "\n"


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    texts: list[str] | None = None
    failed: Reason | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _Line:
        if (self.texts is None) == (self.failed is None):
            raise ValueError("needs texts or failed")
        return self


class Cache:
    """What is known of the captions in question. Of two answers to the same caption the earlier one counts."""

    def __init__(self, uri: str, *, limit: int) -> None:
        """`limit`: texts that an answer may have."""
        self.uri = uri
        self.failed: dict[str, Reason] = {}
        self._limit = limit
        self._texts: dict[str, str] = {}
        self._num_segments = 0

    def __contains__(self, key: str) -> bool:
        return key in self._texts or key in self.failed

    @property
    def num_answered(self) -> int:
        """Captions with an answer."""
        return len(self._texts)

    def texts(self, key: str) -> list[str]:
        """What came of a caption; nothing if it has no answer."""
        return self._texts[key].split(_BREAK) if key in self._texts else []

    def load(self, keys: Collection[str]) -> None:
        """Read every segment and keep what belongs to `keys`; segments of other models and prompts lie beside.

        Raises:
            CorpusError: a segment is damaged; names it.
            StorageError: the folder cannot be read.
        """
        uris = [uri for uri in storage.list_files(self.uri) if uri.endswith(".jsonl")]
        segments = ahead(uris, _read, num_threads=NUM_READERS)
        for uri, content in zip(uris, segments, strict=True):
            self._take(uri, content, keys)
        self.failed = {key: reason for key, reason in self.failed.items() if key not in self._texts}
        self._num_segments = len(uris)

    def add(self, answers: Mapping[str, list[str]]) -> None:
        """Publish answers as one segment; without any there is none.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._publish("answers", [_Line(key=key, texts=texts) for key, texts in answers.items()])
        for key, texts in answers.items():
            self._texts.setdefault(key, _BREAK.join(texts))

    def add_failed(self, failed: Mapping[str, Reason]) -> None:
        """Publish the captions that have no answer as one segment; without any there is none.

        Raises:
            StorageError: the folder cannot be written.
        """
        self._publish("failed", [_Line(key=key, failed=reason) for key, reason in failed.items()])
        self.failed.update(failed)

    def _publish(self, kind: Literal["answers", "failed"], lines: list[_Line]) -> None:
        if not lines:
            return
        content = "".join(line.model_dump_json(exclude_none=True) + "\n" for line in lines).encode()
        name = f"{kind}-{self._num_segments:06d}-{_digest(content)}.jsonl"
        storage.write_bytes(storage.join(self.uri, name), content)
        self._num_segments += 1

    def _take(self, uri: str, content: bytes, keys: Collection[str]) -> None:
        named = _NAME.fullmatch(storage.name_of(uri))
        if not named or named[3] != _digest(content):
            raise _damaged(uri, "its content is not what its name says")
        for number, text in enumerate(content.splitlines(), start=1):
            try:
                line = _Line.model_validate_json(text)
                if line.key not in keys:
                    continue
                if line.texts is None:
                    assert line.failed is not None
                    self.failed.setdefault(line.key, line.failed)
                else:
                    self._texts.setdefault(line.key, _BREAK.join(checked(line.texts, self._limit)))
            except (ValidationError, AnswerError) as error:
                raise _damaged(uri, f"line {number}: {str(error).splitlines()[0]}") from None


def _read(uri: str) -> bytes:
    return storage.read_bytes(uri, max_bytes=MAX_SEGMENT_BYTES)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _damaged(uri: str, why: str) -> CorpusError:
    return CorpusError(f"{uri} is damaged ({why}); remove it, and its captions will be asked for again")
