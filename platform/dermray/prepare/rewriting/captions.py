"""Raw rows in, raw rows with the model's captions out: what is asked, what is cached, what is put where.

The result is made from the cache alone: with the same captions and the same cache it is the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from dermray import storage
from dermray.corpus.captions import with_sub_captions
from dermray.corpus.schema import CaptionAspect
from dermray.errors import ConfigError
from dermray.prepare.rewriting.asking import Asking, Tally, check_ceiling
from dermray.prepare.rewriting.cache import Cache
from dermray.prepare.rewriting.settings import RewriteConfig
from dermray.prepare.rewriting.tasks import DECOMPOSE, TASKS, Task
from dermray.raw.sources.rows import RAW, RawRows

FOLDER = "rewrites"
ROWS_AT_ONCE = 50_000

Captions = list[dict[str, str]]


@dataclass(frozen=True)
class RewriteStats:
    """What one task came to; `tally` and `num_from_cache` say how this run got there."""

    task: str
    model: str
    prompt_sha256: str
    num_captions: int
    num_answered: int
    failed: dict[str, int]
    num_from_cache: int
    tally: Tally

    def to_json(self) -> dict[str, Any]:
        """For the report: the same whether the answers were asked for now or before."""
        return {
            "task": self.task,
            "model": self.model,
            "prompt_sha256": self.prompt_sha256,
            "captions": self.num_captions,
            "answered": self.num_answered,
            "failed": self.failed,
        }

    def metrics(self) -> dict[str, float]:
        """Figures of this run, for tracking."""
        return {
            f"{self.task}_captions": self.num_captions,
            f"{self.task}_failed": sum(self.failed.values()),
            f"{self.task}_from_cache": self.num_from_cache,
            f"{self.task}_requests": self.tally.num_requests,
            f"{self.task}_prompt_tokens": self.tally.prompt_tokens,
            f"{self.task}_completion_tokens": self.tally.completion_tokens,
        }


def rewrite_captions(raw: RawRows, config: RewriteConfig, *, output: str) -> tuple[RawRows, tuple[RewriteStats, ...]]:
    """Have a model take raw captions apart, or write them anew, as `config.mode` says; one `RewriteStats` a task.

    A caption without a usable answer stays as it was and is counted.

    Raises:
        ConfigError: the key is not set, or the source brings sub-captions of its own.
        CorpusError: a segment of the cache is damaged.
        EndpointError: the endpoint cannot be used, or leaves too many captions without an answer.
        StorageError: the cache cannot be read or written.
    """
    stats = []
    for task in TASKS[config.mode]:
        raw, done = _apply(task, raw, config, config.cache or storage.join(output, FOLDER))
        stats.append(done)
    return raw, tuple(stats)


def _apply(task: Task, raw: RawRows, config: RewriteConfig, cache_uri: str) -> tuple[RawRows, RewriteStats]:
    said = raw.table["captions"].combine_chunks().flatten()
    aspects = said.field("aspect")
    if task is DECOMPOSE and pc.any(pc.equal(aspects, "sub")).as_py():
        raise ConfigError(f"rewrite.mode={config.mode}: the source brings sub-captions of its own; take rewrite or off")
    keys = task.keys(config, said.field("text").filter(pc.equal(aspects, "raw")).unique().to_pylist())
    cache = Cache(cache_uri, limit=task.limit)
    cache.load(keys.keys())
    pending = {key: caption for key, caption in keys.items() if key not in cache}
    check_ceiling(config, cache, [], len(keys))
    print(_announce(task, config, len(keys), len(pending)), flush=True)
    tally = asyncio.run(Asking(task, config, cache, pending, len(keys)).run()) if pending else Tally()
    texts = {caption: found for key, caption in keys.items() if (found := cache.texts(key))}
    made = replace(raw, table=_replaced(raw.table, task, texts), captions_from=_captions_from(task, raw, config))
    return made, RewriteStats(
        task=task.name,
        model=config.model or "",
        prompt_sha256=task.prompt_sha256,
        num_captions=len(keys),
        num_answered=len(texts),
        failed=dict(sorted(Counter(cache.failed.values()).items())),
        num_from_cache=len(keys) - len(pending),
        tally=tally,
    )


def _announce(task: Task, config: RewriteConfig, num_captions: int, num_pending: int) -> str:
    num_requests = -(-num_pending // config.captions_per_request)
    line = f"{task.name}: {num_captions:,} captions by {config.model}, {num_captions - num_pending:,} of them cached"
    if not num_pending:
        return line
    at_least_s = num_requests / config.requests_per_minute * 60
    return f"{line}; {num_requests:,} requests to {config.url}, at least {at_least_s:,.0f} s"


def _captions_from(task: Task, raw: RawRows, config: RewriteConfig) -> dict[CaptionAspect, str]:
    made = task.made_by(config)
    source = raw.captions_from.get("raw", "the source's caption")
    new: dict[CaptionAspect, str] = {"sub": made} if task is DECOMPOSE else {"raw": f"{source}, {made}"}
    return {**raw.captions_from, **new}


def _replaced(table: pa.Table, task: Task, texts: dict[str, list[str]]) -> pa.Table:
    """The table with the captions of every row made anew."""
    captions_of: Callable[[Captions, dict[str, list[str]]], Captions] = (
        _with_sub_captions if task is DECOMPOSE else _with_raw_replaced
    )
    described = RAW.field("captions")
    column = table["captions"]
    chunks = [
        pa.array([captions_of(row, texts) for row in column.slice(first, ROWS_AT_ONCE).to_pylist()], described.type)
        for first in range(0, len(column), ROWS_AT_ONCE)
    ]
    return table.set_column(
        table.column_names.index("captions"), described, pa.chunked_array(chunks, described.type).combine_chunks()
    )


def _with_sub_captions(captions: Captions, texts: dict[str, list[str]]) -> Captions:
    said = [(cast(CaptionAspect, caption["aspect"]), caption["text"]) for caption in captions]
    made = with_sub_captions(said, lambda text: texts.get(text, ()))
    return [{"aspect": aspect, "text": text} for aspect, text in made]


def _with_raw_replaced(captions: Captions, texts: dict[str, list[str]]) -> Captions:
    return [
        {**caption, "text": texts.get(caption["text"], [caption["text"]])[0]} if caption["aspect"] == "raw" else caption
        for caption in captions
    ]
