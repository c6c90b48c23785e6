"""Embeddings of a prepared corpus: vectors from `dermray.embedding`, captions and small images beside them.

A part's record is written after its rows, and the manifest after all records, so a job that was killed goes on where
it stopped; what was encoded until then is in the store of vectors. Vectors and captions pass through the driver's
memory, images do not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from pydantic import ValidationError

from dermray import images, storage
from dermray.corpus.manifest import Manifest
from dermray.embedding.actor import described, error_of
from dermray.embedding.pipeline import obtain
from dermray.embedding.store import Say, Store, default_uri, digest, unit_length
from dermray.embedding.units import RowGroup, read_row_group, row_groups
from dermray.encoder import EncoderInfo
from dermray.errors import DermRayError, StorageError, VectorIndexError
from dermray.index.embeddings import (
    MANIFEST_NAME,
    Embeddings,
    Kind,
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


@dataclass(frozen=True)
class Piece:
    """What becomes one part: row groups of one split."""

    name: str
    groups: tuple[RowGroup, ...]

    def rows(self, *columns: str) -> list[dict[str, Any]]:
        """Columns of its samples.

        Raises:
            CorpusError: a shard is missing or damaged.
        """
        return [row for group in self.groups for row in read_row_group(group, list(columns)).to_pylist()]


def embed(config: EmbedConfig, model_uri: str, say: Say = lambda line: None) -> Embeddings:
    """Embed what `config` names on the connected Ray cluster; finished parts are kept.

    Args:
        config: corpus, output and what to keep.
        model_uri: model folder that every node can read, or an open_clip name.
        say: takes a line of progress.

    Raises:
        CorpusError: no corpus, no such split, or a damaged shard.
        ModelError: the model cannot be loaded, or its folder changes meanwhile.
        EvaluationError: the model's vectors are not finite.
        StorageError: the store of vectors cannot be used, or the nodes do not share it.
        VectorIndexError: output holds other embeddings.
    """
    manifest = Manifest.load(config.corpus)
    store = Store.of(config.cache or default_uri(), model_uri, precision=config.precision)
    maker = _maker(store.info)
    _begin(config, maker, manifest)
    pieces = plan(config, manifest)
    done = {part.name: part for piece in pieces if (part := _finished(config.output, piece.name)) is not None}
    say(f"{len(pieces)} parts, {len(done)} of them done")
    left = [piece for piece in pieces if piece.name not in done]
    if left:
        done |= {part.name: part for part in _make(config, model_uri, manifest.digest, store, left, say)}
    result = Embeddings(
        maker=maker,
        corpus_uri=config.corpus,
        corpus_digest=manifest.digest,
        content=config.content(),
        parts=tuple(done[piece.name] for piece in pieces),
    )
    storage.write_text(storage.join(config.output, MANIFEST_NAME), result.model_dump_json(indent=1))
    return result


def plan(config: EmbedConfig, manifest: Manifest) -> list[Piece]:
    """Row groups in manifest order, gathered until a part is full; the same for every run of one config."""
    pieces: list[Piece] = []
    for split in config.splits or list(manifest.splits):
        groups: list[RowGroup] = []
        for group in row_groups(config.corpus, manifest.select(split)):
            if sum(one.num_rows for one in groups) >= config.rows_per_part:
                pieces.append(Piece(f"part-{len(pieces):05d}", tuple(groups)))
                groups = []
            groups.append(group)
        if groups:
            pieces.append(Piece(f"part-{len(pieces):05d}", tuple(groups)))
    return pieces


def _make(
    config: EmbedConfig, model_uri: str, corpus_digest: str, store: Store, pieces: Sequence[Piece], say: Say
) -> Iterator[Part]:
    """Obtain all vectors in one go, then write the parts: captions here, images in tasks, which read the store."""
    captions = [_captions(piece) for piece in pieces]
    texts = list(dict.fromkeys(text for each in captions for _, text in each if text)) if config.captions else []
    units = [group for piece in pieces for group in piece.groups]
    obtained = obtain(
        [(corpus_digest, units)],
        texts,
        store,
        model_uri=model_uri,
        batch_size=config.batch_size,
        precision=config.precision,
        num_actors=config.num_actors,
        say=say,
    )
    vector_of = dict(zip(texts, obtained.texts, strict=True))
    contents = iter(obtained.images)
    items = []
    for piece, each in zip(pieces, captions, strict=True):
        reasons = [reason for _ in piece.groups for reason in next(contents).words]
        kept = [
            (sample_id, text)
            for (sample_id, text), reason in zip(each, reasons, strict=True)
            if not reason and text in vector_of
        ]
        if kept:
            ids, said = zip(*kept, strict=True)
            _write(config, "texts", piece.name, texts_table(ids, said, np.stack([vector_of[text] for text in said])))
        items.append({"piece": json.dumps(asdict(piece)), "num_texts": len(kept)})
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _finish, fn_kwargs={"config": config, "corpus_digest": corpus_digest, "store": store}, num_cpus=1
    )
    for answer in answers.iter_rows():
        if answer["error"]:
            raise error_of(answer["error"])
        part = Part.model_validate_json(answer["record"])
        say(f"{part.name}: {part.num_images} images, {part.num_texts} captions")
        yield part


def _finish(item: dict[str, Any], *, config: EmbedConfig, corpus_digest: str, store: Store) -> dict[str, str]:
    """Ray's side of a part: its images and its record. An error of ours travels as an answer."""
    document = json.loads(item["piece"])
    piece = Piece(document["name"], tuple(RowGroup(**group) for group in document["groups"]))
    try:
        vectors, reasons = _kept_vectors(store, corpus_digest, piece)
        part = Part(
            name=piece.name,
            num_images=int((reasons == "").sum()),
            num_texts=int(item["num_texts"]),
            failures=dict(sorted(Counter(filter(None, reasons)).items())),
        )
        _write(config, "images", piece.name, _images_table(config, piece, vectors, reasons))
        storage.write_text(_record_file(config.output, part.name), part.model_dump_json())
    except DermRayError as error:
        return {"record": "", "error": described(error)}
    return {"record": part.model_dump_json(), "error": ""}


def _kept_vectors(store: Store, corpus_digest: str, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of a piece's samples as the tower gives them, float32 `[N, D]`, and why there is none, object `[N]`."""
    contents = store.read(store.images(corpus_digest, piece.groups))
    present = [content for content in contents if content is not None]
    if len(present) < len(contents):
        raise StorageError(f"vectors of {piece.name} are gone from {store.uri}; run again")
    return np.concatenate([one.values for one in present]), np.concatenate([one.words for one in present])


def _images_table(config: EmbedConfig, piece: Piece, vectors: np.ndarray, reasons: np.ndarray) -> pa.Table:
    rows = piece.rows("sample_id", "image", "captions", "labels")
    chosen = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    return images_table(
        [row["sample_id"] for row in chosen],
        unit_length(vectors[reasons == ""])[0],
        [_caption(row["captions"]) for row in chosen],
        [list(row["labels"]) for row in chosen],
        [_thumbnail(row["image"], config.thumbnail_side) for row in chosen],
    )


def _captions(piece: Piece) -> list[tuple[str, str]]:
    """Sample id and caption, empty where there is none."""
    return [(row["sample_id"], _caption(row["captions"]) or "") for row in piece.rows("sample_id", "captions")]


def _caption(captions: Sequence[dict[str, str]]) -> str | None:
    """The raw caption, else the first one."""
    texts = {each["aspect"]: each["text"] for each in reversed(captions) if each["text"].strip()}
    return texts.get("raw") or next(iter(reversed(texts.values())), None)


def _thumbnail(data: bytes, side: int) -> bytes | None:
    if not side:
        return None
    return images.encode_jpeg(images.resize_shorter(images.decode(data, shorter_side=side), side), THUMBNAIL_QUALITY)


def _write(config: EmbedConfig, kind: Kind, name: str, table: pa.Table) -> None:
    storage.write_bytes(part_file(config.output, kind, name), to_parquet(table, row_group_size=ROWS_PER_GROUP))


def _begin(config: EmbedConfig, maker: Maker, manifest: Manifest) -> None:
    """Claim the output for this work, or find that it is already claimed for it."""
    work = {"maker": maker.model_dump(), "corpus": manifest.digest, "content": config.content()}
    file, key = storage.join(config.output, PLAN_NAME), digest(work)
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
    storage.write_json(file, work | {"key": key})


def _finished(output: str, name: str) -> Part | None:
    try:
        return Part.model_validate(storage.read_json(_record_file(output, name)))
    except (FileNotFoundError, ValidationError):
        return None


def _record_file(output: str, name: str) -> str:
    return storage.join(output, "parts", f"{name}.json")


def _maker(info: EncoderInfo) -> Maker:
    return Maker(
        name=info.name,
        embedding_dim=info.embedding_dim,
        model_digest=info.model_digest,
        preprocessing_digest=info.preprocessing_digest,
    )
