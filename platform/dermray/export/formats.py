"""The formats by name: which parts an export has, and who writes a part."""

from __future__ import annotations

from collections.abc import Mapping

from dermray.export import instruct, make_table, open_clip_csv, parquet, webdataset
from dermray.export.parts import Part, Planner, Writer
from dermray.export.settings import ExportConfig, ExportFormat

FORMATS: dict[ExportFormat, tuple[Planner, Writer]] = {
    "instruct": (instruct.plan, instruct.write),
    "make_table": (make_table.plan, make_table.write),
    "open_clip_csv": (open_clip_csv.plan, open_clip_csv.write),
    "parquet": (parquet.plan, parquet.write),
    "webdataset": (webdataset.plan, webdataset.write),
}
# Those whose files have a place for what side tables say of a sample.
WITH_SIDES: frozenset[ExportFormat] = frozenset({"parquet"})


def plan_parts(splits: Mapping[str, int], config: ExportConfig) -> list[Part]:
    """Every part of an export, given the samples of each split; the same each time."""
    plan, _ = FORMATS[config.format]
    parts = [part for split, num_samples in splits.items() for part in plan(split, num_samples, config)]
    if config.format == "open_clip_csv":
        parts.append(open_clip_csv.plan_whole(sum(splits.values())))
    return parts


def writer_of(name: ExportFormat) -> Writer:
    """Who writes the parts of the format of that name."""
    return FORMATS[name][1]
