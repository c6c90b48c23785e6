"""What went in, what came out, what was dropped and why: `report/` of a prepared corpus.

Everything here is a function of the committed shards and the plan, without clock or host, so that an interrupted and
an undisturbed run leave the same report.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import reporting, storage
from dermray.corpus.manifest import Manifest, Shard
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CAPTION_ASPECTS, PAIR_ASPECTS
from dermray.prepare.plan import Plan
from dermray.prepare.samples import WORDS_LIMIT, WORDS_STEP
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.shard import ShardRecord
from dermray.prepare.sources.rows import DroppedRow
from dermray.reporting import plots

REPORT = "report/report.html"
STATS = "report/stats.json"
DROPPED = "report/dropped.parquet"
DROPPED_WHEN_STOPPED = "report/dropped-when-stopped.parquet"

DROPPED_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("image", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
REASONS = {
    "no_image_path": "the table gives no image path",
    "path_outside_root": "the path leaves the input folder",
    "empty_caption": "the row has no caption",
    "malformed_row": "the row has another number of cells than the header",
    "excluded_by_source": "the source itself says not to use the image",
    "missing_file": "there is no such file, or no such member of the archive",
    "unreadable": "the disk or the archive does not give the file",
    "too_many_bytes": "the file is larger than allowed",
    "zero_byte": "the file is empty",
    "not_an_image": "the content is no known image format",
    "truncated": "the pixels cannot all be decoded",
    "too_many_pixels": "the picture is larger than allowed",
    "too_small": "the picture is smaller than allowed",
    "blank": "the picture shows nothing: it is all of one colour",
}
SKIN_TYPES = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "unknown": "unknown"}
NUM_THUMBNAILS = 24
NUM_EXAMPLES = 3
NUM_TOP = 25
NUM_SHARES = 12
NUM_SUGGESTED = 500


def summarise(plan: Plan, records: Sequence[ShardRecord], manifest: Manifest, ontology: Ontology) -> dict[str, Any]:
    """The document of `stats.json`.

    Raises:
        AssertionError: rows in are not rows out plus rows dropped.
    """
    counts = _merged(records)
    dropped = all_dropped(plan, records)
    num_rows_kept = sum(record.num_rows - len(record.dropped) for record in records)
    if num_rows_kept + len(dropped) != plan.num_rows:
        raise AssertionError(f"{plan.num_rows} rows in, {num_rows_kept} in samples, {len(dropped)} dropped")
    captions = {aspect: counts["captions"][aspect] for aspect in CAPTION_ASPECTS}
    ids = Counter(sample_id for record in records for sample_id in record.sample_ids)
    return {
        "rows": {"in": plan.num_rows, "in_samples": num_rows_kept, "dropped": len(dropped)},
        "dropped": reasons(dropped),
        "samples": manifest.num_samples,
        "identical_images": sum(count - 1 for count in ids.values()),
        "splits": manifest.splits,
        "shards": len(manifest.shards),
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "captions": captions,
        "pairs": sum(captions[aspect] for aspect in PAIR_ASPECTS),
        "caption_words": {aspect: _words(counts[f"words_{aspect}"]) for aspect in CAPTION_ASPECTS},
        "rows_labelled": counts["rows"]["labelled"],
        "rows_resolved": counts["rows"]["resolved"],
        "unresolved_labels": _ranked(counts["unresolved"]),
        "suggestions": _suggestions(_ranked(counts["unresolved"]), ontology),
        "levels": _levels(counts, ontology),
        "labels": _ranked(counts["labels"]),
        "concepts": _ranked(counts["concepts"]),
        "skin_types": {kind: counts["skin_types"][kind] for kind in SKIN_TYPES if counts["skin_types"][kind]},
        "body_sites": _ranked(counts["body_sites"]),
        "sources": _ranked(counts["sources"]),
        "origins": _ranked(counts["origins"]),
        "formats": _ranked(counts["formats"]),
        "sizes": _ranked(counts["sizes"]),
    }


def all_dropped(plan: Plan, records: Iterable[ShardRecord]) -> list[DroppedRow]:
    """Every dropped row, in table order."""
    rows = [*plan.dropped, *(row for record in records for row in record.dropped)]
    return sorted(rows, key=lambda row: row.row)


def reasons(dropped: Iterable[DroppedRow]) -> dict[str, int]:
    """Dropped rows by reason, most frequent first."""
    return _ranked(Counter(row.reason for row in dropped))


def write_dropped(uri: str, dropped: Sequence[DroppedRow]) -> None:
    """Publish dropped rows as a Parquet file."""
    table = pa.Table.from_pylist([asdict(row) for row in dropped], schema=DROPPED_SCHEMA)
    with storage.staged(uri) as aside:
        pq.write_table(table, aside, compression="ZSTD")


def write(
    config: PrepareConfig,
    plan: Plan,
    records: Sequence[ShardRecord],
    manifest: Manifest,
    stats: Mapping[str, Any],
) -> None:
    """Publish `dropped.parquet`, `stats.json` and `report.html`."""
    dropped = all_dropped(plan, records)
    write_dropped(storage.join(config.output, DROPPED), dropped)
    storage.write_json(storage.join(config.output, STATS), stats)
    page = reporting.render(
        "prepare.html",
        config=config.content(),
        name=storage.name_of(config.output),
        manifest=manifest,
        stats=stats,
        plots=_plots(stats),
        shares=_shares(stats),
        reasons=_explained(dropped, stats["dropped"]),
        shots=_shots(config.output, manifest),
        num_top=NUM_TOP,
    )
    storage.write_text(storage.join(config.output, REPORT), page)


def _merged(records: Iterable[ShardRecord]) -> dict[str, Counter[str]]:
    merged: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for kind, counter in record.counts.items():
            merged[kind].update(counter)
    return merged


def _ranked(counter: Mapping[str, int]) -> dict[str, int]:
    """Most frequent first, ties by name, so that the order does not hang on who came first."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _words(counter: Mapping[str, int]) -> dict[str, int]:
    """Captions by number of words, in steps; the last step takes all longer ones."""
    return {str(low): counter.get(str(low), 0) for low in range(0, WORDS_LIMIT + 1, WORDS_STEP)}


def _levels(counts: Mapping[str, Counter[str]], ontology: Ontology) -> list[dict[str, int]]:
    """For each level of the tree: nodes, those that a label names, those with a label at or below, labels given."""
    nodes = Counter(ontology.level(name) for name in ontology)
    named = set(counts["labels"])
    seen = Counter(ontology.level(name) for name in named)
    covered = Counter(ontology.level(name) for name in named.union(*(ontology.ancestors(name) for name in named)))
    return [
        {
            "level": level,
            "nodes": nodes[level],
            "seen": seen[level],
            "covered": covered[level],
            "labels": counts["levels"][str(level)],
        }
        for level in sorted(nodes)
    ]


def _suggestions(unresolved: Mapping[str, int], ontology: Ontology) -> dict[str, list[dict[str, Any]]]:
    """Nodes that the most frequent unresolved texts may mean: for a person to mend table or tree by, never taken."""
    return {
        text: [suggestion._asdict() for suggestion in found]
        for text in list(unresolved)[:NUM_SUGGESTED]
        if (found := ontology.suggest(text))
    }


def _plots(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Inline SVG by name; empty strings where there is nothing to show."""

    def bars(counter: Mapping[str, int], title: str) -> Any:
        top = list(counter.items())[:NUM_TOP]
        return plots.bar_chart([name for name, _ in top], [n for _, n in top], title=title) if top else ""

    words = stats["caption_words"]
    return {
        "labels": bars(stats["labels"], "images by condition"),
        "concepts": bars(stats["concepts"], "images by concept"),
        "words": [_word_plot(aspect, bins) for aspect, bins in words.items() if any(bins.values())],
    }


def _word_plot(aspect: str, bins: Mapping[str, int]) -> Any:
    """Caption lengths up to the longest, on an axis of at least 100 words."""
    longest = max(int(low) for low, count in bins.items() if count)
    shown = {int(low): count for low, count in bins.items() if int(low) <= max(longest, 90)}
    edges = [*shown, max(shown) + WORDS_STEP]
    return plots.histogram(list(shown.values()), edges, title=f"{aspect} captions by number of words")


def _shares(stats: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Small tables of counts with their share of the samples, one a card; those with nothing to tell left out."""
    skin_types = {SKIN_TYPES[kind]: count for kind, count in stats["skin_types"].items()}
    cards = [
        ("Where the images are from", "as the source names it", stats["origins"]),
        ("Skin types", "Fitzpatrick I to VI", skin_types),
        ("Body sites", "a sample may show several", stats["body_sites"]),
        ("Size of the originals", "shorter side, before it is reduced", stats["sizes"]),
        ("Format of the originals", "all are stored as JPEG", stats["formats"]),
    ]
    return [
        {"title": title, "note": note, "counts": dict(list(counts.items())[:NUM_SHARES])}
        for title, note, counts in cards
        if counts
    ]


def _explained(dropped: Sequence[DroppedRow], counted: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each reason with its count, meaning and some of its rows."""
    examples: dict[str, list[DroppedRow]] = defaultdict(list)
    for row in dropped:
        if len(examples[row.reason]) < NUM_EXAMPLES:
            examples[row.reason].append(row)
    return [
        {"reason": reason, "count": count, "meaning": REASONS.get(reason, ""), "examples": examples[reason]}
        for reason, count in counted.items()
    ]


def _shots(output: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Some samples, spread over the shards, each with a thumbnail."""
    step = max(1, len(manifest.shards) // NUM_THUMBNAILS)
    chosen = manifest.shards[::step][:NUM_THUMBNAILS]
    each = -(-NUM_THUMBNAILS // len(chosen))
    shots = [shot for shard in chosen for shot in _first_samples(output, shard, each)]
    return shots[:NUM_THUMBNAILS]


def _first_samples(output: str, shard: Shard, number: int) -> list[dict[str, Any]]:
    fs, path = storage.filesystem(storage.join(output, shard.path))
    columns = ["image", "captions", "labels", "concepts", "split", "source_id", "skin_type"]
    with fs.open_input_file(path) as file:
        rows = pq.ParquetFile(file).read_row_group(0, columns=columns).slice(0, number).to_pylist()
    return [{**row, "thumbnail": reporting.thumbnail(row.pop("image"), max_side=220)} for row in rows]
