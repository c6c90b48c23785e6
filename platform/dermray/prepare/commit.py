"""Making a corpus exist: report, disease tree, and last the manifest; then what crashes have left is removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dermray import storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.corpus.schema import CaptionAspect
from dermray.errors import CorpusError
from dermray.prepare import report
from dermray.prepare.generations import Generation, Standing, generation_uri, tables_of
from dermray.prepare.records import RECORDS, ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import DATA, made_by


def commit(
    config: PrepareConfig,
    before: Standing,
    generation: Generation,
    made: Sequence[ShardRecord],
    final: Sequence[ShardRecord],
    captions_from: Mapping[CaptionAspect, str],
    timing: Mapping[str, Mapping[str, float]],
) -> tuple[Manifest, dict[str, Any], bool]:
    """Publish the corpus that one more generation makes, then remove what it does not name.

    Returns the manifest, the figures of the report, and whether all of it was there already.
    """
    generations = (*before.generations, generation)
    manifest = Manifest(
        version=len(generations),
        shards=tuple(record.shard for record in final if record.shard is not None),
        ontology_sha256=hashlib.sha256(_document(generation.ontology)).hexdigest(),
        provenance={
            "config": config.content(),
            "captions": dict(captions_from),
            "sources": [each.identity for each in generations],
            "generations": [each.key for each in generations],
            "tables": [asdict(table) for table in tables_of(generations)],
            "licences": list(dict.fromkeys(each.content.get("licence") for each in generations)),
            "made_by": made_by(),
        },
    )
    all_made = [*before.made(before.generations), *made]
    stats, unchanged = publish(config, manifest, generations, all_made, final, timing)
    _remove_unnamed(config.output, manifest, generations)
    return manifest, stats, unchanged


def publish(
    config: PrepareConfig,
    manifest: Manifest,
    generations: Sequence[Generation],
    made: Sequence[ShardRecord],
    final: Sequence[ShardRecord],
    timing: Mapping[str, Mapping[str, float]],
) -> tuple[dict[str, Any], bool]:
    """Write report and ontology, then the manifest that makes the corpus exist; nothing if all of it is there.

    Returns the figures of the report, and whether all of it was there already. A table with other bytes and the same
    rows changes nothing but its own digest.
    """
    tree = generations[-1].ontology
    stats = report.summarise(generations, made, final, manifest, Ontology.from_json(tree))
    committed = _committed(config.output, manifest, stats)
    if committed == manifest:
        return stats, True
    unchanged = committed is not None and _but_tables(committed) == _but_tables(manifest)
    for each in generations:
        storage.write_json(generation_uri(config.output, each.key), each.to_json())
    if not unchanged:
        report.write(config, generations, final, manifest, stats, timing)
        # Next to the manifest, so that a corpus which is being replaced has a tree of its own as long as can be.
        storage.write_bytes(storage.join(config.output, ONTOLOGY_NAME), _document(tree))
    manifest.save(config.output)
    return stats, unchanged


def _document(tree: Mapping[str, list[str]]) -> bytes:
    """A disease tree as its file holds it."""
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()


def _committed(output: str, manifest: Manifest, stats: dict[str, Any]) -> Manifest | None:
    """The manifest that is there, if figures and tree beside it are as they would be written now."""
    try:
        tree = storage.sha256(storage.join(output, ONTOLOGY_NAME))
        alike = storage.read_json(storage.join(output, report.STATS)) == stats and tree == manifest.ontology_sha256
        return Manifest.load(output) if alike else None
    except (CorpusError, FileNotFoundError):
        return None


def _but_tables(manifest: Manifest) -> Manifest:
    provenance = {name: value for name, value in manifest.provenance.items() if name != "tables"}
    return manifest.model_copy(update={"provenance": provenance})


def _remove_unnamed(output: str, manifest: Manifest, generations: Sequence[Generation]) -> None:
    """Remove what earlier runs with other settings, and crashes, have left beside the committed shards."""
    shards = {storage.name_of(shard.path) for shard in manifest.shards}
    records = {f"{key}.parquet" for each in generations for key in (*each.made, *each.final)}
    records |= {f"{each.key}.json" for each in generations}
    for folder, named in ((DATA, shards), (RECORDS, records)):
        for uri in storage.list_files(storage.join(output, folder)):
            if storage.name_of(uri) not in named:
                storage.remove(uri)
    for folder in (output, storage.join(output, report.REPORT).rpartition("/")[0]):
        for uri in storage.list_files(folder):
            if storage.name_of(uri).endswith(storage.PART):
                storage.remove(uri)
    storage.remove(storage.join(output, report.DROPPED_WHEN_STOPPED))
