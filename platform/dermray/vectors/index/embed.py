"""Embeddings of a prepared corpus: vectors from `dermray.vectors.embedding`, captions and small images beside them.

A part's record is written after its rows, and the manifest after all records, so a job that was killed goes on where
it stopped; what was encoded until then is in the store of vectors. Vectors and captions pass through the driver's
memory, images do not.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from dermray import images, ledger, pieces, storage
from dermray.corpus.accounts import OTHER_SPLIT, require_balance
from dermray.corpus.manifest import Manifest
from dermray.errors import ImageError, ModelError, StorageError, VectorIndexError
from dermray.progress import Progress, Say, busy
from dermray.vectors.embedding.pipeline import obtain
from dermray.vectors.embedding.store import Store, default_uri, digest, unit_length
from dermray.vectors.embedding.units import RowGroup, read_row_group, row_groups
from dermray.vectors.encoder_info import WITHOUT_TEXTS, EncoderInfo
from dermray.vectors.index.embeddings import (
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
from dermray.vectors.index.settings import EmbedConfig

PLAN_NAME = "plan.json"
PART_FILE = re.compile(r"(images|texts)/part-\d{5,}\.parquet|parts/part-\d{5,}\.json")
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
        ClaimError: another run writes into the output, or has taken it over.
        CorpusError: no corpus, no such split, or a damaged shard.
        ModelError: the model cannot be loaded, or its folder changes meanwhile; or it takes no texts and captions are
            to be embedded.
        EvaluationError: the model's vectors are not finite.
        StorageError: the store of vectors cannot be used, or the nodes do not share it.
        VectorIndexError: output holds other embeddings.
    """
    with ledger.claim(config.output, wait_s=config.wait_for_output_s) as claim:
        return _embed(config, model_uri, claim, say)


def _embed(config: EmbedConfig, model_uri: str, claim: ledger.Claim, say: Say) -> Embeddings:
    manifest = Manifest.load(config.corpus)
    with busy("embed: loading torch and the model", say):
        store = Store.of(config.cache or default_uri(), model_uri, precision=config.precision)
    if config.captions and not store.info.context_length:
        raise ModelError(f"{WITHOUT_TEXTS.format(store.info.name)}: give captions=false")
    maker = _maker(store.info)
    claim.confirm()
    _begin(config, maker, manifest)
    planned = plan(config, manifest)
    done = {part.name: part for piece in planned if (part := _finished(config.output, piece.name)) is not None}
    say(f"{len(planned)} parts, {len(done)} of them done")
    left = [piece for piece in planned if piece.name not in done]
    if left:
        done |= {part.name: part for part in _make(config, model_uri, manifest.digest, store, left, claim, say)}
    parts = [done[piece.name] for piece in planned]
    result = Embeddings(
        maker=maker,
        corpus_uri=config.corpus,
        corpus_digest=manifest.digest,
        content=config.content(),
        parts=tuple(parts),
        samples=accounted(manifest, planned, parts),
    )
    claim.confirm()
    storage.write_text(storage.join(config.output, MANIFEST_NAME), result.model_dump_json(indent=1))
    return result


def plan(config: EmbedConfig, manifest: Manifest) -> list[Piece]:
    """Row groups in manifest order, gathered until a part is full; the same for every run of one config."""
    planned: list[Piece] = []
    for split in dict.fromkeys(config.splits or manifest.splits):
        groups: list[RowGroup] = []
        for group in row_groups(config.corpus, manifest.select(split)):
            if sum(one.num_rows for one in groups) >= config.rows_per_part:
                planned.append(Piece(f"part-{len(planned):05d}", tuple(groups)))
                groups = []
            groups.append(group)
        if groups:
            planned.append(Piece(f"part-{len(planned):05d}", tuple(groups)))
    return planned


def accounted(manifest: Manifest, planned: Sequence[Piece], parts: Sequence[Part]) -> dict[str, Any]:
    """Every sample of the corpus: embedded, or left out for a reason.

    Raises:
        AssertionError: a sample is in neither.
    """
    chosen = sum(group.num_rows for piece in planned for group in piece.groups)
    told = Counter({OTHER_SPLIT: manifest.num_samples - chosen})
    for part in parts:
        told.update(part.failures)
    return require_balance("embeddings", manifest.num_samples, sum(part.num_images for part in parts), told)


def _make(
    config: EmbedConfig,
    model_uri: str,
    corpus_digest: str,
    store: Store,
    planned: Sequence[Piece],
    claim: ledger.Claim,
    say: Say,
) -> Iterator[Part]:
    """Obtain all vectors in one go, then write the parts: captions here, images by workers, which read the store."""
    captions = [_captions(piece) for piece in planned]
    texts = list(dict.fromkeys(text for each in captions for _, text in each if text)) if config.captions else []
    units = [group for piece in planned for group in piece.groups]
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
    claim.confirm()
    items: dict[str, tuple[Piece, int, str]] = {}
    for piece, each in zip(planned, captions, strict=True):
        reasons = [reason for _ in piece.groups for reason in next(contents).words]
        kept = [
            (sample_id, text)
            for (sample_id, text), reason in zip(each, reasons, strict=True)
            if not reason and text in vector_of
        ]
        texts_sha256 = ""
        if kept:
            ids, said = zip(*kept, strict=True)
            table = texts_table(ids, said, np.stack([vector_of[text] for text in said]))
            texts_sha256 = _write(config, "texts", piece.name, table)
        items[piece.name] = (piece, len(kept), texts_sha256)
    finish = partial(_finish, config=config, corpus_digest=corpus_digest, store=store, claim=claim)
    pool = pieces.Pool(noun="part", operator="write_embeddings", advice="lower rows_per_part")
    with Progress("embed", len(items), "parts", waits_for=pool.waits_for(), say=say) as progress:
        for _, part in pieces.run(items, finish, pool, say=say):
            progress.advance()
            yield part


def _finish(
    item: tuple[Piece, int, str], *, config: EmbedConfig, corpus_digest: str, store: Store, claim: ledger.Claim
) -> Part:
    """A worker's side of a part with so many texts, in a file of this digest: its images and its record."""
    piece, num_texts, texts_sha256 = item
    vectors, reasons = _kept_vectors(store, corpus_digest, piece)
    table = _images_table(config, piece, vectors, reasons)
    claim.confirm()
    part = Part(
        name=piece.name,
        num_images=int((reasons == "").sum()),
        num_texts=num_texts,
        failures=dict(sorted(Counter(filter(None, reasons)).items())),
        images_sha256=_write(config, "images", piece.name, table),
        texts_sha256=texts_sha256 or None,
    )
    storage.write_text(_record_file(config.output, part.name), part.model_dump_json())
    return part


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
    try:
        pixels = images.resize_shorter(images.decode(data, shorter_side=side), side)
        return images.encode_jpeg(pixels, THUMBNAIL_QUALITY)
    except ImageError:
        # It has a vector, so it was an image a moment ago; a hit is shown without its picture.
        return None


def _write(config: EmbedConfig, kind: Kind, name: str, table: pa.Table) -> str:
    """Write the rows of a part; the hex digest of the file."""
    data = to_parquet(table, row_group_size=ROWS_PER_GROUP)
    storage.write_bytes(part_file(config.output, kind, name), data)
    return hashlib.sha256(data).hexdigest()


def _begin(config: EmbedConfig, maker: Maker, manifest: Manifest) -> None:
    """Say which work the output holds, or find it said.

    Raises:
        VectorIndexError: it holds another work, which `replace` does not allow to remove.
    """
    work = {"maker": maker.model_dump(), "corpus": manifest.digest, "content": config.content()}
    file, key = storage.join(config.output, PLAN_NAME), digest(work)
    try:
        known = storage.read_object(file).get("key")
    except FileNotFoundError:
        known = None
    if known != key and known is not None:
        if not config.replace:
            raise VectorIndexError(
                f"{config.output} holds embeddings of another model, corpus or content; give replace=true or another "
                "output"
            )
        others = ledger.remove_ours(config.output, _is_ours, first=MANIFEST_NAME, last=PLAN_NAME)
        ledger.say_kept(config.output, others)
    storage.write_json(file, work | {"key": key})


def _is_ours(name: str) -> bool:
    return name in (MANIFEST_NAME, PLAN_NAME) or PART_FILE.fullmatch(name) is not None


def _finished(output: str, name: str) -> Part | None:
    try:
        return Part.model_validate(storage.read_json(_record_file(output, name)))
    except (FileNotFoundError, ValidationError):
        return None


def _record_file(output: str, name: str) -> str:
    return storage.inside(storage.join(output, "parts"), f"{name}.json")


def _maker(info: EncoderInfo) -> Maker:
    return Maker(
        name=info.name,
        embedding_dim=info.embedding_dim,
        model_digest=info.model_digest,
        preprocessing_digest=info.preprocessing_digest,
    )
