"""The state of an export: what is to be written, what is there already, and how it is committed. Knows nothing of Ray.

A part is finished when its record is there and its files are those of the record. So after a crash the same command
writes what is missing, and the result is the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from dermray import __version__, ledger, storage
from dermray.corpus.accounts import OTHER_SPLIT, require_balance
from dermray.corpus.manifest import MANIFEST_NAME, Manifest
from dermray.corpus.ontology import ONTOLOGY_NAME
from dermray.corpus.side_tables import in_words
from dermray.errors import CorpusError
from dermray.export import manifest as records
from dermray.export.formats import WITH_SIDES, plan_parts, writer_of
from dermray.export.manifest import EXPORT_NAME, STARTED, STATE, ExportedFile, ExportManifest, PartRecord, Started
from dermray.export.parts import CAPTIONS, SAMPLES, UNCAPTIONED, Part, Samples
from dermray.export.settings import ExportConfig

# To be raised when this package makes other bytes from the same corpus.
FORMAT = 1
PART_RECORD = re.compile(r"[a-z0-9_-]+-\d{5,}\.json")
IMAGE_FILE = re.compile(r"\d{5,}\.jpg")


@dataclass(frozen=True)
class Work:
    """An export that is planned. `key` is a digest of everything that decides its bytes."""

    config: ExportConfig
    corpus: Manifest
    samples: Samples
    parts: tuple[Part, ...]
    key: str
    tree: bytes | None

    @property
    def carries_sides(self) -> bool:
        """Whether the files have the columns of the corpus's side tables."""
        return self.config.format in WITH_SIDES

    @property
    def left_out(self) -> list[str]:
        """A line about side tables that the export cannot hold."""
        tables = self.corpus.side_tables
        if self.carries_sides or not tables:
            return []
        return [
            f"format={self.config.format} has no place for side tables: the export leaves out {len(tables)}, "
            f"{in_words(tables)}; format=parquet carries them"
        ]

    def finished(self, part: Part) -> PartRecord | None:
        """The record of a part that was written before, if its files are still there."""
        record: PartRecord | None = records.read(PartRecord, self._record_uri(part))
        return record if record and all(_is_there(self.config.output, file) for file in record.files) else None

    def write(self, part: Part) -> PartRecord:
        """Write a part, and say that it is written.

        Raises:
            CorpusError: the corpus is damaged.
            StorageError, OSError: the output cannot be written.
        """
        record = writer_of(self.config.format)(part, self.samples, self.config)
        records.write(self._record_uri(part), record)
        return record

    def _record_uri(self, part: Part) -> str:
        return storage.join(self.config.output, STATE, f"{part.name}.json")


def plan(config: ExportConfig) -> Work:
    """Read the corpus's manifest and plan the parts.

    Raises:
        CorpusError: there is no corpus, it lacks a split, or its tree is not that of its manifest.
        StorageError: it cannot be read.
    """
    corpus = Manifest.load(config.corpus)
    splits, with_sides = list(dict.fromkeys(config.splits or corpus.splits)), config.format in WITH_SIDES
    samples = Samples.of(config.corpus, corpus, splits, with_sides=with_sides)
    identity = {
        "format": FORMAT,
        "corpus": corpus.digest,
        "config": {**config.content(), "splits": list(samples.splits)},
        "pyarrow": pa.__version__,
    }
    if with_sides and corpus.side_tables:
        # Earlier builds left them out.
        identity["side_tables"] = [table.name for table in corpus.side_tables]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Work(config, corpus, samples, tuple(plan_parts(samples.splits, config)), key, _tree(config, corpus))


def _tree(config: ExportConfig, corpus: Manifest) -> bytes | None:
    if corpus.ontology_sha256 is None:
        return None
    uri = storage.join(config.corpus, ONTOLOGY_NAME)
    try:
        tree = storage.read_bytes(uri)
    except FileNotFoundError:
        tree = b""
    if hashlib.sha256(tree).hexdigest() != corpus.ontology_sha256:
        raise CorpusError(f"{uri} is not the tree of the corpus's manifest; restore it or prepare again")
    return tree


def begin(work: Work) -> dict[Part, PartRecord]:
    """Make the output ours before anything is written, and find the parts that are written already.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        CorpusError: it holds a prepared corpus, or another export that `replace` does not allow to remove.
        StorageError: it cannot be read or written.
    """
    output = work.config.output
    if storage.exists(storage.join(output, MANIFEST_NAME)):
        raise CorpusError(f"{output} holds a prepared corpus: give another output")
    with ledger.claim(output, wait_s=work.config.wait_for_output_s) as claim:
        started: Started | None = records.read(Started, storage.join(output, STATE, STARTED))
        if started is not None and started.key != work.key:
            if not work.config.replace:
                other = started.corpus_digest != work.corpus.digest
                raise CorpusError(
                    f"{output} holds an export of {'another corpus' if other else 'this corpus by other settings'}: "
                    "give another output, or replace=true to remove it first"
                )
            claim.confirm()
            _remove(output, started)
            started = None
        if started is None:
            paths = tuple(path for part in work.parts for path in part.paths)
            begun = Started(key=work.key, corpus_digest=work.corpus.digest, paths=paths)
            records.write(storage.join(output, STATE, STARTED), begun)
        return {part: record for part in work.parts if (record := work.finished(part)) is not None}


def _remove(output: str, started: Started) -> None:
    """Remove the files of an export. Its manifest goes first: from then on it is none, whatever is still there."""
    own = {EXPORT_NAME, ONTOLOGY_NAME, f"{STATE}/{STARTED}", *started.paths}

    def is_ours(name: str) -> bool:
        folder, _, last = name.rpartition("/")
        if folder == STATE:
            return name in own or PART_RECORD.fullmatch(last) is not None
        # Of a folder of images, those that bear the names which we give.
        return name in own or (folder in own and IMAGE_FILE.fullmatch(last) is not None)

    ledger.say_kept(output, ledger.remove_ours(output, is_ours, first=EXPORT_NAME, last=f"{STATE}/{STARTED}"))


def commit(work: Work, written: Mapping[Part, PartRecord]) -> tuple[ExportManifest, bool]:
    """Write the tree, then the manifest that makes the export exist; and whether it was there already, as it is now.

    Raises:
        ClaimError: another run has taken the output over.
    """
    output = work.config.output
    splits = {split: dict.fromkeys((SAMPLES, CAPTIONS, UNCAPTIONED), 0) for split in work.samples.splits}
    files: list[ExportedFile] = []
    for part in work.parts:
        files.extend(written[part].files)
        if part.split is not None:
            for name, count in written[part].counts.items():
                splits[part.split][name] = splits[part.split].get(name, 0) + count
    chosen = sum(work.samples.splits.values())
    account = require_balance(
        "export",
        work.corpus.num_samples,
        sum(each[SAMPLES] for each in splits.values()),
        {OTHER_SPLIT: work.corpus.num_samples - chosen},
    )
    manifest = ExportManifest(
        key=work.key,
        corpus_digest=work.corpus.digest,
        config=work.config.content(),
        made_by={"dermray": __version__, "pyarrow": pa.__version__},
        splits=splits,
        files=tuple(files),
        samples=account,
        side_tables=_sides(work),
    )
    uri = storage.join(output, EXPORT_NAME)
    tree_uri = storage.join(output, ONTOLOGY_NAME)
    if records.read(ExportManifest, uri) == manifest and storage.exists(tree_uri) == (work.tree is not None):
        return manifest, True
    with ledger.claim(output) as claim:
        claim.confirm()
        if work.tree is not None:
            storage.write_bytes(tree_uri, work.tree)
        claim.confirm()
        records.write(uri, manifest)
        # Of an earlier run that was killed.
        ledger.remove_unfinished(output)
    return manifest, False


def _sides(work: Work) -> dict[str, dict[str, list[str]]] | None:
    """What becomes of the corpus's side tables, with their columns; None where it has none."""
    tables: dict[str, list[str]] = {table.name: list(table.columns) for table in work.corpus.side_tables}
    nothing: dict[str, list[str]] = {}
    if not tables:
        return None
    carried, left_out = (tables, nothing) if work.carries_sides else (nothing, tables)
    return {"carried": carried, "left_out": left_out}


def _is_there(output: str, file: ExportedFile) -> bool:
    uri = storage.inside(output, file.path)
    if file.num_files is not None:
        return len(storage.list_files(uri)) == file.num_files
    try:
        return storage.size_bytes(uri) == file.num_bytes
    except FileNotFoundError:
        return False
