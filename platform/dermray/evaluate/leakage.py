"""What jobs/leakage.py found of the scored samples in a training corpus: a line of the report, and two groups."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dermray import parquet_bounds, storage
from dermray.corpus.schema import TRAIN
from dermray.corpus.shares import DIGESTS_JOIN
from dermray.errors import EvaluationError
from dermray.evaluate.samples import Samples
from dermray.model_uri import folder_uri

DERMRAY_NAME = "dermray.json"
JSON_NAME, PAIRS_NAME = "leakage.json", "leakage.parquet"
COLUMNS = ["evaluation_corpus", "evaluation_split", "evaluation_sample_id"]
MAX_BYTES = 1 << 30
# The dimension of groups; no predictor is told it.
DIMENSION = "leakage"
FOUND, CLEAR = "resembles a training image", "resembles none"


def training_digest_of(model_uri: str) -> str | None:
    """Digest of the corpus that a model folder says it was trained on; None where it says none."""
    return _described(model_uri).get("corpus_digest")


def training_split_of(model_uri: str) -> str:
    """The split that a model folder says it was trained on; `train` where it says none."""
    found: Any = _described(model_uri)
    for key in ("recipe", "data", "split"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else TRAIN


def _described(model_uri: str) -> dict[str, Any]:
    """What a model folder says of itself; nothing where it is no folder, or one of another library."""
    folder = folder_uri(model_uri)
    if folder is None:
        return {}
    try:
        return storage.read_object(storage.join(folder, DERMRAY_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return {}


@dataclass(frozen=True)
class Leakage:
    """A report of jobs/leakage.py.

    Attributes:
        uri: of the report's folder.
        training_uri, training_digest: the training corpus; of several the URIs, and the digests with + between them.
        max_distance: bits of 64 in which two perceptual hashes may differ to be a pair.
        compared: (URI, split or None for all, digest) of each evaluation corpus.
        found: (URI, split, sample id) of every evaluation sample in a pair.
        training_splits: of the training corpora, those compared; None of a report that does not say it.
    """

    uri: str
    training_uri: str
    training_digest: str
    max_distance: int
    compared: tuple[tuple[str, str | None, str], ...]
    found: frozenset[tuple[str, ...]]
    training_splits: tuple[str, ...] | None = None

    @classmethod
    def load(cls, uri: str) -> Leakage:
        """Read the report in the folder `uri`.

        Raises:
            EvaluationError: there is none, or it is not whole.
        """
        try:
            document = storage.read_object(storage.join(uri, JSON_NAME))
            data = storage.read_bytes(storage.join(uri, PAIRS_NAME), max_bytes=MAX_BYTES)
            # A report of an earlier build does not name its pairs.
            if document.get("pairs_sha256", found := hashlib.sha256(data).hexdigest()) != found:
                raise KeyError(PAIRS_NAME)
            pairs = parquet_bounds.read_table(pa.BufferReader(data), columns=COLUMNS)
            # A sample may be in many pairs.
            rows = pairs.group_by(COLUMNS).aggregate([]).to_pylist()
            return cls(
                uri,
                document["training"]["uri"],
                document["training"]["digest"],
                document["max_distance"],
                tuple((one["uri"], one["split"], one["digest"]) for one in document["evaluations"]),
                frozenset(tuple(row[name] for name in COLUMNS) for row in rows),
                tuple(splits) if (splits := document["training"].get("splits")) is not None else None,
            )
        except FileNotFoundError:
            raise EvaluationError(f"leakage: {uri} has no {JSON_NAME}; give the output of jobs/leakage.py") from None
        except (pa.ArrowException, OSError, KeyError, TypeError):
            raise EvaluationError(f"leakage: {uri} is no whole report; run jobs/leakage.py again") from None

    def require_about(
        self, scored: Sequence[Samples], training_digest: str | None, training_split: str = TRAIN
    ) -> None:
        """Refuse a report that says nothing of what is scored, or that compared other training corpora or splits.

        Args:
            scored: what is scored.
            training_digest: of the corpus that the model was trained on, where that is known.
            training_split: of that corpus, the split that it was trained on.

        Raises:
            EvaluationError: it is so; names the digests or splits.
        """
        if training_digest is not None:
            self._require_trained_on(training_digest)
            if self.training_splits is not None and training_split not in self.training_splits:
                raise EvaluationError(
                    f"leakage: {self.uri} compared the split {', '.join(self.training_splits)} of {self.training_uri}, "
                    f"and the model was trained on the split {training_split}: run jobs/leakage.py with "
                    f"splits=[{training_split}]"
                )
        if scored and all(self.of(samples) is None for samples in scored):
            known = ", ".join(f"{uri}#{split or 'all'} ({digest[:12]})" for uri, split, digest in self.compared)
            asked = ", ".join(f"{one.uri}#{one.split} ({one.corpus_digest[:12]})" for one in scored)
            raise EvaluationError(f"leakage: {self.uri} is about {known}, not about {asked}")

    def _require_trained_on(self, training_digest: str) -> None:
        compared, trained = (set(each.split(DIGESTS_JOIN)) for each in (self.training_digest, training_digest))
        if compared == trained:
            return
        if not compared & trained:
            raise EvaluationError(
                f"leakage: {self.uri} compared the training corpus {self.training_digest[:12]} ({self.training_uri}), "
                f"and the model was trained on {training_digest[:12]}: run jobs/leakage.py with that one"
            )
        others = (
            "the model was trained on others besides, of which it says nothing"
            if trained - compared
            else f"the model was trained on {len(trained)} of these {len(compared)} alone"
        )
        raise EvaluationError(
            f"leakage: {self.uri} compared {self.training_uri}, and {others}: run jobs/leakage.py with "
            "corpus=[URI, URI2] as the model was trained"
        )

    def of(self, samples: Samples) -> set[str] | None:
        """Those of some samples that resemble a training image; None where the report is not about them."""
        uris = {
            uri
            for uri, split, digest in self.compared
            if digest == samples.corpus_digest and split in (None, samples.split)
        }
        if not uris:
            return None
        ids = set(samples.ids)
        return {each for uri, split, each in self.found if uri in uris and split == samples.split and each in ids}

    def mark(self, samples: Samples) -> Samples:
        """The samples with `DIMENSION` among their groups, where the report is about them."""
        found = self.of(samples)
        if found is None:
            return samples
        members: list[str | None] = [FOUND if each in found else CLEAR for each in samples.ids]
        return replace(samples, groups={**samples.groups, DIMENSION: members})

    def describe(self, samples: Samples) -> dict[str, Any] | None:
        """The key `leakage` of `report.json`; None where the report is not about the samples."""
        found = self.of(samples)
        if found is None:
            return None
        return {
            "report": self.uri,
            "training_uri": self.training_uri,
            "training_digest": self.training_digest,
            "max_distance": self.max_distance,
            "num_samples": len(samples),
            "num_samples_found": len(found),
        }
