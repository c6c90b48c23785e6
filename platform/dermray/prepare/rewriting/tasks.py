"""What a model is asked to do with a caption: the prompt, the reading of the answer, the key it is cached under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from string import Template
from typing import Any

from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.prepare.rewriting.answers import rewritten_of, sub_captions_of
from dermray.prepare.rewriting.settings import Mode, RewriteConfig

# To be raised when the same answer would be read otherwise.
FORMAT = 1


@dataclass(frozen=True)
class Task:
    """One thing that a model does with captions; `limit` texts come of a caption at most."""

    name: str
    limit: int
    read: Callable[[str, int], list[list[str]]]

    @cached_property
    def prompt(self) -> str:
        """The system message."""
        file = resources.files("dermray.prepare.rewriting") / "prompts" / f"{self.name}.txt"
        return Template(file.read_text(encoding="utf-8")).substitute(limit=self.limit)

    @cached_property
    def prompt_sha256(self) -> str:
        """Digest of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()

    def made_by(self, config: RewriteConfig) -> str:
        """Who does it, in words, for the provenance."""
        done = {"decompose": "decomposed", "rewrite": "rewritten"}[self.name]
        return f"{done} by {config.model} (prompt sha256 {self.prompt_sha256[:12]})"

    def request(self, config: RewriteConfig, captions: Sequence[str]) -> dict[str, Any]:
        """The body of a request. Captions are items of a JSON array, so none can pass for an instruction of ours."""
        items = [{"id": number, "caption": caption} for number, caption in enumerate(captions, start=1)]
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [
                {"role": "system", "content": self.prompt},
                {"role": "user", "content": json.dumps(items, ensure_ascii=False)},
            ],
            config.max_tokens_key: config.max_tokens * len(captions),
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if config.json_mode:
            body["response_format"] = {"type": "json_object"}
        return body

    def keys(self, config: RewriteConfig, captions: Sequence[str]) -> dict[str, str]:
        """Caption by cache key. A key hangs on all that decides an answer, but not on where or in which company."""
        identity = {"format": FORMAT, "task": self.name, "prompt": self.prompt_sha256, **config.parameters()}
        start = hashlib.sha256(json.dumps(identity, sort_keys=True).encode() + b"\0")
        keys: dict[str, str] = {}
        for caption in captions:
            digest = start.copy()
            digest.update(caption.encode())
            keys[digest.hexdigest()] = caption
        return keys


DECOMPOSE = Task("decompose", MAX_SUB_CAPTIONS, sub_captions_of)
REWRITE = Task("rewrite", 1, rewritten_of)

# In the order in which they are done.
TASKS: dict[Mode, tuple[Task, ...]] = {
    "off": (),
    "decompose": (DECOMPOSE,),
    "rewrite": (REWRITE,),
    "both": (REWRITE, DECOMPOSE),
}
