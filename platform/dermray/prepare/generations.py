"""What a committed corpus is made of, and how new work joins it.

Every source, or lot of rows, that came into a corpus is a generation, with a document in `records/`. The
same command again finds its generation unchanged; with more rows, or another source, it adds one; where settings
differ, or rows have gone, the corpus must be made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from dermray import documents, storage
from dermray.corpus.manifest import MANIFEST_NAME, Manifest
from dermray.corpus.ontology import Ontology
from dermray.errors import CorpusError, DocumentError, OntologyError
from dermray.prepare.digests import distinct, flat
from dermray.prepare.records import RECORDS, ShardRecord, read_record
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.splitting import CommittedContents
from dermray.raw.fetch import ahead
from dermray.raw.sources.rows import DroppedRow, RawTable

NUM_READERS = 16
SIDE_TABLES = "side_tables"
IDENTITY = ("source", "input", "table", "columns")


@dataclass(frozen=True)
class Generation:
    """What one run added to a corpus.

    Attributes:
        number: from 1.
        identity: which source: its keys of IDENTITY.
        content: the other keys that decide what the corpus holds.
        made: records of the shards made from the source.
        final: records of all shards of the corpus as this generation left it, in order.
        num_rows: rows that it has looked at.
        dropped: rows that are in no sample because something is wrong with them.
        ontology: the disease tree of the corpus as this generation left it, as `Ontology.to_json` gives it.
        left_out: rows whose sample was left out on purpose.
        left_out_images: digests of the rows of these.
        figures: what became of duplicates.
        rewritten: what a language model made of the captions, one document a task.
        branches: of each node with several paths, which one its rows mean (`branches.Branch.to_json`).
        tables: files of the source that were read as a whole. Other bytes with the same rows in them make the same
            generation.
        not_understood: by field, how often each text stands that says something of a patient and that no reading fits.
        placeholders: labels that only stand for nothing, and how often each occurs. Part of no name, as `tables`.
        told: what else was told of the rows, by kind and text (`told.Told`). Part of no name.
    """

    number: int
    identity: dict[str, Any]
    content: dict[str, Any]
    made: tuple[str, ...]
    final: tuple[str, ...]
    num_rows: int
    dropped: tuple[DroppedRow, ...]
    ontology: dict[str, list[str]]
    left_out: tuple[DroppedRow, ...] = ()
    left_out_images: tuple[int, ...] = ()
    figures: dict[str, int] = field(default_factory=dict)
    rewritten: tuple[dict[str, Any], ...] = ()
    branches: tuple[dict[str, Any], ...] = ()
    tables: tuple[RawTable, ...] = ()
    not_understood: dict[str, dict[str, int]] = field(default_factory=dict)
    placeholders: dict[str, int] = field(default_factory=dict)
    told: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of its document, by content: the manifest names exactly the one it was written with."""
        # Earlier builds did not write what was not understood: the names that they gave stay.
        unnamed = {"tables", "placeholders", "told"} | (set() if self.not_understood else {"not_understood"})
        content = {name: value for name, value in self.to_json().items() if name not in unnamed}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"generation-{self.number:05d}-{digest[:16]}"

    def to_json(self) -> dict[str, Any]:
        """A JSON document that `from_json` reads."""
        document = asdict(self)
        if not self.branches:
            # A generation from before they were learned is not another one for that.
            del document["branches"]
        return document

    @classmethod
    def read(cls, uri: str) -> Generation:
        """Read what `to_json` gave.

        Raises:
            FileNotFoundError: it is not there.
            DocumentError: it is damaged.
        """
        advice = "if_exists=replace makes the corpus anew"
        found = documents.as_record(_GENERATION, storage.read_json(uri), uri, advice)
        try:
            Ontology.from_json(found.ontology)
        except OntologyError as error:
            raise DocumentError(f"{uri} is damaged ({error}); {advice}") from None
        return found


_GENERATION, _KEYS = TypeAdapter(Generation), TypeAdapter(list[str])


def tables_of(generations: Iterable[Generation], read: Iterable[RawTable] = ()) -> tuple[RawTable, ...]:
    """What some generations, and `read` after them, came from, by URI; each table as it was read last."""
    last = {table.uri: table for generation in generations for table in generation.tables}
    last.update({table.uri: table for table in read})
    return tuple(last[uri] for uri in sorted(last))


@dataclass(frozen=True)
class CommittedCorpus:
    """The committed corpus that new work joins: nothing, or some generations and all records they name."""

    generations: tuple[Generation, ...] = ()
    records: Mapping[str, ShardRecord] = field(default_factory=dict)

    @property
    def ontology(self) -> Ontology | None:
        """Its disease tree; `ontology.json` may be that of a run which did not come to an end."""
        return Ontology.from_json(self.generations[-1].ontology) if self.generations else None

    @property
    def held(self) -> list[ShardRecord]:
        """The records of its shards, in order."""
        return [self.records[key] for key in self.generations[-1].final] if self.generations else []

    def made(self, generations: Iterable[Generation]) -> list[ShardRecord]:
        """The records made by some of its generations."""
        return [self.records[key] for generation in generations for key in generation.made]

    def known(self, generations: Sequence[Generation]) -> np.ndarray:
        """Digests of the images that some of its generations have brought in, or left out; ascending uint64 `[N]`."""
        kept = [flat(record.notes["known"]) for record in self.made(generations)]
        return distinct([*kept, *(generation.left_out_images for generation in generations)])

    def contents(self) -> CommittedContents:
        """What a plan must know of it."""
        numbers: dict[str, int] = {}
        num_shards: dict[str, int] = {}
        groups, splits = [], []
        for record in self.held:
            split, index = record.place
            num_shards[split] = max(num_shards.get(split, 0), index + 1)
            groups.append(np.unique(flat(record.notes["groups"])))
            splits.append(np.full(len(groups[-1]), numbers.setdefault(split, len(numbers)), np.int32))
        # Backwards, so that the first place of a group is that in its last shard: [7 in a, 7 in b] is [7 in b, 7 in a].
        together = np.concatenate([np.zeros(0, np.uint64), *groups[::-1]])
        named, last = np.unique(together, return_index=True)
        split_of_group = np.concatenate([np.zeros(0, np.int32), *splits[::-1]])[last]
        return CommittedContents(self.known(self.generations), named, split_of_group, list(numbers), num_shards)

    def before_last(self) -> CommittedCorpus:
        """The corpus as it was before its last generation."""
        return CommittedCorpus(self.generations[:-1], self.records) if len(self.generations) > 1 else CommittedCorpus()


def generation_uri(output: str, key: str) -> str:
    """Where a generation's document lies."""
    return storage.inside(storage.join(output, RECORDS), f"{key}.json")


def identity(config: PrepareConfig) -> dict[str, Any]:
    """What tells one source from another."""
    return {name: value for name, value in config.content().items() if name in IDENTITY}


def content(config: PrepareConfig) -> dict[str, Any]:
    """What must stay the same for more rows of a source to join."""
    return {name: value for name, value in config.content().items() if name not in (*IDENTITY, "limit")}


def _of_rows(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the samples: side tables lie beside them, and others change none."""
    return {name: value for name, value in made_with.items() if name != SIDE_TABLES}


def committed_corpus(config: PrepareConfig, digests: Callable[[], np.ndarray]) -> CommittedCorpus:
    """The corpus at `config.output` that rows join; nothing where there is none, or it is to be made anew.

    Args:
        digests: gives the `image_digests` of the rows, which take a while: asked where a corpus has others of theirs.

    Raises:
        CorpusError: settings or rows have changed and other sources are in the corpus, or its records are gone.
    """
    if config.if_exists == "replace" or not storage.exists(storage.join(config.output, MANIFEST_NAME)):
        return CommittedCorpus()
    committed = _load(config.output)
    generations = committed.generations
    mine = [generation for generation in generations if generation.identity == identity(config)]
    last = generations[-1]
    if not mine:
        return committed if _joins(last, config) else _replaced(committed, config, "has other settings")
    if _of_rows(mine[-1].content) != _of_rows(content(config)):
        return _replaced(committed, config, "was made with other settings")
    present = np.unique(digests())
    if not np.isin(committed.known(mine), present, assume_unique=True).all():
        return _replaced(committed, config, "holds rows that have changed or gone")
    before = committed.before_last()
    if last is not mine[-1]:
        return committed
    fresh = np.setdiff1d(present, before.known(before.generations), assume_unique=True)
    return before if np.array_equal(fresh, _considered(committed, last)) else committed


def _joins(last: Generation, config: PrepareConfig) -> bool:
    """Samples of other sources must be stored alike, and duplicates treated alike."""
    alike = {**config.transform(), **config.duplicates()}
    del alike["sub_captions"]
    return all(last.content[name] == value for name, value in alike.items())


def _considered(committed: CommittedCorpus, generation: Generation) -> np.ndarray:
    """Digests of all images that a generation has looked at, ascending uint64 `[N]`."""
    dropped = [record.dropped_images for record in committed.made([generation])]
    return distinct([committed.known([generation]), *dropped])


def _replaced(committed: CommittedCorpus, config: PrepareConfig, why: str) -> CommittedCorpus:
    if all(generation.identity == identity(config) for generation in committed.generations):
        return CommittedCorpus()
    others = sorted({f"{g.identity['source']} of {g.identity['input']}" for g in committed.generations})
    raise CorpusError(
        f"{config.output} {why}, and it holds {', '.join(others)}: choose another output, or if_exists=replace to make "
        "it anew from this source alone"
    )


def _listed(output: str, manifest: Manifest) -> list[str]:
    uri = storage.join(output, MANIFEST_NAME)
    return documents.as_record(_KEYS, manifest.provenance["generations"], uri, "if_exists=replace makes it anew")


def _load(output: str) -> CommittedCorpus:
    manifest = Manifest.load(output)
    try:
        generations = tuple(Generation.read(generation_uri(output, key)) for key in _listed(output, manifest))
        keys = sorted({key for generation in generations for key in (*generation.made, *generation.final)})
        records = dict(
            zip(keys, ahead(keys, lambda key: read_record(output, key), num_threads=NUM_READERS), strict=True)
        )
    except (FileNotFoundError, KeyError) as error:
        raise CorpusError(
            f"{output} is a corpus without the records of its making ({error}): choose another output, or "
            "if_exists=replace to make it anew"
        ) from None
    return CommittedCorpus(generations, records)
