"""What a search for leakage leaves behind: `leakage.parquet` (pairs), `leakage.html` and `leakage.json`.

Everything here is a function of the corpora and the configuration, without clock or host. The JSON document is written
last: where it is, the report is whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermray import documents, ledger, reporting, storage
from dermray.audit.leakage import PAIRS_PER_SAMPLE, Comparison, CorpusHashes, JoinedHashes, Leakage, describe
from dermray.audit.leakage_settings import LeakageConfig
from dermray.audit.matches import Matches
from dermray.corpus.shards import ShardIndex
from dermray.reporting import plots

SCHEMA_VERSION = 1
HTML = "leakage.html"
JSON = "leakage.json"
PAIRS = "leakage.parquet"
THUMBNAIL_SIDE = 260
# A row has ten columns, most of them text: some 50 MB of memory.
PAIRS_PER_ROW_GROUP = 1 << 17

PAIRS_SCHEMA = pa.schema(
    [
        # The training sample, and its corpus.
        pa.field("corpus", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        # The evaluation sample.
        pa.field("evaluation_corpus", pa.string(), nullable=False),
        pa.field("evaluation_split", pa.string(), nullable=False),
        pa.field("evaluation_sample_id", pa.string(), nullable=False),
        pa.field("evaluation_source", pa.string(), nullable=False),
        pa.field("evaluation_source_id", pa.string(), nullable=False),
        # Bits in which the perceptual hashes differ.
        pa.field("distance", pa.int8(), nullable=False),
    ]
)


def write(config: LeakageConfig, leakage: Leakage) -> dict[str, Any]:
    """Publish the three files into `config.output`; returns the document of `leakage.json`.

    Raises:
        ClaimError: another run writes into the output, or has taken it over.
        CorpusError: a shard is gone or damaged.
        StorageError: the output cannot be written.
    """
    document = summarise(config, leakage)
    training = _Described(leakage.training, [one.pairs[:, 0] for one in leakage.comparisons])
    sections = []
    # Left, and so published, in the opposite order: once there is room for all, and the document last.
    with (
        ledger.claim(config.output) as claim,
        storage.staged(storage.join(config.output, JSON)) as document_file,
        storage.staged(storage.join(config.output, HTML)) as page_file,
        storage.staged(storage.join(config.output, PAIRS)) as pairs_file,
    ):
        with pq.ParquetWriter(pairs_file, PAIRS_SCHEMA, compression="ZSTD", write_page_checksum=True) as writer:
            for comparison, counted in zip(leakage.comparisons, document["evaluations"], strict=True):
                evaluation = _Described(JoinedHashes((comparison.hashes,)), [comparison.pairs[:, 1]])
                for first in range(0, len(comparison.pairs), PAIRS_PER_ROW_GROUP):
                    rows = slice(first, first + PAIRS_PER_ROW_GROUP)
                    writer.write_table(_pair_table(comparison, rows, training, evaluation))
                chosen = shown_pairs(comparison, config.num_shown)
                sections.append(
                    {
                        "name": comparison.part.short_name,
                        "counted": counted,
                        "plot": _plot(counted["distances"]),
                        "shots": _shots(comparison, chosen, training, evaluation),
                    }
                )
        document["pairs_sha256"] = storage.sha256(pairs_file)
        page = reporting.render(
            "leakage.html", name=names(config.corpus_uris), config=config, document=document, sections=sections
        )
        page_file.write_text(page, "utf-8")
        document_file.write_text(documents.json_text(document), "utf-8")
        claim.confirm()
    return document


def summarise(config: LeakageConfig, leakage: Leakage) -> dict[str, Any]:
    """The document of `leakage.json`."""
    training = leakage.training
    evaluations = [_counted(comparison, config.max_distance, training) for comparison in leakage.comparisons]
    places = np.unique(np.concatenate([one.matches.left.positions for one in leakage.comparisons]))
    concerned = training.samples[places]
    of_corpora = np.bincount(training.corpus_of(concerned), minlength=len(training.parts))
    return {
        "schema_version": SCHEMA_VERSION,
        "max_distance": config.max_distance,
        "training": {
            "uri": training.uri,
            "splits": list(config.splits),
            **_size(training),
            "num_samples_found": len(concerned),
            "corpora": [
                {"uri": part.uri, **_size(part), "num_samples_found": int(found)}
                for part, found in zip(training.parts, of_corpora, strict=True)
            ],
        },
        "evaluations": evaluations,
        "num_evaluation_samples": sum(one["num_samples"] for one in evaluations),
        "num_evaluation_samples_found": sum(one["num_samples_found"] for one in evaluations),
        "num_pairs": sum(one["num_pairs"] for one in evaluations),
        "num_pairs_left_out": sum(one["num_pairs_left_out"] for one in evaluations),
        "max_pairs_of_a_sample": PAIRS_PER_SAMPLE,
    }


def names(uris: Sequence[str]) -> str:
    """What to call some corpora in a title."""
    return ", ".join(storage.name_of(uri) for uri in uris)


def metrics(document: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a report, for tracking."""
    return {
        "training_samples": document["training"]["num_samples"],
        "training_samples_found": document["training"]["num_samples_found"],
        **{key: document[key] for key in ("num_evaluation_samples", "num_evaluation_samples_found", "num_pairs")},
    }


def shown_pairs(comparison: Comparison, num_shown: int) -> np.ndarray:
    """Which pairs to show: the nearest one of each evaluation sample, as many of each distance as there is room for.

    Returns:
        int64 `[at most num_shown]`: places in `comparison.pairs`, by distance.
    """
    apart, evaluation = comparison.distances, comparison.pairs[:, 1]
    order = np.lexsort((comparison.pairs[:, 0], apart, evaluation))
    _, first = np.unique(evaluation[order], return_index=True)
    nearest = order[first]
    nearest = nearest[np.argsort(apart[nearest], kind="stable")]
    sorted_distances = apart[nearest]
    rank = np.arange(len(nearest)) - np.searchsorted(sorted_distances, sorted_distances)
    return nearest[np.sort(np.lexsort((sorted_distances, rank))[:num_shown])]


class _Described:
    """Texts of the samples that pairs are made of."""

    def __init__(self, hashes: JoinedHashes, samples: Sequence[np.ndarray]) -> None:
        self.hashes = hashes
        self._samples = np.unique(np.concatenate(samples))
        parts = list(hashes.split(self._samples)) or [(hashes.parts[0], self._samples)]
        self._table = pa.concat_tables([_of_corpus(*part) for part in parts], promote_options="default")

    def take(self, samples: np.ndarray) -> pa.Table:
        """Rows of the given samples, in their order."""
        return self._table.take(pa.array(np.searchsorted(self._samples, samples)))

    def take_shown(self, samples: np.ndarray) -> list[dict[str, Any]]:
        """Rows of the given samples with their images."""
        rows = self.take(samples).to_pylist()
        wanted, places = np.unique(samples, return_inverse=True)
        encoded = pa.chunked_array(
            [
                chunk
                for part, members in self.hashes.split(wanted)
                for chunk in ShardIndex.of(part.uri, part.manifest).read(members, ["image"])["image"].chunks
            ],
            type=pa.binary(),
        )
        return [{**row, "image": encoded[int(place)].as_py()} for row, place in zip(rows, places, strict=True)]


def _of_corpus(hashes: CorpusHashes, samples: np.ndarray) -> pa.Table:
    """What is said of samples, with their corpus."""
    table = describe(hashes, samples)
    return table.append_column("corpus", pa.repeat(hashes.uri, table.num_rows))


def _pair_table(comparison: Comparison, rows: slice, training: _Described, evaluation: _Described) -> pa.Table:
    """Some pairs of a comparison, of schema PAIRS_SCHEMA."""
    pairs = comparison.pairs[rows]
    left, right = training.take(pairs[:, 0]), evaluation.take(pairs[:, 1])
    columns = [
        *(left[name] for name in ("corpus", "sample_id", "source", "source_id")),
        pa.repeat(comparison.part.uri, len(pairs)),
        *(right[name] for name in ("split", "sample_id", "source", "source_id")),
        pa.array(comparison.distances[rows], type=pa.int8()),
    ]
    return pa.table(columns, schema=PAIRS_SCHEMA)


def _size(hashes: CorpusHashes | JoinedHashes) -> dict[str, Any]:
    account = hashes.account
    return {
        "digest": hashes.corpus_digest,
        "num_samples": account["in"],
        "num_unreadable": hashes.num_unreadable,
        "account": account,
    }


def _by_corpus(comparison: Comparison, training: JoinedHashes) -> list[dict[str, Any]]:
    """Counts of one evaluation corpus by the training corpora that its pairs lead to."""
    borders = np.searchsorted(training.samples, training.starts).tolist()
    found = (comparison.matches.of_left(*places) for places in pairwise(borders))
    return [{"uri": part.uri, **_numbers(each)} for part, each in zip(training.parts, found, strict=True)]


def _numbers(matches: Matches) -> dict[str, int]:
    """Evaluation samples, training samples and pairs of these, listed or not."""
    return {
        "num_samples_found": len(matches.right.positions),
        "num_training_samples": len(matches.left.positions),
        "num_pairs": matches.num_pairs,
    }


def _counted(comparison: Comparison, max_distance: int, training: JoinedHashes) -> dict[str, Any]:
    """Counts of one evaluation corpus; `distances` counts its samples by that of their nearest training sample."""
    by_distance = np.bincount(comparison.matches.nearest(), minlength=max_distance + 1)
    return {
        "uri": comparison.part.uri,
        "split": comparison.part.split,
        **_size(comparison.hashes),
        **_numbers(comparison.matches),
        "num_pairs_left_out": comparison.num_pairs_left_out,
        "by_training_corpus": _by_corpus(comparison, training),
        "distances": {str(distance): int(count) for distance, count in enumerate(by_distance)},
    }


def _plot(by_distance: Mapping[str, int]) -> Any:
    """Bars by distance; odd ones, which hashes with 32 bits set never have, only where there is something."""
    shown = {name: count for name, count in by_distance.items() if count or int(name) % 2 == 0}
    names = [f"{name} bits" if name != "0" else "0 bits: the same hash" for name in shown]
    title = "evaluation images by the distance to their nearest training image"
    return plots.bar_chart(names, list(shown.values()), title=title)


def _shots(
    comparison: Comparison, chosen: np.ndarray, training: _Described, evaluation: _Described
) -> list[dict[str, Any]]:
    """The chosen pairs with thumbnails, labels and where they come from."""
    if not len(chosen):
        return []
    left = training.take_shown(comparison.pairs[chosen, 0])
    right = evaluation.take_shown(comparison.pairs[chosen, 1])
    return [
        {
            "distance": int(distance),
            "same_bytes": one["image"] == other["image"],
            "same_labels": set(one["labels"]) == set(other["labels"]),
            "sides": [
                {**side, "thumbnail": reporting.thumbnail(side.pop("image"), max_side=THUMBNAIL_SIDE)}
                for side in (one, other)
            ],
        }
        for distance, one, other in zip(comparison.distances[chosen], left, right, strict=True)
    ]
