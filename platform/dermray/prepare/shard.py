"""Making one shard: read its images, standardise them, write one Parquet file and a record of what happened.

A record's name carries a digest of everything that decides a shard but its images: its rows, the transform's settings,
the disease tree, the versions of the codecs. So a finished shard is recognised by name after any crash, and making it
twice gives the same file, whose own name carries a digest of its bytes. The record, written after the shard, is what
says that it is finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import __version__, images, storage
from dermray.corpus.accounts import require_balance
from dermray.corpus.manifest import Shard
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import MODALITY, SAMPLE, SCHEMA_VERSION, WHOLE
from dermray.corpus.sentences import RULES
from dermray.corpus.shards import stored_columns
from dermray.errors import ImageError
from dermray.prepare.digests import group_digest, row_digest, without_unknown
from dermray.prepare.plan import ShardSpec
from dermray.prepare.records import NOTES, ShardRecord, read_record, write_record
from dermray.prepare.samples import Counts, RawRow, build_sample, count_rows, count_sample, resolve_labels
from dermray.prepare.settings import PrepareConfig
from dermray.raw.fetch import Fetched, ImageStore, Stamp, ahead
from dermray.raw.sources.rows import DroppedRow

# To be raised when this package makes other bytes from the same input.
FORMAT = 4
DATA = "data"
IMAGE_COLUMN = "image"

ResultT = TypeVar("ResultT")


class MadeShard(NamedTuple):
    """A shard's record, whether it had to be made, and the seconds spent on each kind of work."""

    record: ShardRecord
    fresh: bool
    seconds: dict[str, float]


class ShardMaker:
    """Makes the shards of one corpus; knows nothing of Ray, and travels to where the work is done.

    `with_modality`: some row of the corpus says what kind of picture it has, so that all its shards get the column.
    """

    def __init__(self, config: PrepareConfig, ontology: Ontology, *, with_modality: bool = False) -> None:
        self.config = config
        self.ontology = ontology
        self.with_modality = with_modality
        self._identity = {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "transform": config.transform(),
            "prescribed": isinstance(config.split, str),
            "ontology": ontology.to_json(),
            "versions": versions(),
            # Shards without the column keep the names that earlier builds gave them.
            **({"modality": True} if with_modality else {}),
            # Those without sub-captions by rule do not hang on the rules.
            **({"sentences": RULES} if config.sub_captions else {}),
        }

    @cached_property
    def _store(self) -> ImageStore:
        return ImageStore(
            self.config.input, max_bytes=self.config.max_image_bytes, follow_links=self.config.follow_links
        )

    def make(self, spec: ShardSpec, *, needs_file: bool = False) -> MadeShard:
        """Make a shard, or find it made.

        Args:
            spec: its rows.
            needs_file: false: a record alone will do, since the file may have been replaced by a later one.

        Raises:
            StorageError: the input or the output fails for good.
        """
        rows = spec.rows.to_pylist()
        name = f"{spec.name}-{self._key(rows)}"
        finished = self._finished(name, rows, needs_file)
        if finished is not None:
            return MadeShard(finished, False, {})
        clock = _Clock()
        record = self._make(name, spec, rows, clock)
        write_record(self.config.output, record)
        return MadeShard(record, True, dict(clock.seconds))

    def _key(self, rows: list[RawRow]) -> str:
        said = [without_unknown(row) for row in rows]
        content = json.dumps([self._identity, said], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _finished(self, name: str, rows: list[RawRow], needs_file: bool) -> ShardRecord | None:
        """The record of a shard made before, if its input images are still as they were."""
        try:
            record = read_record(self.config.output, name)
        except FileNotFoundError:
            return None
        if needs_file and record.shard and not is_whole(self.config.output, record.shard):
            return None
        paths = _paths(rows)
        stamps = self._ahead(paths, self._store.stamp)
        return record if record.inputs == _digest_inputs(zip(paths, stamps, strict=True)) else None

    def _make(self, name: str, spec: ShardSpec, rows: list[RawRow], clock: _Clock) -> ShardRecord:
        good: list[tuple[list[RawRow], images.StandardImage]] = []
        dropped: list[DroppedRow] = []
        dropped_images: list[int] = []
        stamps: list[tuple[str, Stamp]] = []
        for image_rows, fetched in clock.waits("read", self._fetched(rows)):
            stamps.append((fetched.path, fetched.stamp))
            try:
                with clock.on("standardise"):
                    good.append((image_rows, self._standardise(image_rows[0], fetched)))
            except ImageError as error:
                dropped.extend(_drop(row, error) for row in image_rows)
                dropped_images.append(self._digest(image_rows))
        reasons = Counter(row.reason for row in dropped)
        require_balance(f"shard {spec.name}", len(rows), sum(len(image_rows) for image_rows, _ in good), reasons)
        row_counts: Counts = defaultdict(Counter)
        sample_counts: Counts = defaultdict(Counter)
        with clock.on("samples"):
            samples = [self._sample(spec.split, *each, row_counts, sample_counts) for each in good]
            notes = [self._note(image_rows, sample) for (image_rows, _), sample in zip(good, samples, strict=True)]
        with clock.on("write"):
            shard = self._write(spec, samples)
        return ShardRecord(
            key=name,
            shard=shard,
            num_rows=len(rows),
            inputs=_digest_inputs(stamps),
            dropped=tuple(dropped),
            dropped_images=tuple(dropped_images),
            row_counts=sorted_counts(row_counts),
            sample_counts=sorted_counts(sample_counts),
            notes=pa.Table.from_pylist(notes, schema=NOTES),
        )

    def _sample(
        self, split: str, rows: list[RawRow], image: images.StandardImage, row_counts: Counts, sample_counts: Counts
    ) -> dict[str, Any]:
        """The sample of an image, counted."""
        resolutions = [resolve_labels(row, self.ontology) for row in rows]
        sample = build_sample(rows, resolutions, image, split, self.ontology, num_sub_captions=self.config.sub_captions)
        count_rows(row_counts, rows, resolutions, image, self.ontology)
        count_sample(sample_counts, sample)
        return sample

    def _digest(self, rows: list[RawRow]) -> int:
        """64 bits over all the rows of an image, as `digests.image_digests` gives them."""
        return sum(row_digest(row, self.config.input) for row in rows) % 2**64

    def _note(self, rows: list[RawRow], sample: dict[str, Any]) -> dict[str, Any]:
        groups = {group_digest(row["source"], row["group"]) for row in rows if row["group"] is not None}
        return {
            "sample_id": sample["sample_id"],
            "digest": hashlib.sha256(sample["image"]).hexdigest()[:24],
            "phash": sample["phash"],
            "image": rows[0]["image"],
            "row": rows[0]["row"],
            "known": [self._digest(rows)],
            "groups": sorted(groups),
            "prescribed": isinstance(self.config.split, str) or any(row["split"] is not None for row in rows),
            "duplicate_group": None,
        }

    def _fetched(self, rows: list[RawRow]) -> Iterator[tuple[list[RawRow], Fetched]]:
        """The rows of each image with its bytes, reading ahead."""
        by_image = [(path, list(group)) for path, group in groupby(rows, key=lambda row: row["image"])]
        fetched = self._ahead([path for path, _ in by_image], self._store.fetch)
        return zip((group for _, group in by_image), fetched, strict=True)

    def _ahead(self, paths: list[str], function: Callable[[str], ResultT]) -> Iterator[ResultT]:
        local = storage.is_local(self.config.input)
        return ahead(paths, function, num_threads=self.config.num_fetch_threads, local=local)

    def _standardise(self, row: RawRow, fetched: Fetched) -> images.StandardImage:
        if fetched.data is None:
            raise ImageError(fetched.reason, fetched.detail)
        image = images.standardise(
            fetched.data,
            image_size=self.config.image_size,
            jpeg_quality=self.config.jpeg_quality,
            max_pixels=self.config.max_pixels,
            min_side=self.config.min_side,
            min_contrast=self.config.min_contrast,
        )
        # A sample that was prepared before keeps its hash, which was taken before the image was compressed.
        kept = image.jpeg is fetched.data and row["phash"] is not None
        return image._replace(phash=row["phash"]) if kept else image

    def _write(self, spec: ShardSpec, samples: list[dict[str, Any]]) -> Shard | None:
        if not samples:
            return None
        schema = schema_of(samples, with_modality=self.with_modality)
        return write_shard(self.config.output, spec.name, spec.split, samples, self.config.row_group_size, schema)


def schema_of(samples: Sequence[dict[str, Any]], *, with_modality: bool) -> pa.Schema:
    """The columns of a shard: a modality where one of its samples has one, or where its corpus has the column."""
    return WHOLE if with_modality or any(sample[MODALITY.name] for sample in samples) else SAMPLE


def write_shard(
    output: str,
    place: str,
    split: str,
    samples: Sequence[dict[str, Any]],
    row_group_size: int,
    schema: pa.Schema = SAMPLE,
) -> Shard:
    """Publish samples as a Parquet file under `output`, named by its place (`train-00000`) and its content."""
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(samples, schema=schema),
        sink,
        row_group_size=row_group_size,
        # JPEGs do not get smaller, and a plain column can be read without copying.
        compression={leaf: "NONE" if leaf == IMAGE_COLUMN else "ZSTD" for leaf in stored_columns(schema)},
        use_dictionary=[leaf for leaf in stored_columns(schema) if leaf not in (IMAGE_COLUMN, "sample_id", "phash")],
        write_statistics=["source", "split", "skin_type", "width", "height"],
        write_page_checksum=True,
    )
    content = sink.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    path = f"{DATA}/{place}-{digest[:16]}.parquet"
    storage.write_bytes(storage.join(output, path), content)
    return Shard(
        path=path,
        split=split,
        num_samples=len(samples),
        num_bytes=len(content),
        sha256=digest,
        row_groups=tuple(min(row_group_size, len(samples) - first) for first in range(0, len(samples), row_group_size)),
    )


def is_whole(output: str, shard: Shard) -> bool:
    """True if a shard's file is there in full length."""
    try:
        return storage.size_bytes(storage.inside(output, shard.path)) == shard.num_bytes
    except FileNotFoundError:
        return False


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a shard's bytes."""
    return {**images.codec_versions(), "pyarrow": pa.__version__}


def made_by() -> dict[str, str]:
    """Versions that a corpus's provenance names."""
    return {"dermray": __version__, **versions()}


def sorted_counts(counts: Counts) -> dict[str, dict[str, int]]:
    """Counts by kind in a fixed order."""
    return {kind: dict(sorted(counter.items())) for kind, counter in sorted(counts.items())}


class _Clock:
    """Seconds spent on each kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - started

    def waits(self, kind: str, items: Iterator[Any]) -> Iterator[Any]:
        """The items; the time until each comes is counted."""
        while True:
            with self.on(kind):
                item = next(items, None)
            if item is None:
                return
            yield item


def _paths(rows: list[RawRow]) -> list[str]:
    return list(dict.fromkeys(row["image"] for row in rows))


def _drop(row: RawRow, error: ImageError) -> DroppedRow:
    return DroppedRow(row["row"], row["source_id"], row["image"], error.reason, str(error))


def _digest_inputs(stamps: Any) -> str:
    content = json.dumps([[path, *stamp] for path, stamp in stamps])
    return hashlib.sha256(content.encode()).hexdigest()
