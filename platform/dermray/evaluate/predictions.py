"""What a model said of each sample, as Parquet beside the report: `predictions/TASK.parquet` (docs/evaluation.md).

Scores can be computed again from it, by group or against another model on the same samples, without the model. A file
says in its metadata (`dermray.predictions`, JSON) which task, split, corpus and model it is of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dermray import documents, parquet_bounds, storage
from dermray.errors import EvaluationError

SCHEMA_VERSION = 1
METADATA_KEY = b"dermray.predictions"
FOLDER = "predictions"
MAX_BYTES = 1 << 32


@dataclass(frozen=True)
class Origin:
    """Whose predictions on what: the task, what was scored, and digests of corpus, model and preprocessing."""

    task: str
    split: str
    corpus_digest: str
    model_digest: str
    preprocessing_digest: str


@dataclass(frozen=True, eq=False)
class ClassPredictions:
    """Probabilities of C classes for N samples.

    Attributes:
        sample_ids: `N`, those of the corpus, or image paths of a raw table.
        labels: int64 `[N]`, the true classes.
        probabilities: float32 `[N, C]`.
        classes: `C` names.
        setting: which of a task's fits they are of ("100 % of the labels"); empty where it has one.
        prefix: of this fit's metrics in the report (`100pct_`).
    """

    sample_ids: Sequence[str]
    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]
    setting: str = ""
    prefix: str = ""


@dataclass(frozen=True, eq=False)
class ConceptPredictions:
    """Presence scores of C concepts for N samples, float32 `[N, C]`, and whether each is marked, int64 `[N, C]`."""

    sample_ids: Sequence[str]
    scores: np.ndarray
    marks: np.ndarray
    concepts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class RetrievalPredictions:
    """Per sample and direction: candidates that scored higher than the partner, and others that scored the same.

    Each int64 `[N]`. The partner's rank is 1 + higher where nothing ties.
    """

    sample_ids: Sequence[str]
    image_to_text_higher: np.ndarray
    image_to_text_tied: np.ndarray
    text_to_image_higher: np.ndarray
    text_to_image_tied: np.ndarray


@dataclass(frozen=True, eq=False)
class OwnPredictions:
    """What was said of N samples and what is true, in a form that only the task that scores them knows.

    Attributes:
        sample_ids: `N`.
        predicted, truth: name → numbers, `[N]` or `[N, K]`; of a mask, say, what it shares with the true one.
        scored_by: the task as `tasks` names it, so that its `distributions` is found; the report fills it in.
    """

    sample_ids: Sequence[str]
    predicted: Mapping[str, np.ndarray]
    truth: Mapping[str, np.ndarray]
    scored_by: str = ""

    def __post_init__(self) -> None:
        """Refuse what no columns can be made of.

        Raises:
            EvaluationError: other shapes, numbers of samples or types, or a name with a point.
        """
        for name, values in [*self.predicted.items(), *self.truth.items()]:
            fits = values.ndim in (1, 2) and len(values) == len(self.sample_ids) and values.dtype.kind in "biuf"
            if not fits or "." in name:
                raise EvaluationError(
                    f"predictions of one's own must be numbers [N] or [N, K] of {len(self.sample_ids)} samples, by "
                    f"names without points, not {name} of {values.dtype} {list(values.shape)}"
                )


Predictions = ClassPredictions | ConceptPredictions | RetrievalPredictions | OwnPredictions
_KINDS: dict[str, type[Predictions]] = {
    "classification": ClassPredictions,
    "concepts": ConceptPredictions,
    "retrieval": RetrievalPredictions,
    "own": OwnPredictions,
}
# Fields that are the same for all samples; they stand in the metadata, not in columns.
_SHARED = ("classes", "concepts", "setting", "prefix", "scored_by")
# Fields whose columns have another name, and back.
_COLUMNS = {"sample_ids": "sample_id", "labels": "label"}
_FIELDS = {column: name for name, column in _COLUMNS.items()}


def path_of(task: str) -> str:
    """Where a task's predictions lie in the folder of its report."""
    return f"{FOLDER}/{task}.parquet"


def write(uri: str, predictions: Predictions, origin: Origin) -> None:
    """Write the file at `uri`, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    with storage.staged(uri) as aside:
        write_file(aside, predictions, origin)


def write_file(path: Path, predictions: Predictions, origin: Origin) -> None:
    """Write the file at a local path."""
    kind = next(name for name, one in _KINDS.items() if isinstance(predictions, one))
    columns: dict[str, pa.Array] = {}
    shared = {}
    for name, value in vars(predictions).items():
        if name in _SHARED:
            shared[name] = value
        elif isinstance(value, Mapping):
            columns |= {f"{name}.{key}": _column(each) for key, each in value.items()}
        else:
            columns[_COLUMNS.get(name, name)] = _column(value)
    about = {"schema_version": SCHEMA_VERSION, "kind": kind, **asdict(origin), **shared}
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(about)})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def read(uri: str) -> tuple[Predictions, Origin]:
    """Read what `write` wrote.

    Raises:
        EvaluationError: no such file, or none of ours.
    """
    try:
        data = storage.read_bytes(uri, max_bytes=MAX_BYTES)
        table = parquet_bounds.read_table(pa.BufferReader(data))
        about = documents.parse_json(table.schema.metadata[METADATA_KEY], uri)
        version, kind = about.pop("schema_version"), _KINDS[about.pop("kind")]
        if version != SCHEMA_VERSION:
            raise EvaluationError(f"the predictions {uri} have schema version {version}; this code reads 1")
        origin = Origin(**{name: about.pop(name) for name in Origin.__dataclass_fields__})
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in about.items()
        }
        for name in table.column_names:
            outer, _, inner = name.partition(".")
            if inner:
                fields.setdefault(outer, {})[inner] = _array(table[name])
            else:
                fields[_FIELDS.get(name, name)] = _array(table[name])
        return kind(**fields), origin
    except FileNotFoundError:
        raise EvaluationError(f"there are no predictions at {uri}; run the evaluation again") from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise EvaluationError(f"{uri} holds no predictions of an evaluation; run the evaluation again") from None


def _column(values: Any) -> pa.Array:
    if np.ndim(values) == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _array(column: pa.ChunkedArray) -> Any:
    whole = column.combine_chunks()
    if pa.types.is_string(whole.type):
        return whole.to_pylist()
    if pa.types.is_fixed_size_list(whole.type):
        return whole.flatten().to_numpy(zero_copy_only=False).reshape(-1, whole.type.list_size)
    return whole.to_numpy(zero_copy_only=False)
