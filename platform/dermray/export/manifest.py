"""What an export holds: `export.json`, written last, and one record for each part of the work, for resumption."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermray import documents, storage
from dermray.corpus.manifest import Inside
from dermray.errors import CorpusError

EXPORT_NAME = "export.json"
# Hidden, so that programs that look for data in the folder pass over it.
STATE = ".export"
STARTED = "started.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExportedFile(_Record):
    """A file of an export, or a folder of images."""

    path: Inside = Field(description="relative to the export")
    num_bytes: int
    sha256: str = Field(description="of the file; of a folder, over a line `sha256  name` for each file in it")
    num_files: int | None = Field(None, description="of a folder")


class PartRecord(_Record):
    """What writing a part came to; the same whenever and wherever it is written."""

    files: tuple[ExportedFile, ...]
    counts: dict[str, int]


class Started(_Record):
    """Which export is being written into a folder, and where it will write: said before anything else."""

    key: str
    corpus_digest: str
    paths: tuple[Inside, ...]


class ExportManifest(_Record):
    """The committed content of an export. `splits` counts by split: samples, captions, samples without a caption.

    And, by field, samples of which the format cannot hold it (`parts.NOT_CARRIED`); of `instruct` pairs by kind
    (`asked.KIND`) and why others are not (`not_asked.KIND.REASON`).
    """

    key: str
    corpus_digest: str
    config: dict[str, Any]
    made_by: dict[str, str]
    splits: dict[str, dict[str, int]]
    files: tuple[ExportedFile, ...]
    samples: dict[str, Any] | None = Field(
        None, description="of the corpus: `in`, `used`, and `told` by reason (corpus.accounts); earlier builds: none"
    )
    side_tables: dict[str, dict[str, list[str]]] | None = Field(
        None, description="of the corpus, where it has any: `carried` and `left_out`, columns by name"
    )


def read(model: type[_Record], uri: str) -> Any:
    """A record of a class of this module; None if there is none.

    Raises:
        CorpusError: the file is not what it should be.
        StorageError: it cannot be read.
    """
    try:
        return model.model_validate(storage.read_json(uri))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CorpusError(
            f"{uri} is no record of this version of jobs/export.py ({documents.first_fault(error)}); remove the folder "
            "or give another output"
        ) from None


def write(uri: str, record: _Record) -> None:
    """Publish a record."""
    storage.write_json(uri, record.model_dump(mode="json", exclude_none=True))
