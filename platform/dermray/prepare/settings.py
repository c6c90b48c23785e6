"""The keys of `jobs/prepare.py`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dermray.config import ClusterConfig, Config, TrackingConfig, Uri
from dermray.corpus.captions import MAX_SUB_CAPTIONS
from dermray.corpus.manifest import SideKind
from dermray.corpus.schema import SPLIT_NAME, TRAIN
from dermray.images import DEFAULT_MAX_PIXELS, PILLOW_MAX_PIXELS
from dermray.ledger import WaitForOutput
from dermray.prepare.rewriting.settings import RewriteConfig
from dermray.raw.sources import READERS
from dermray.raw.sources.rows import DEFAULT_COLUMNS, Columns

NearDuplicates = Literal["keep", "mark", "drop"]
IfExists = Literal["append", "replace"]

# Sources of tables of one's own, whose columns have the names that `columns` gives.
OWN_COLUMNS = ("csv", "parquet")
# Keys of `columns` that corpora of earlier builds do not name: left at their default, they are no other setting.
NEWER_COLUMNS = ("label_map", "modality")


class SideTableConfig(Config):
    """A table beside that of the samples, of what only some tasks know of them."""

    uri: str = Field(description="the table (CSV, TSV, Parquet), under input or elsewhere")
    key: str = Field(description="column of it that names the sample")
    by: Literal["source_id", "image", "sample_id"] = Field(
        "source_id", description="what of a sample the key is: its source_id, the path of its image, its sample_id"
    )
    texts: tuple[str, ...] = Field((), description="columns to keep as text")
    numbers: tuple[str, ...] = Field((), description="columns to keep as numbers (float64)")
    masks: tuple[str, ...] = Field((), description="columns of paths under input: grey pictures of an image's size")

    @property
    def kinds(self) -> dict[str, SideKind]:
        """The columns that are kept, each with what it holds."""
        kinds: dict[str, SideKind] = dict.fromkeys(self.texts, "text")
        return {**kinds, **dict.fromkeys(self.numbers, "number"), **dict.fromkeys(self.masks, "mask")}

    @model_validator(mode="after")
    def _each_once(self) -> SideTableConfig:
        named = [*self.texts, *self.numbers, *self.masks]
        if not named:
            raise ValueError("name the columns to keep: texts, numbers or masks")
        if len(set(named)) < len(named) or "sample_id" in named:
            raise ValueError("texts, numbers, masks: name each column once, and none sample_id, which is there already")
        if odd := next((name for name in named if "." in name), None):
            raise ValueError(f"a column cannot be called {odd!r}: Parquet reads a dot as a part; rename it")
        return self


class PrepareConfig(Config):
    """Everything that decides what a prepared corpus holds, and how the work is spread."""

    source: str = Field(description=f"layout of the input: {', '.join(sorted(READERS))}")
    input: Uri = Field(description="folder or URI with the table and the images")
    output: Uri = Field(description="folder or URI of the prepared corpus")
    table: str | None = Field(None, description="table under input; empty: the source's own name")
    columns: Columns = Columns()
    split: str | dict[str, float] = Field(
        {"val": 0.1}, description="one name for every sample, or fractions (split.val=0.1), the rest being train"
    )
    licence: str | None = Field(
        None, description="licence of the data (CC-BY-NC-4.0); goes on to every model trained on it, and into MLflow"
    )
    max_dropped_fraction: float = Field(0.01, ge=0, le=1, description="more dropped rows than this stop the run")
    seed: int = Field(0, ge=0, description="decides splits and order")
    limit: int | None = Field(None, ge=1, description="take the first rows of the table only, for a trial")

    keep_untexted: bool = Field(
        False, description="true: images of which no text says anything are samples too, to learn from images alone"
    )
    keep_together: bool = Field(
        False,
        description="true: images of a patient, and of a lesion, follow each other, to be learned from together",
    )
    side_tables: dict[str, SideTableConfig] = Field(
        {}, description="tables keyed by sample, by name, kept beside the shards (side_tables.masks.uri=masks.csv)"
    )
    sub_captions: int = Field(
        0, ge=0, le=MAX_SUB_CAPTIONS, description="sentences of a raw caption to keep as captions of their own as well"
    )
    rewrite: RewriteConfig = RewriteConfig()

    image_size: int = Field(256, ge=16, le=4096, description="pixels of the shorter side; never enlarged")
    jpeg_quality: int = Field(90, ge=1, le=100, description="of the stored JPEGs")
    max_pixels: int = Field(
        DEFAULT_MAX_PIXELS, ge=1, le=PILLOW_MAX_PIXELS, description="larger images are dropped unread"
    )
    max_image_bytes: int = Field(256 << 20, ge=1, description="larger files are dropped unread")
    min_side: int = Field(32, ge=1, description="images with a shorter side below this are dropped")
    min_contrast: int = Field(
        4,
        ge=0,
        le=255,
        description="images whose brightness varies by less (of 255) are dropped as blank; 0: none are",
    )
    follow_links: bool = Field(False, description="true: symbolic links may lead out of input")

    near_duplicates: NearDuplicates = Field(
        "mark", description="keep: not looked for; mark: given a group id and one split; drop: only the first stays"
    )
    max_distance: int = Field(
        6, ge=0, le=16, description="bits of 64 by which the perceptual hashes of near-duplicates differ at most"
    )
    exclude: tuple[str, ...] = Field(
        (), description="prepared evaluation corpora: images that resemble one of theirs are left out"
    )
    if_exists: IfExists = Field(
        "append", description="append: a corpus at output takes new rows in, where it can; replace: it is made anew"
    )

    rows_per_shard: int = Field(512, ge=1, description="samples of a Parquet file, and of a piece of work on Ray")
    row_group_size: int = Field(128, ge=1, description="samples of a Parquet row group: what training reads at once")
    cpus_per_task: float = Field(1.0, gt=0, description="cores that a worker reserves")
    max_tasks: int | None = Field(None, ge=1, description="workers at the same time; empty: as many as fit the cluster")
    num_fetch_threads: int = Field(8, ge=1, le=256, description="reads at the same time in a worker")

    wait_for_output_s: WaitForOutput = 0.0
    run_name: str | None = Field(None, description="name of the MLflow run")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("source")
    @classmethod
    def _known_source(cls, name: str) -> str:
        if name not in READERS:
            raise ValueError(f"no source is named {name!r}; there are: {', '.join(sorted(READERS))}")
        return name

    @field_validator("split")
    @classmethod
    def _valid_split(cls, split: str | dict[str, float]) -> str | dict[str, float]:
        fractions = {split: 1.0} if isinstance(split, str) else split
        for name, fraction in fractions.items():
            if not SPLIT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a split name: lower-case letters, digits and _ only")
            if not 0 <= fraction <= 1:
                raise ValueError(f"the fraction of {name!r} must lie between 0 and 1, got {fraction}")
        if isinstance(split, dict) and (TRAIN in split or sum(split.values()) > 1):
            raise ValueError(f"give fractions of the other splits, at most 1 in all; {TRAIN} is what they leave")
        return split

    @field_validator("side_tables")
    @classmethod
    def _valid_names(cls, found: dict[str, SideTableConfig]) -> dict[str, SideTableConfig]:
        for name in found:
            if not SPLIT_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a side table: lower-case letters, digits and _ only")
        return found

    @model_validator(mode="after")
    def _apart(self) -> PrepareConfig:
        if self.input == self.output:
            raise ValueError("output: must be another folder than input, whose files it would replace")
        if self.columns.label_map and self.source not in OWN_COLUMNS:
            raise ValueError(f"columns.label_map is read for source=csv and parquet, not for {self.source}")
        if self.sub_captions and self.rewrite.mode in ("decompose", "both"):
            raise ValueError("sub_captions and rewrite.mode=decompose both make sub-captions: choose one")
        return self

    def without_effect(self) -> list[str]:
        """A line for each key that cannot do what it says."""
        found = []
        if self.source not in OWN_COLUMNS:
            keys = sorted(self.columns.model_fields_set)
            found += [f"columns.{key} has no effect with source={self.source}, which knows its columns" for key in keys]
        if self.rewrite.mode == "off":
            keys = sorted(self.rewrite.model_fields_set - {"mode"})
            found += [f"rewrite.{key} has no effect with rewrite.mode=off" for key in keys]
        if "row_group_size" in self.model_fields_set and self.row_group_size > self.rows_per_shard:
            found.append(
                f"row_group_size={self.row_group_size} is beyond rows_per_shard={self.rows_per_shard}: row groups hold "
                f"at most {self.rows_per_shard} samples"
            )
        if "max_distance" in self.model_fields_set and self.near_duplicates == "keep" and not self.exclude:
            found.append("max_distance has no effect with near_duplicates=keep")
        if isinstance(self.split, str) and "seed" in self.model_fields_set:
            found.append("seed decides no split where split names one")
        if self.min_side > self.image_size:
            found.append(
                f"min_side={self.min_side} is above image_size={self.image_size}: images between the two, which would "
                "need no enlarging, are dropped"
            )
        return found

    def transform(self) -> dict[str, Any]:
        """The keys that decide what a shard's bytes are, given its rows."""
        names = {"image_size", "jpeg_quality", "max_pixels", "max_image_bytes", "min_side", "min_contrast"}
        return self.model_dump(mode="json", include=names | {"follow_links", "sub_captions", "row_group_size"})

    def duplicates(self) -> dict[str, Any]:
        """The keys that decide what becomes of duplicates."""
        return self.model_dump(mode="json", include={"near_duplicates", "max_distance"})

    def content(self) -> dict[str, Any]:
        """The keys that decide what the corpus holds, for its provenance: not where it is or how it is made."""
        how = {"output", "cpus_per_task", "max_tasks", "num_fetch_threads", "wait_for_output_s"}
        how |= {"run_name", "cluster", "tracking"}
        content = self.model_dump(mode="json", exclude=how | {"max_dropped_fraction", "if_exists", "rewrite"})
        for name in ("side_tables", "keep_untexted", "keep_together"):
            if not content[name]:
                del content[name]
        if self.licence is None:
            # A corpus from before the key was there is not another one for that.
            del content["licence"]
        for name in NEWER_COLUMNS:
            if content["columns"][name] == DEFAULT_COLUMNS.model_dump(mode="json")[name]:
                del content["columns"][name]
        return content if self.rewrite.mode == "off" else {**content, "rewrite": self.rewrite.content()}
