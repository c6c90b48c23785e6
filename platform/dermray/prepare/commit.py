"""Making a corpus exist: report, disease tree, and last the manifest; then what crashes have left is removed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from dermray import ledger, storage
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import ONTOLOGY_NAME, Ontology
from dermray.corpus.schema import CaptionAspect
from dermray.corpus.side_tables import FOLDER
from dermray.errors import CorpusError
from dermray.prepare import card, report, told
from dermray.prepare.generations import (
    SIDE_TABLES,
    CommittedCorpus,
    Generation,
    content,
    generation_uri,
    identity,
    tables_of,
)
from dermray.prepare.plan import ShardSpec
from dermray.prepare.reconcile import Reconciled
from dermray.prepare.records import RECORDS, ShardRecord
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import DATA, made_by
from dermray.prepare.sides import Sides
from dermray.prepare.work import Work
from dermray.raw.sources.rows import DroppedRow

NO_SIDES = Sides()
# Names as only this program gives them: a split, a place, and the digest of what is inside.
SHARD_FILE = re.compile(r"[a-z][a-z0-9_]*-\d{5,}-[0-9a-f]{16}\.parquet")
RECORD_FILE = re.compile(rf"{SHARD_FILE.pattern}|generation-\d{{5,}}-[0-9a-f]{{16}}\.json")


def commit(
    config: PrepareConfig,
    before: CommittedCorpus,
    generation: Generation,
    made: Sequence[ShardRecord],
    final: Sequence[ShardRecord],
    captions_from: Mapping[CaptionAspect, str],
    timing: Mapping[str, Any],
    sides: Sides = NO_SIDES,
) -> tuple[Manifest, dict[str, Any], bool]:
    """Publish the corpus that one more generation makes, then remove what it does not name.

    Returns the manifest, the figures of the report, and whether all of it was there already.

    Raises:
        ClaimError: another run has taken the output over.
    """
    generations = (*before.generations, generation)
    modalities, untexted = report.modalities(final), report.untexted(final)
    manifest = Manifest(
        version=len(generations),
        shards=tuple(record.shard for record in final if record.shard is not None),
        ontology_sha256=hashlib.sha256(_document(generation.ontology)).hexdigest(),
        side_tables=sides.tables,
        provenance={
            "config": config.content(),
            "captions": dict(captions_from),
            "sources": [each.identity for each in generations],
            "generations": [each.key for each in generations],
            "tables": [asdict(table) for table in tables_of(generations)],
            "licences": list(dict.fromkeys(each.content.get("licence") for each in generations)),
            "made_by": made_by(),
            # Named where there are any: a corpus without them is what it was.
            **({"modalities": modalities} if modalities else {}),
            **({"untexted": untexted} if untexted else {}),
        },
    )
    all_made = [*before.made(before.generations), *made]
    with ledger.claim(config.output) as claim:
        stats, unchanged = publish(config, manifest, generations, all_made, final, timing, sides)
        # A run that stood still must not take the shards that another is making for what it has left itself.
        claim.confirm()
        remove_unnamed(config.output, manifest, generations)
    return manifest, stats, unchanged


def generation_of(
    config: PrepareConfig,
    work: Work,
    made: Sequence[ShardRecord],
    decided: Reconciled,
    final: Sequence[ShardRecord],
) -> Generation:
    """What a run adds to the corpus, with all that became of its rows.

    Args:
        work: what there was to do.
        made: the records of its shards, in the order of the plan.
        decided: which samples were brought together and left out.
        final: the records of the whole corpus as it will be.
    """
    left_out = {sample.image: sample for sample in decided.left_out}
    rows = [
        DroppedRow(
            row["row"], row["source_id"], row["image"], left_out[row["image"]].reason, left_out[row["image"]].detail
        )
        for row in _rows_of(work.plan.shards, left_out)
    ]
    dropped = [*work.plan.dropped, *(row for record in made for row in record.dropped)]
    return Generation(
        number=len(work.committed.generations) + 1,
        identity=identity(config),
        content=content(config),
        made=tuple(record.key for record in made),
        final=tuple(record.key for record in final),
        num_rows=work.plan.num_rows,
        dropped=tuple(sorted(dropped, key=lambda row: row.row)),
        ontology=work.ontology.to_json(),
        left_out=tuple(sorted(rows, key=lambda row: row.row)),
        left_out_images=tuple(sorted(digest for sample in decided.left_out for digest in sample.known)),
        figures=decided.figures,
        rewritten=tuple(done.to_json() for done in work.rewritten),
        branches=tuple(branch.to_json() for branch in work.branches),
        tables=work.tables,
        placeholders=dict(sorted(work.placeholders.items())),
        told={**work.told, **told.of_equal_images(decided, final).counts},
        not_understood={name: dict(sorted(texts.items())) for name, texts in work.not_understood.items()},
    )


def _rows_of(specs: Sequence[ShardSpec], paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not paths:
        return []
    columns = ["row", "source_id", "image"]
    return [row for spec in specs for row in spec.rows.select(columns).to_pylist() if row["image"] in paths]


def with_sides(before: Manifest, config: PrepareConfig, sides: Sides) -> Manifest:
    """The manifest of the same samples with these side tables beside them.

    Its configuration is that of the source which came last; of another one that comes again it says nothing.
    """
    if before.provenance["sources"][-1] != identity(config):
        return before.model_copy(update={"side_tables": sides.tables})
    of_rows = {name: value for name, value in before.provenance["config"].items() if name != SIDE_TABLES}
    asked = config.content().get(SIDE_TABLES)
    made_with = {**of_rows, **({SIDE_TABLES: asked} if asked else {})}
    return before.model_copy(
        update={"side_tables": sides.tables, "provenance": {**before.provenance, "config": made_with}}
    )


def publish(
    config: PrepareConfig,
    manifest: Manifest,
    generations: Sequence[Generation],
    made: Sequence[ShardRecord],
    final: Sequence[ShardRecord],
    timing: Mapping[str, Any],
    sides: Sides = NO_SIDES,
) -> tuple[dict[str, Any], bool]:
    """Write report and ontology, then the manifest that makes the corpus exist; nothing if all of it is there.

    Returns the figures of the report, and whether all of it was there already. A table with other bytes and the same
    rows changes nothing but its own digest.

    Raises:
        ClaimError: another run has taken the output over.
    """
    tree = generations[-1].ontology
    stats = report.summarise(generations, made, final, manifest, Ontology.from_json(tree))
    if sides.tables:
        # A corpus without side tables keeps the figures that it had before there were any.
        stats["side_tables"] = dict(sides.figures)
    committed = _committed(config.output, manifest, stats)
    if committed == manifest:
        return stats, True
    unchanged = committed is not None and _but_tables(committed) == _but_tables(manifest)
    with ledger.claim(config.output) as claim:
        claim.confirm()
        for each in generations:
            storage.write_json(generation_uri(config.output, each.key), each.to_json())
        if not unchanged:
            report.write(config, generations, final, manifest, stats, timing)
            if sides.tables:
                report.write_dropped(storage.join(config.output, report.SIDES_DROPPED), sides.listed())
            card.write(config.output, manifest)
            claim.confirm()
            # Next to the manifest, so that a corpus which is being replaced has a tree of its own as long as can be.
            storage.write_bytes(storage.join(config.output, ONTOLOGY_NAME), _document(tree))
        claim.confirm()
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


def remove_unnamed(output: str, manifest: Manifest, generations: Sequence[Generation]) -> None:
    """Remove what earlier runs with other settings, and crashes, have left beside the committed shards."""
    shards = {storage.name_of(shard.path) for shard in manifest.shards}
    records = {f"{key}.parquet" for each in generations for key in (*each.made, *each.final)}
    records |= {f"{each.key}.json" for each in generations}
    for folder in (output, *(storage.join(output, name) for name in (DATA, RECORDS, report.FOLDER))):
        ledger.remove_unfinished(folder, recursive=False)
    foreign = []
    for folder, ours, named in ((DATA, SHARD_FILE, shards), (RECORDS, RECORD_FILE, records)):
        uri = storage.join(output, folder)
        others = ledger.remove_ours(uri, partial(_matches, ours), keep=named, recursive=False)
        foreign += [f"{folder}/{name}" for name in others]
    named_sides = {table.name: {storage.name_of(side.path) for side in table.shards} for table in manifest.side_tables}
    for uri in storage.list_folders(storage.join(output, FOLDER)):
        kept = named_sides.get(storage.name_of(uri), set())
        ledger.remove_unfinished(uri, recursive=False)
        others = ledger.remove_ours(uri, partial(_matches, SHARD_FILE), keep=kept, recursive=False)
        foreign += [f"{FOLDER}/{storage.name_of(uri)}/{name}" for name in others]
    gone = (report.DROPPED_WHEN_STOPPED, report.LISTED_WHEN_STOPPED)
    for name in gone if manifest.side_tables else (*gone, report.SIDES_DROPPED):
        storage.remove(storage.join(output, name))
    ledger.say_kept(output, foreign)


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(name) is not None
