"""Batch embedding of a prepared corpus: Ray Data over encoder actors that write their Parquet parts themselves.

A part's record is written after its rows, and the manifest after all records, so a job that was killed goes on where
it stopped. No vector passes through the driver.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray.data
from pydantic import ValidationError

from dermray import cluster, errors, images, storage
from dermray.corpus import shards
from dermray.corpus.manifest import Manifest
from dermray.encoder import Encoder
from dermray.errors import DermRayError, ImageError, VectorIndexError
from dermray.index.embeddings import (
    MANIFEST_NAME,
    Embeddings,
    Maker,
    Part,
    images_table,
    part_file,
    texts_table,
    to_parquet,
)
from dermray.index.settings import EmbedConfig

PLAN_NAME = "plan.json"
ROWS_PER_GROUP = 1024
THUMBNAIL_QUALITY = 80
_COLUMNS = ["sample_id", "image", "captions", "labels"]

Batch = dict[str, np.ndarray]
Item = dict[str, Any]


def embed(config: EmbedConfig, model_uri: str, say: Callable[[str], None] = lambda line: None) -> Embeddings:
    """Embed what `config` names on the connected Ray cluster; finished parts are kept.

    Args:
        config: corpus, output and what to keep.
        model_uri: model folder that every node can read, or an open_clip name.
        say: takes a line of progress.

    Raises:
        CorpusError: no corpus, no such split, or a damaged shard.
        ModelError: the model cannot be loaded.
        VectorIndexError: output holds other embeddings, or parts were made by different weights.
    """
    manifest = Manifest.load(config.corpus)
    items = plan_parts(config, manifest)
    _begin(config, model_uri, manifest)
    done = {part.name: part for item in items if (part := _finished(config.output, item["name"])) is not None}
    left = [item for item in items if item["name"] not in done]
    say(f"{len(items)} parts, {len(done)} of them done")
    for record in _run(config, model_uri, left):
        if "error" in record:
            raise getattr(errors, record["error"])(record["message"])
        part = Part.model_validate(record)
        done[part.name] = part
        say(f"{part.name}: {part.num_images} images, {part.num_texts} captions")
    makers = {part.maker.model_dump_json(): part.maker for part in done.values()}
    if len(makers) > 1:
        raise VectorIndexError(f"{config.output} holds parts of different weights; embed again with replace=true")
    result = Embeddings(
        maker=next(iter(makers.values())),
        corpus_uri=config.corpus,
        corpus_digest=manifest.digest,
        content=config.content(),
        parts=tuple(done[item["name"]] for item in items),
    )
    storage.write_text(storage.join(config.output, MANIFEST_NAME), result.model_dump_json(indent=1))
    return result


def plan_parts(config: EmbedConfig, manifest: Manifest) -> list[Item]:
    """Row groups in manifest order, gathered until a part is full; the same for every run of one config."""
    wanted = config.splits or list(manifest.splits)
    items: list[Item] = []
    for split in wanted:
        chosen = manifest.select(split)
        groups: list[tuple[str, int]] = []
        rows = 0
        for (path, number), size in zip(chosen.row_group_locations(), chosen.row_group_sizes(), strict=True):
            groups.append((storage.join(config.corpus, path), number))
            rows += int(size)
            if rows >= config.rows_per_part:
                items.append({"name": f"part-{len(items):05d}", "groups": groups})
                groups, rows = [], 0
        if groups:
            items.append({"name": f"part-{len(items):05d}", "groups": groups})
    return items


class EmbedActor:
    """A Ray Data actor around `Encoder`: one part in, its two Parquet files written, one record out.

    An error of ours travels as a record: Ray keeps only the text of an exception, and restarts an actor whose
    constructor raises, however hopeless.
    """

    def __init__(self, model_uri: str, config: EmbedConfig) -> None:
        """Remember the model; it is loaded with the first part."""
        self._load = lambda: Encoder.load(model_uri, precision=config.precision)
        self._encoder: Encoder | None = None
        self._config = config

    def __call__(self, batch: Batch) -> Batch:
        """A batch of one row, `item`, to a batch of one row, `record`, both JSON."""
        item = json.loads(str(batch["item"][0]))
        try:
            self._encoder = self._encoder or self._load()
            record = self._embed(self._encoder, item).model_dump(mode="json")
        except DermRayError as error:
            record = {"error": type(error).__name__, "message": str(error)}
        return {"record": np.array([json.dumps(record)], dtype=object)}

    def _embed(self, encoder: Encoder, item: Item) -> Part:
        rows = [
            row for uri, number in item["groups"] for row in shards.read_row_group(uri, number, _COLUMNS).to_pylist()
        ]
        kept, vectors, failures = self._encode_images(encoder, [row["image"] for row in rows])
        chosen = [rows[index] for index in kept]
        captions = [_caption(row["captions"]) for row in chosen]
        self._write(
            "images",
            item["name"],
            images_table(
                [row["sample_id"] for row in chosen],
                vectors,
                captions,
                [list(row["labels"]) for row in chosen],
                [self._thumbnail(row["image"]) for row in chosen],
            ),
        )
        texts = [(row["sample_id"], text) for row, text in zip(chosen, captions, strict=True) if text is not None]
        if not self._config.captions:
            texts = []
        if texts:
            encoded = encoder.encode_texts([text for _, text in texts], batch_size=self._config.batch_size)
            ids = [sample_id for sample_id, _ in texts]
            self._write("texts", item["name"], texts_table(ids, [text for _, text in texts], encoded))
        part = Part(
            name=item["name"],
            maker=_maker(encoder),
            num_images=len(kept),
            num_texts=len(texts),
            failures=dict(sorted(failures.items())),
        )
        storage.write_text(_record_file(self._config.output, part.name), part.model_dump_json())
        return part

    def _encode_images(self, encoder: Encoder, data: Sequence[bytes]) -> tuple[list[int], np.ndarray, Counter[str]]:
        kept: list[int] = []
        failures: Counter[str] = Counter()
        vectors = [np.zeros((0, encoder.info.embedding_dim), dtype=np.float32)]
        for start in range(0, len(data), self._config.batch_size):
            pixels = []
            for index, one in enumerate(data[start : start + self._config.batch_size], start):
                try:
                    pixels.append(encoder.preprocess(one))
                    kept.append(index)
                except ImageError as error:
                    failures[error.reason] += 1
            if pixels:
                vectors.append(encoder.encode_pixels(np.stack(pixels)))
        together = np.concatenate(vectors)
        if not np.isfinite(together).all():
            raise VectorIndexError("the model gives vectors that are not finite; its weights are damaged")
        return kept, together, failures

    def _thumbnail(self, data: bytes) -> bytes | None:
        side = self._config.thumbnail_side
        if not side:
            return None
        return images.encode_jpeg(
            images.resize_shorter(images.decode(data, shorter_side=side), side), THUMBNAIL_QUALITY
        )

    def _write(self, kind: Any, name: str, table: Any) -> None:
        storage.write_bytes(
            part_file(self._config.output, kind, name), to_parquet(table, row_group_size=ROWS_PER_GROUP)
        )


def _run(config: EmbedConfig, model_uri: str, items: Sequence[Item]) -> Any:
    if not items:
        return
    num_gpus = cluster.num_gpus()
    wanted = config.num_actors or int(num_gpus or max(1, cluster.num_cpus() // 2))
    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        EmbedActor,
        fn_constructor_args=(model_uri, config),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(wanted, len(rows))),
        num_cpus=1,
        num_gpus=1 if num_gpus else 0,
    )
    for row in dataset.iter_rows():
        yield json.loads(row["record"])


def _begin(config: EmbedConfig, model_uri: str, manifest: Manifest) -> None:
    """Claim the output for this work, or find that it is already claimed for it."""
    plan = {"model": model_uri, "corpus": manifest.digest, "content": config.content()}
    key = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    file = storage.join(config.output, PLAN_NAME)
    try:
        known = storage.read_json(file).get("key")
    except FileNotFoundError:
        known = None
    if known != key and known is not None:
        if not config.replace:
            raise VectorIndexError(
                f"{config.output} holds embeddings of another model, corpus or content; give replace=true or another "
                "output"
            )
        storage.remove(config.output)
    storage.write_json(file, plan | {"key": key})


def _finished(output: str, name: str) -> Part | None:
    try:
        return Part.model_validate(storage.read_json(_record_file(output, name)))
    except (FileNotFoundError, ValidationError):
        return None


def _record_file(output: str, name: str) -> str:
    return storage.join(output, "parts", f"{name}.json")


def _maker(encoder: Encoder) -> Maker:
    info = encoder.info
    return Maker(
        name=info.name,
        embedding_dim=info.embedding_dim,
        model_digest=info.model_digest,
        preprocessing_digest=info.preprocessing_digest,
    )


def _caption(captions: Sequence[dict[str, str]]) -> str | None:
    """The raw caption, else the first one."""
    texts = {each["aspect"]: each["text"] for each in reversed(captions) if each["text"].strip()}
    return texts.get("raw") or next(iter(reversed(texts.values())), None)
