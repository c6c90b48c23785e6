"""Published benchmarks as data: what to compute on which published table, and what others scored there.

A suite is one YAML file of this folder with its benchmarks; `datasets.yaml` says who owns the images, under which
licence and where they are offered; `classes.yaml` holds the class lists. A published score stands there only with the
document it was read in.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import Any

from pydantic import Field

from dermray.config import Config, validate
from dermray.documents import parse_yaml, plain
from dermray.errors import ConfigError
from dermray.evaluate.tables import Layout
from dermray.evaluate.tasks.kinds import TaskName

_NO_SUITES = ("datasets.yaml", "classes.yaml")


class Dataset(Config):
    """The images of a benchmark: whose they are and where they are to be had."""

    title: str
    licence: str | None = Field(description="None: not stated where it is offered")
    citation: str
    offered: str = Field(description="where the owner offers it")


class Published(Config):
    """What a publication says of a model."""

    model: str
    scores: dict[str, float] = Field(description="TASK/METRIC → score, in the report's names")
    reference: str = Field(description="the document it was read in")


class Table(Config):
    """Where a benchmark's table lies and how it is read."""

    paths: tuple[str, ...] = Field((), description="ends of its path below the data folder, tried in this order")
    folder: str | None = Field(None, description="or: the folder whose only .csv it is")
    image: tuple[str, ...]
    label: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    concepts: bool = False
    images: tuple[str, ...] = Field((), description="folders below the data folder that image paths may start from")

    def layout(self) -> Layout:
        """The columns."""
        return Layout(self.image, self.label, self.caption, self.split, self.concepts)


class Benchmark(Config):
    """One data set with the tasks that are computed on it."""

    name: str
    title: str
    dataset: Dataset
    tasks: tuple[TaskName, ...]
    metrics: tuple[str, ...] = Field(description="TASK/METRIC that the publication reports")
    classes: tuple[str, ...] = ()
    concepts: tuple[str, ...] = Field((), description="for a prepared corpus; a published table has them as columns")
    templates: tuple[str, ...] = ()
    table: Table
    split: str | None = Field(None, description="split of the table that is scored; None: all rows")
    bundle: str | None = Field(None, description="where the authors offer its data, ready to use")
    published: tuple[Published, ...]


class Suite(Config):
    """Benchmarks that a publication evaluates on."""

    name: str
    title: str
    reference: str
    bundle: str | None = Field(None, description="where its authors offer the data together")
    benchmarks: tuple[Benchmark, ...]


def names() -> list[str]:
    """Every name that `load` takes: suites, and the benchmarks of each."""
    return [name for suite in _suites().values() for name in (suite.name, *(f"{one.name}" for one in suite.benchmarks))]


def load(name: str) -> Suite:
    """A suite, or a suite of one for the name of a benchmark (`derm1m/ham10000`).

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    suites = _suites()
    if name in suites:
        return suites[name]
    suite = suites.get(name.partition("/")[0])
    members = tuple(one for one in suite.benchmarks if one.name == name) if suite else ()
    if suite is None or not members:
        raise ConfigError(f"benchmark: no benchmark is named {name!r}; there are: {', '.join(names())}")
    return suite.model_copy(update={"benchmarks": members})


@lru_cache(maxsize=1)
def _suites() -> dict[str, Suite]:
    folder = resources.files(__name__)
    read = {file.name: plain(parse_yaml(file.read_bytes(), file.name)) for file in folder.iterdir() if _is(file)}
    datasets, classes = (read.pop(name) for name in _NO_SUITES)
    suites = [_suite(document, datasets, classes) for _, document in sorted(read.items())]
    return {suite.name: suite for suite in suites}


def _is(file: Any) -> bool:
    return str(file.name).endswith(".yaml")


def _suite(document: dict[str, Any], datasets: dict[str, Any], classes: dict[str, list[str]]) -> Suite:
    members = []
    for entry in document["benchmarks"]:
        full = {
            **entry,
            "name": f"{document['name']}/{entry['name']}",
            "dataset": datasets[entry["dataset"]],
            "classes": classes[entry["classes"]] if "classes" in entry else [],
        }
        members.append(validate(Benchmark, full))
    return validate(Suite, {**document, "benchmarks": members})
