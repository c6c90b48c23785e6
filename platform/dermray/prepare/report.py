"""What went in, what came out, what was dropped and why: `report/` of a prepared corpus.

Figures are a function of what is committed, without clock or host, so that an interrupted and an undisturbed run leave
the same ones. Only `timing.json`, and its card in the report, tell of the run itself.
"""

from __future__ import annotations

import json
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
from dermray.corpus.shards import read_row_group
from dermray.errors import ImageError
from dermray.prepare.fetch import ImageStore
from dermray.prepare.generations import Generation
from dermray.prepare.records import ShardRecord
from dermray.prepare.samples import WORDS_LIMIT, WORDS_STEP
from dermray.prepare.settings import PrepareConfig
from dermray.prepare.sources.rows import DroppedRow
from dermray.reporting import plots

REPORT = "report/report.html"
STATS = "report/stats.json"
TIMING = "report/timing.json"
DROPPED = "report/dropped.parquet"
DROPPED_WHEN_STOPPED = "report/dropped-when-stopped.parquet"

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
    "near_duplicate": "a near-duplicate of another image, which stays",
    "in_evaluation_corpus": "it resembles an image of an evaluation corpus",
    "blank": "the picture shows nothing: it is all of one colour",
}
SKIN_TYPES = {"1": "I", "2": "II", "3": "III", "4": "IV", "5": "V", "6": "VI", "unknown": "unknown"}
NUM_THUMBNAILS = 24
NUM_EXAMPLES = 3
# Reasons that leave an image to look at.
SHOWN = ("too_small", "blank", "near_duplicate", "in_evaluation_corpus", "empty_caption", "excluded_by_source")
NUM_TWINS = 8
NUM_TWIN_SHOTS = 4
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
    if num_kept + len(dropped) != num_rows:
        raise AssertionError(f"{num_rows} rows in, {num_kept} in samples, {len(dropped)} dropped")
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


def write_dropped(uri: str, dropped: Sequence[tuple[str, DroppedRow]]) -> None:
    """Publish dropped rows, each with its input, as a Parquet file."""
    rows = [{"input": source_uri, **asdict(row)} for source_uri, row in dropped]
    with storage.staged(uri) as aside:
        pq.write_table(pa.Table.from_pylist(rows, schema=DROPPED_SCHEMA), aside, compression="ZSTD")


def write(
    config: PrepareConfig,
    generations: Sequence[Generation],
    final: Sequence[ShardRecord],
    manifest: Manifest,
    stats: Mapping[str, Any],
    timing: Mapping[str, Mapping[str, float]],
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
        shots=_shots(config.output, manifest),
        twins=_twins(config.output, final),
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
    covered = Counter(ontology.level(name) for name in named.union(*(ontology.ancestors(name) for name in named)))
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
    try:
        return reporting.thumbnail(fetched.data, max_side=96) if fetched.data else None
    except ImageError:
        return None


def _shots(output: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Some samples, spread over the shards, each with a thumbnail."""
    step = max(1, len(manifest.shards) // NUM_THUMBNAILS)
    chosen = manifest.shards[::step][:NUM_THUMBNAILS]
    each = -(-NUM_THUMBNAILS // len(chosen))
    places = [(shard, position) for shard in chosen for position in range(min(each, shard.row_groups[0]))]
    return [_shot(output, shard, position) for shard, position in places[:NUM_THUMBNAILS]]


def _twins(output: str, final: Sequence[ShardRecord]) -> list[list[dict[str, Any]]]:
    """The largest groups of near-duplicates, the first members of each."""
    places: dict[str, list[tuple[Shard, int]]] = defaultdict(list)
    for record in final:
        if record.shard is None:
            continue
        for position, group in enumerate(record.notes["duplicate_group"].to_pylist()):
            if group is not None:
                places[group].append((record.shard, position))
    largest = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))[:NUM_TWINS]
    return [[_shot(output, shard, position) for shard, position in found[:NUM_TWIN_SHOTS]] for _, found in largest]


def _shot(output: str, shard: Shard, position: int) -> dict[str, Any]:
    """One sample with a thumbnail."""
    columns = ["image", "captions", "labels", "concepts", "split", "source_id", "skin_type"]
    group = position // shard.row_groups[0]
    table = read_row_group(storage.join(output, shard.path), group, columns)
    row = table.slice(position - group * shard.row_groups[0], 1).to_pylist()[0]
    return {**row, "thumbnail": reporting.thumbnail(row.pop("image"), max_side=220)}


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
