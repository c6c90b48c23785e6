"""A prepared sample, all but its image, as one JSON object.

What an export writes beside an image, and what the readers of raw corpora take back as it is: an image and its object
give the same sample again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dermray import documents
from dermray.corpus.modality import Modality
from dermray.corpus.schema import MODALITY, SCHEMA_VERSION, CaptionAspect

# The key that tells such an object from other JSON, and its value: the version of the schema.
MARK = "dermray"


def _from_hex(value: object) -> object:
    return int(value, 16) if isinstance(value, str) else value


class _Record(BaseModel):
    # What a person or a later version has added does no harm.
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Caption(_Record):
    aspect: CaptionAspect
    text: str


class _Meta(_Record):
    age: float | None = None
    sex: str | None = None
    body_site: str | None = None
    symptoms: str | None = None
    patient_id: str | None = None
    lesion_id: str | None = None
    extra: str | None = None


class _Sample(_Record):
    source: str = Field(min_length=1)
    source_id: str
    captions: list[_Caption]
    labels: list[str]
    concepts: list[str]
    skin_type: int | None = Field(None, ge=1, le=6)
    meta: _Meta | None = None
    split: str = Field(min_length=1)
    # Taken before the image was compressed, so that it may not come out of the image the same.
    phash: Annotated[int, BeforeValidator(_from_hex), Field(ge=0, lt=2**64)] | None = None
    modality: Modality | None = None


FIELDS = tuple(_Sample.model_fields)


def to_document(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a sample (a row of `corpus.schema.WHOLE`, its image not needed).

    `sample_id` and size are there for other programs; from the image they come out the same.
    """
    phash = sample["phash"]
    # What nobody knows of a sample is not named: exports of corpora without modalities are what they were.
    kind = {MODALITY.name: sample[MODALITY.name]} if sample.get(MODALITY.name) else {}
    return {
        MARK: SCHEMA_VERSION,
        "sample_id": sample["sample_id"],
        **{name: sample[name] for name in FIELDS if name != MODALITY.name},
        **kind,
        # JavaScript and its like round integers of 64 bits.
        "phash": None if phash is None else f"{phash:016x}",
        "width": sample["width"],
        "height": sample["height"],
        "duplicate_group": sample["duplicate_group"],
    }


def is_document(value: object) -> bool:
    """True for an object that says it is one of these."""
    return isinstance(value, Mapping) and MARK in value


def from_document(document: object) -> dict[str, Any]:
    """The fields of `FIELDS` as they were.

    Raises:
        ValueError: it is no object, of another schema version, or a field is missing or of another type.
    """
    version = document.get(MARK) if isinstance(document, Mapping) else None
    if not isinstance(document, Mapping) or version != SCHEMA_VERSION:
        raise ValueError(f"{MARK} is {version!r}: this code reads samples of schema {SCHEMA_VERSION}")
    try:
        return _Sample.model_validate(dict(document)).model_dump()
    except ValidationError as error:
        raise ValueError(documents.first_fault(error)) from None
