"""A disk that is full when something is written again: the file is named, and what was there before stays whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dermray.errors import StorageError
from dermray.evaluate.comparison import Comparison
from dermray.evaluate.predictions import ClassPredictions
from dermray.evaluate.report import Report, SuiteReport
from dermray.vectors.index.vectors import VectorIndex, build
from tests.fault.conftest import Disk
from tests.raw_corpus import content
from tests.serving import save_embeddings

PAGE_BYTES = 4096
MOST_PAGES = 100


def report(number: int) -> Report:
    """Some pages of figures, of a drawing and of predictions."""
    made_by = {"model_digest": f"{number}", "preprocessing_digest": "p"}
    document = {"model": made_by, "corpus": {"split": "val", "digest": "c"}, "figures": [number] * 2000}
    scores = np.random.default_rng(number).random((400, 2), dtype=np.float32)
    found = ClassPredictions([f"s{n}" for n in range(400)], np.zeros(400, np.int64), scores, ("a", "b"))
    return Report(document, f"{number} " * 4000, {"zero_shot": found})


def suite(number: int) -> SuiteReport:
    """Of two data sets, whose reports belong to the summary, and fit where that does not."""
    return SuiteReport({"figures": [number] * 20_000}, f"{number} " * 4000, {"a": report(number), "b": report(number)})


def comparison(number: int) -> Comparison:
    return Comparison({"figures": [number] * 2000}, f"{number} " * 4000)


def refused(write: Callable[[], object]) -> str:
    """What is said of the disk; nothing if there was room."""
    try:
        write()
    except StorageError as error:
        return str(error)
    return ""


def pages_until_there_is_room(output: Path, disk: Disk, write: Callable[[], object], intact: Callable[[], bool]) -> int:
    """Write with one more free page each time until it fits; what was there is intact until then."""
    for num_pages in range(MOST_PAGES):
        disk.leave(num_pages * PAGE_BYTES)
        said = refused(write)
        assert intact() == bool(said)
        if not said:
            return num_pages
        assert said.startswith(f"{output}/")
        assert "No space left on device" in said
        assert "\n" not in said
    raise AssertionError("it never had room")


@pytest.mark.parametrize("make", [report, suite, comparison])
def test_a_report_is_written_whole_or_not_at_all(
    make: Callable[[int], Report | SuiteReport | Comparison], disk: Disk
) -> None:
    output = disk.path / "report"
    make(1).save(str(output))
    before = content(output)

    def intact() -> bool:
        return content(output) == before

    assert pages_until_there_is_room(output, disk, lambda: make(2).save(str(output)), intact) > 5


def test_an_index_stays_until_there_is_room_for_the_next(disk: Disk, tmp_path: Path) -> None:
    """Files of the next one that did fit lie beside it, until one succeeds."""
    output = disk.path / "index"
    for number in range(2):
        save_embeddings(tmp_path / str(number), rows=300, seed=number)
    before = build(str(tmp_path / "0"), str(output)).digest

    def intact() -> bool:
        return VectorIndex.load(str(output)).digest == before

    assert pages_until_there_is_room(output, disk, lambda: build(str(tmp_path / "1"), str(output)), intact) > 5
