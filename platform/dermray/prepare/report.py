"""What went in, what came out, what was dropped and why: `report/` of a prepared corpus.

Figures are a function of what is committed, without clock or host, so that an interrupted and an undisturbed run leave
the same ones. Only `timing.json`, and its card in the report, tell of the run itself.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dermray import reporting, storage
from dermray.corpus.accounts import require_balance
from dermray.corpus.branches import contradictions
from dermray.corpus.manifest import Manifest
from dermray.corpus.ontology import Ontology
from dermray.corpus.schema import CAPTION_ASPECTS, PAIR_ASPECTS
from dermray.prepare.generations import Generation
from dermray.prepare.records import ShardRecord
from dermray.prepare.report_pictures import samples_shown, twins_shown
from dermray.prepare.samples import MODALITIES, UNTEXTED, WORDS_LIMIT, WORDS_STEP
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.told import summed
from dermray.printable import printable
from dermray.raw.archives import shown
from dermray.raw.fetch import ImageStore
from dermray.raw.sources.rows import DroppedRow, merged_counts
from dermray.raw.sources.telling import in_words
from dermray.reporting import plots

FOLDER = "report"
REPORT = "report/report.html"
STATS = "report/stats.json"
TIMING = "report/timing.json"
DROPPED = "report/dropped.parquet"
# The rows of side tables that no sample has got.
SIDES_DROPPED = "report/side_tables-dropped.parquet"
DROPPED_WHEN_STOPPED = "report/dropped-when-stopped.parquet"
# The same rows, for people: Excel opens it.
LISTED_WHEN_STOPPED = "report/dropped-when-stopped.csv"

DROPPED_SCHEMA = pa.schema(
    [
        pa.field("input", pa.string(), nullable=False),
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
    "empty_caption": "the row has no caption; in a table without captions, no label to make one of",
    "malformed_row": "the row has another number of cells than the header",
    "excluded_by_source": "the source itself says not to use the image",
    "ambiguous_image": "several files bear the image's name",
    "split_unclear": "no list of a split names it, or several do",
    "missing_file": "there is no such file, or no such member of the archive",
    "unreadable": "the disk or the archive does not give the file",
    "too_many_bytes": "the file is larger than allowed",
    "zero_byte": "the file is empty",
    "not_an_image": "the content is no known image format",
    "truncated": "the pixels cannot all be decoded",
    "too_many_pixels": "the picture is larger than allowed",
    "too_small": "the picture is smaller than allowed",
    "too_elongated": "the picture is longer than a JPEG can be",
    "too_complex": "the file is built in more parts than any camera or editor writes",
    "unsupported_format": "an image in a format that is not read here; the detail says what to do",
    "burned_in_annotation": "the file says that the picture shows who the patient is",
    "near_duplicate": "a near-duplicate of another image, which stays",
    "in_evaluation_corpus": "it resembles an image of an evaluation corpus",
    "no_key": "the row of a side table names no sample",
    "key_stood_above": "a row of the side table above it has the same key, and counts",
    "no_sample": "no sample of the corpus has the key of the side table's row",
    "several_samples": "several samples of the corpus have the key of the side table's row",
    "mask_size": "the mask has not the proportions of its image, or fewer pixels",
    "blank": "the picture shows nothing: it is all of one colour",
}
SKIN_TYPES = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "unknown": "unknown"}
NUM_EXAMPLES = 3
# Reasons that leave an image to look at.
SHOWN = ("too_small", "blank", "near_duplicate", "in_evaluation_corpus", "empty_caption", "excluded_by_source")
NUM_TOP = 25
NUM_SHARES = 12
NUM_SUGGESTED = 500


def summarise(
    generations: Sequence[Generation],
    made: Sequence[ShardRecord],
    final: Sequence[ShardRecord],
    manifest: Manifest,
    ontology: Ontology,
) -> dict[str, Any]:
    """The document of `stats.json`.

    Args:
        generations: all of the corpus.
        made: the records of the shards that they have made: rows and originals are counted there.
        final: the records of the corpus's shards: samples are counted there.
        manifest: what is to be committed.
        ontology: its disease tree.

    Raises:
        AssertionError: rows in are not rows out plus rows dropped.
    """
    counts = _merged(record.row_counts for record in made)
    counts.update(_merged(record.sample_counts for record in final))
    dropped = all_dropped(generations)
    num_good = sum(record.num_rows - len(record.dropped) for record in made)
    num_left_out = sum(len(generation.left_out) for generation in generations)
    num_kept = num_good - num_left_out
    num_rows = _rows_in(generations)
    require_balance("preparation", num_rows, num_kept, Counter(row.reason for _, row in dropped))
    captions = {aspect: counts["captions"][aspect] for aspect in CAPTION_ASPECTS}
    return {
        "rows": {"in": num_rows, "in_samples": num_kept, "dropped": len(dropped)},
        "dropped": reasons(row for _, row in dropped),
        "samples": manifest.num_samples,
        "duplicates": _duplicates(generations, final),
        "rewritten": [dict(done) for generation in generations for done in generation.rewritten],
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
        "rows_contradicted": counts["rows"]["contradicted"],
        "levels": _levels(counts, ontology),
        "branches": _branches(generations, ontology, counts["labels"]),
        "not_understood": {
            name: _ranked(texts)
            for name, texts in merged_counts(each.not_understood for each in _last(generations)).items()
        },
        "placeholders": _ranked(sum((Counter(each.placeholders) for each in _last(generations)), Counter())),
        "told": summed((each.told for each in _last(generations)), (each.told for each in generations)),
        "labels": _ranked(counts["labels"]),
        "concepts": _ranked(counts["concepts"]),
        "skin_types": {kind: counts["skin_types"][kind] for kind in SKIN_TYPES if counts["skin_types"][kind]},
        "body_sites": _ranked(counts["body_sites"]),
        "sources": _ranked(counts["sources"]),
        "origins": _ranked(counts["origins"]),
        "formats": _ranked(counts["formats"]),
        "sizes": _ranked(counts["sizes"]),
        "dark": counts["brightness"]["dark"],
        **({"modalities": known} if (known := modalities(final)) else {}),
        **({"untexted": silent} if (silent := untexted(final)) else {}),
    }


def untexted(final: Iterable[ShardRecord]) -> dict[str, int]:
    """Samples without any text, by split; splits without such are not there."""
    return dict(sorted(_merged(record.sample_counts for record in final)[UNTEXTED].items()))


def modalities(final: Iterable[ShardRecord]) -> dict[str, int]:
    """Samples by the kind of their picture, most frequent first; those of which it is not known are not there."""
    return _ranked(_merged(record.sample_counts for record in final)[MODALITIES])


def all_dropped(generations: Sequence[Generation]) -> list[tuple[str, DroppedRow]]:
    """Every row that is in no sample, with its input, in table order."""
    rows = [(each.identity["input"], row) for each in _last(generations) for row in each.dropped]
    rows += [(each.identity["input"], row) for each in generations for row in each.left_out]
    inputs = list(dict.fromkeys(each.identity["input"] for each in generations))
    return sorted(rows, key=lambda pair: (inputs.index(pair[0]), pair[1].row))


def _last(generations: Sequence[Generation]) -> list[Generation]:
    """The last generation of each source: it has tried the bad rows of the ones before it again."""
    return list({json.dumps(each.identity, sort_keys=True): each for each in generations}.values())


def _rows_in(generations: Sequence[Generation]) -> int:
    """Rows of all tables, each counted once."""
    last = _last(generations)
    return sum(each.num_rows - (0 if each in last else len(each.dropped)) for each in generations)


def reasons(dropped: Iterable[DroppedRow]) -> dict[str, int]:
    """Dropped rows by reason, most frequent first."""
    return _ranked(Counter(row.reason for row in dropped))


def reasons_in_words(dropped: Sequence[DroppedRow], *, by_name: bool = False) -> str:
    """Dropped rows by reason with the first rows of each, on one line: `missing_file 5 (rows 3, 8, 9, …)`.

    Args:
        dropped: rows of the source.
        by_name: its rows are files, which are named instead of their numbers.
    """
    told = []
    names = {row.row: printable(shown(row.image or row.source_id)) for row in dropped} if by_name else None
    for reason, count in reasons(dropped).items():
        told.append(f"{reason} {count:,} ({in_words((row.row for row in dropped if row.reason == reason), names)})")
    return ", ".join(told) or "none"


def write_dropped(uri: str, dropped: Sequence[tuple[str, DroppedRow]]) -> None:
    """Publish dropped rows, each with its input, as a Parquet file."""
    rows = [{"input": source_uri, **asdict(row)} for source_uri, row in dropped]
    with storage.staged(uri) as aside:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA), aside, compression="ZSTD", write_page_checksum=True
        )


def list_dropped(output: str, dropped: Sequence[tuple[str, DroppedRow]]) -> str:
    """Publish what a stopped preparation has dropped, as Parquet and as a CSV for spreadsheets; returns the CSV's URI.

    A cell that a spreadsheet would take for a formula begins with an apostrophe in the CSV.
    """
    write_dropped(storage.join(output, DROPPED_WHEN_STOPPED), dropped)
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow(DROPPED_SCHEMA.names)
    for source_uri, row in dropped:
        writer.writerow([source_uri, row.row, *map(_cell, (row.source_id, row.image, row.reason, row.detail))])
    uri = storage.join(output, LISTED_WHEN_STOPPED)
    # Excel knows UTF-8 by the mark in front.
    storage.write_bytes(uri, sink.getvalue().encode("utf-8-sig", errors="replace"))
    return uri


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write(
    config: PrepareConfig,
    generations: Sequence[Generation],
    final: Sequence[ShardRecord],
    manifest: Manifest,
    stats: Mapping[str, Any],
    timing: Mapping[str, Any],
) -> None:
    """Publish `dropped.parquet`, `stats.json`, `timing.json` and `report.html`."""
    dropped = all_dropped(generations)
    # First, since the next run tells by the figures whether the report is that of the corpus.
    storage.write_json(storage.join(config.output, STATS), stats)
    write_dropped(storage.join(config.output, DROPPED), dropped)
    storage.write_json(storage.join(config.output, TIMING), timing)
    page = reporting.render(
        "prepare.html",
        config=config.content(),
        name=storage.name_of(config.output),
        manifest=manifest,
        stats=stats,
        plots=_plots(stats),
        shares=_shares(stats),
        reasons=_explained(config, dropped, stats["dropped"]),
        shots=samples_shown(config.output, manifest),
        twins=twins_shown(config.output, final),
        published=_published(generations, stats),
        timing=timing,
        num_top=NUM_TOP,
    )
    storage.write_text(storage.join(config.output, REPORT), page)


def _merged(counts: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, Counter[str]]:
    merged: dict[str, Counter[str]] = defaultdict(Counter)
    for kinds in counts:
        for kind, counter in kinds.items():
            merged[kind].update(counter)
    return merged


def _duplicates(generations: Sequence[Generation], final: Sequence[ShardRecord]) -> dict[str, int]:
    """What became of duplicates, over all generations."""
    groups = Counter(group for record in final for group in record.notes["duplicate_group"].drop_null().to_pylist())
    return {
        "merged": sum(each.figures["merged"] for each in generations),
        "left_out": sum(each.figures["left_out"] for each in generations),
        "moved": sum(each.figures["moved"] for each in generations),
        "near_groups": len(groups),
        "near_samples": sum(groups.values()),
        "largest_group": max(groups.values(), default=0),
    }


def _ranked(counter: Mapping[str, int]) -> dict[str, int]:
    """Most frequent first, ties by name, so that the order does not hang on who came first."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _words(counter: Mapping[str, int]) -> dict[str, int]:
    """Captions by number of words, in steps; the last step takes all longer ones."""
    return {str(low): counter.get(str(low), 0) for low in range(0, WORDS_LIMIT + 1, WORDS_STEP)}


def _levels(counts: Mapping[str, Counter[str]], ontology: Ontology) -> list[dict[str, int]]:
    """For each level of the tree: nodes, those that a label names, those with a label at or below, labels given."""
    labels = Counter[int]()
    for name, count in counts["labels"].items():
        labels[ontology.level(name)] += count
    nodes = Counter(ontology.level(name) for name in ontology)
    named = set(counts["labels"])
    seen = Counter(ontology.level(name) for name in named)
    covered = Counter(ontology.level(name) for name in named.union(*(ontology.path(name) for name in named)))
    return [
        {
            "level": level,
            "nodes": nodes[level],
            "seen": seen[level],
            "covered": covered[level],
            "labels": labels[level],
        }
        for level in sorted(nodes)
    ]


def _branches(generations: Sequence[Generation], ontology: Ontology, labels: Mapping[str, int]) -> dict[str, Any]:
    """Which branch the nodes with several paths are on: by whom it was said, and those where it stays open.

    Nodes that labels name come first, most frequent first.
    `contradicts` are nodes that the tree puts on another side of benign and malignant than the package's table.
    """
    said: dict[str, list[dict[str, Any]]] = {"rows": [], "table": [], "open": []}
    found = {(each["node"], each["below"]): each for generation in generations for each in generation.branches}
    for each in sorted(found.values(), key=lambda one: (-labels.get(one["node"], 0), one["node"])):
        said["open" if not ontology.is_certain(each["node"]) else each["by"] or "rows"].append(each)
    return {**said, "contradicts": contradictions(ontology)}


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
    """Small tables of counts with their shares, one a card; those with nothing to tell left out."""
    skin_types = {SKIN_TYPES[kind]: count for kind, count in stats["skin_types"].items()}
    # Originals are more than the samples where equal images merge.
    num_samples, num_originals = stats["samples"], sum(stats["formats"].values())
    cards = [
        ("Where the images are from", "as the source names it", stats["origins"], num_originals),
        ("Modality", "the kind of picture, where the source says it", _with_unknown(stats), num_samples),
        ("Skin types", "Fitzpatrick I to VI", skin_types, num_samples),
        ("Body sites", "a sample may show several", stats["body_sites"], num_samples),
        ("Size of the originals", "shorter side, before it is reduced", stats["sizes"], num_originals),
        ("Format of the originals", "all are stored as JPEG", stats["formats"], num_originals),
    ]
    return [
        {"title": title, "note": note, "counts": dict(list(counts.items())[:NUM_SHARES]), "of": of}
        for title, note, counts, of in cards
        if counts
    ]


def _with_unknown(stats: Mapping[str, Any]) -> dict[str, int]:
    known = stats.get("modalities", {})
    unknown = stats["samples"] - sum(known.values())
    return {**known, **({"unknown": unknown} if known and unknown else {})}


def _explained(
    config: PrepareConfig, dropped: Sequence[tuple[str, DroppedRow]], counted: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Each reason with its count, meaning and some of its rows, with a picture where there is one."""
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for source_uri, row in dropped:
        if len(examples[row.reason]) < NUM_EXAMPLES:
            examples[row.reason].append({**asdict(row), "thumbnail": _thumbnail_of(config, source_uri, row)})
    return [
        {"reason": reason, "count": count, "meaning": REASONS.get(reason, ""), "examples": examples[reason]}
        for reason, count in counted.items()
    ]


def _thumbnail_of(config: PrepareConfig, source_uri: str, row: DroppedRow) -> str | None:
    """A dropped row's image as far as it can be shown."""
    if row.reason not in SHOWN:
        return None
    store = ImageStore(source_uri, max_bytes=config.max_image_bytes, follow_links=config.follow_links)
    fetched = store.fetch(row.image)
    return reporting.thumbnail(fetched.data, max_side=96) if fetched.data else None


def _published(generations: Sequence[Generation], stats: Mapping[str, Any]) -> list[tuple[str, int | str, int]]:
    """For Derm1M alone: what the paper (arXiv 2503.14911) says of the whole, beside what is here."""
    if {each.identity["source"] for each in generations} != {"derm1m"}:
        return []
    return [
        ("images", 403_563, stats["samples"]),
        ("image-text pairs", 1_029_761, stats["pairs"]),
        ("raw captions", 403_563, stats["captions"]["raw"]),
        ("ontology captions", 403_563, stats["captions"]["ontology"]),
        ("concept captions", 222_635, stats["captions"]["concept"]),
        ("conditions", "over 390", len(stats["labels"])),
        ("clinical concepts", 130, len(stats["concepts"])),
        ("levels of the tree", 4, len(stats["levels"])),
    ]
