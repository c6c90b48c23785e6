"""What a preparation tells of its rows beside those it drops: said on the terminal, and counted for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow.compute as pc

from dermray.corpus.ontology import Ontology
from dermray.prepare import labels
from dermray.prepare.plan import Usable
from dermray.prepare.reconcile import Reconciled
from dermray.prepare.records import ShardRecord
from dermray.prepare.samples import COPIES
from dermray.prepare.settings import PrepareConfig
from dermray.raw import splits
from dermray.raw.sources import OF_FILES, RawRows, SourceRequest
from dermray.raw.sources.telling import told_of
from dermray.raw.spill import blocks
from dermray.raw.telling import most_frequent

# What is counted, as the report calls it. Of a kind's texts those that stand for a name and no rows count 1.
Counts = dict[str, dict[str, int]]
# Of equal files each generation of a source tells its own; of everything else the last tells all.
EQUAL_FILES = "equal images whose rows name different diseases"
# Sources whose columns the user names.
WITH_COLUMNS = ("csv", "parquet")
# Texts that a dry run names of each kind: nothing else lists them.
ALL = 1000


@dataclass(frozen=True)
class Told:
    """Sentences for the terminal, and the counts behind them: kind → text → how often."""

    lines: tuple[str, ...] = ()
    counts: Counts = field(default_factory=dict)


def of_rows(
    config: PrepareConfig,
    request: SourceRequest,
    raw: RawRows,
    usable: Usable,
    trees: tuple[Ontology, Ontology],
    *,
    whole: bool = False,
) -> Told:
    """What raw rows hold that is not understood, not used, or to be looked at.

    Args:
        config: of the run.
        request: which the rows were read for.
        raw: all rows.
        usable: those that are good so far.
        trees: the disease tree as it was found, and with what was learned.
        whole: name all label texts instead of the most frequent.
    """
    found, ontology = trees
    shown = ALL if whole else labels.NUM_SHOWN
    survey = labels.survey(raw.table, ontology, has_tree=raw.ontology is not None, by_name=config.source in OF_FILES)
    others = Counter[str]() if isinstance(config.split, str) else splits.others(_prescribed(raw), config.split)
    conflicts = labels.conflicts(usable.table, ontology)
    silent = 0 if config.keep_untexted else _labelled_without_caption(raw)
    lines = (
        *told_of(raw, request.findings, by_name=config.source in OF_FILES),
        *_told_of_silent(silent, config.source),
        *splits.told_of_others(others),
        *labels.told_of_tree(found),
        *survey.lines(ontology, shown),
        *labels.told_of_conflicts(conflicts),
    )
    counts = {
        **request.findings.counts(),
        "rows in other splits than train, val and test": others,
        "rows dropped for want of a caption": {"with a label": silent} if silent else {},
        "labels that make classes of their own": survey.strange,
        "labels placed at a broader node": survey.broader,
        "images whose rows name different diseases": Counter("; ".join(names) for names in conflicts.values()),
    }
    return Told(lines, {kind: dict(sorted(texts.items())) for kind, texts in counts.items() if texts})


def _labelled_without_caption(raw: RawRows) -> int:
    num_rows = 0
    for block in blocks(raw.table):
        captions, named = (pc.list_value_length(block[name]) for name in ("captions", "labels"))
        num_rows += pc.sum(pc.and_(pc.equal(captions, 0), pc.greater(named, 0))).as_py() or 0
    return num_rows


def _told_of_silent(num_rows: int, source: str) -> Iterator[str]:
    if num_rows:
        advice = "; columns.caption= makes the captions of all rows from their labels" if source in WITH_COLUMNS else ""
        yield f"{num_rows:,} rows have a label and no caption, and are dropped for want of one{advice}"


def of_equal_images(decided: Reconciled, final: Iterable[ShardRecord]) -> Told:
    """Files of one content that were merged into one sample although their rows name different diseases."""
    written = {each.key for each in decided.amendments}
    copies = Counter[str]()
    for record in final:
        if record.key in written:
            copies.update(record.sample_counts.get(COPIES, {}))
    if not copies:
        return Told()
    line = (
        f"{copies.total():,} images lie in several files whose rows name different diseases, and get them all: "
        f"{most_frequent(copies, 'images', max_chars=200)}"
    )
    return Told((line,), {EQUAL_FILES: dict(sorted(copies.items()))})


def summed(last: Iterable[Mapping[str, Mapping[str, int]]], every: Iterable[Mapping[str, Mapping[str, int]]]) -> Counts:
    """The counts of a corpus, from those of the last generation of each source and those of all generations."""
    kinds: dict[str, Counter[str]] = {}
    for told in last:
        for kind, texts in told.items():
            if kind != EQUAL_FILES:
                kinds.setdefault(kind, Counter()).update(texts)
    for told in every:
        if EQUAL_FILES in told:
            kinds.setdefault(EQUAL_FILES, Counter()).update(told[EQUAL_FILES])
    return {kind: dict(sorted(texts.items(), key=lambda item: (-item[1], item[0]))) for kind, texts in kinds.items()}


def _prescribed(raw: RawRows) -> Counter[str]:
    """Rows by the split that the source prescribes."""
    rows = Counter[str]()
    for block in blocks(raw.table):
        for each in pc.value_counts(block["split"].drop_null()).to_pylist():
            rows[splits.split_name(each["values"])] += each["counts"]
    return rows
