"""What a run scores: a split of a prepared corpus, a table of one's own, or the data sets of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from dermray import storage
from dermray.corpus import branches
from dermray.corpus.manifest import MANIFEST_NAME, Manifest
from dermray.corpus.ontology import Ontology
from dermray.errors import CorpusError
from dermray.evaluate import benchmarks, telling
from dermray.evaluate.benchmarks import Benchmark
from dermray.evaluate.classes import labels_outside
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import DEFAULT_TASKS, EvaluateConfig
from dermray.evaluate.tables import Layout, RawTable, find
from dermray.evaluate.tasks import kinds
from dermray.raw import splits as splits_of
from dermray.raw.splits import split_name
from dermray.vectors.embedding.units import ImageFiles

# What a table of one's own is scored by beside the rest where it has rows to learn from.
LEARNING_TASKS = ("linear_probe", "knn", "few_shot")
TEST = "test"


@dataclass(frozen=True)
class Case:
    """One thing to score: the samples, those to learn from, the tasks, and those to fit a temperature on.

    `told` is what the user should hear of the table, a line each.
    """

    config: EvaluateConfig
    samples: Samples
    training: Samples | None
    tasks: tuple[str, ...]
    benchmark: Benchmark | None = None
    validation: Samples | None = None
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A data set of a benchmark that is not scored, and why."""

    benchmark: Benchmark
    reason: str

    def __str__(self) -> str:
        dataset = self.benchmark.dataset
        bundle = f", ready to use at {self.benchmark.bundle}" if self.benchmark.bundle else ""
        return f"{self.benchmark.name}: {self.reason}; {dataset.title} is offered at {dataset.offered}{bundle}"


def of_config(config: EvaluateConfig) -> Case:
    """The corpus or the table of one's own that a configuration names.

    Raises:
        CorpusError: it is not there, has no such split, or lacks a column.
    """
    if config.corpus is not None:
        return _of_corpus(config, config.corpus, config.split, config.tasks or DEFAULT_TASKS)
    return _of_own_table(config)


def of_benchmark(config: EvaluateConfig, benchmark: Benchmark, *, alone: bool) -> Case | Skipped:
    """A benchmark's data below `config.data`: prepared, or as published.

    Args:
        config: of the run.
        benchmark: what to look for.
        alone: it is the only one, so that `config.data` itself may be its prepared corpus.
    """
    try:
        return _of_benchmark(config, benchmark, alone)
    except CorpusError as error:
        return Skipped(benchmark, str(error))


def _of_benchmark(config: EvaluateConfig, benchmark: Benchmark, alone: bool) -> Case:
    root = storage.normalise(config.data or "")
    own = config.model_copy(update={"templates": config.templates or benchmark.templates})
    tasks = config.tasks or benchmark.tasks
    short = benchmark.name.rpartition("/")[2]
    for folder in (storage.join(root, benchmark.name), storage.join(root, short), *([root] if alone else [])):
        if storage.exists(storage.join(folder, MANIFEST_NAME)):
            splits = Manifest.load(folder).splits
            split = TEST if TEST in splits else config.split if config.split in splits else next(iter(splits))
            return _of_corpus(own, folder, split, tasks, benchmark)
    table = RawTable.read(
        _table_uri(root, benchmark),
        benchmark.table.layout(),
        image_folders=[
            root,
            storage.join(root, "data"),
            root.rpartition("/")[0],
            *(
                storage.join(base, name)
                for name in benchmark.table.images
                for base in (root, storage.join(root, "data"))
            ),
        ],
    )
    return _of_table(own, table, benchmark.split, tasks, benchmark.classes, benchmark)


def _table_uri(root: str, benchmark: Benchmark) -> str:
    found = find(root, benchmark.table.paths) if benchmark.table.paths else None
    if found is not None:
        return found
    if benchmark.table.folder:
        folder = storage.join(root, benchmark.table.folder)
        tables = [uri for uri in storage.list_files(folder) if uri.endswith(".csv")]
        if len(tables) == 1:
            return tables[0]
        if tables:
            raise CorpusError(f"{folder} holds {len(tables)} tables (.csv), one is expected")
    expected = benchmark.table.paths[0] if benchmark.table.paths else f"{benchmark.table.folder}/*.csv"
    raise CorpusError(f"its table {expected} is not below {root}")


def _of_corpus(
    config: EvaluateConfig,
    uri: str,
    split: str,
    tasks: tuple[str, ...],
    benchmark: Benchmark | None = None,
) -> Case:
    tree = _ontology(config)
    class_names, concept_names = (benchmark.classes, benchmark.concepts) if benchmark else ((), ())

    def load(name: str, max_samples: int | None) -> Samples:
        samples = Samples.load(uri, name, max_samples=max_samples)
        ontology = tree or samples.ontology
        return replace(samples, class_names=class_names, concept_names=concept_names, ontology=ontology)

    training = load(config.train_split, None) if _learn(tasks) else None
    calibrate = _calibrate(config, tasks, scored=split, splits=Manifest.load(uri).splits)
    validation = load(config.validation_split, config.max_samples) if calibrate else None
    return Case(config, load(split, config.max_samples), training, tasks, benchmark, validation)


def _of_own_table(config: EvaluateConfig) -> Case:
    columns = config.columns
    table = RawTable.read(
        storage.normalise(config.data or ""),
        Layout(
            image=(columns.image,),
            label=(columns.label,),
            caption=(columns.caption,),
            split=(columns.split,),
            optional=frozenset(set(type(columns).model_fields) - columns.model_fields_set - {"image"}),
        ),
    )
    has = {purpose for purpose, name in table.columns.items() if name}
    if not has & {"label", "caption"}:
        raise CorpusError(
            f"{table.uri} has neither labels ({columns.label}) nor captions ({columns.caption}); "
            "name one with columns.label= or columns.caption="
        )
    splits = set(table.splits)
    learn = "label" in has and split_name(config.train_split) in splits
    split = None if "split" not in has else _own_split(config, splits)
    named = config.classes or not _numbered(table)
    tasks = config.tasks or (
        *(("zero_shot",) if "label" in has and named else ()),
        *(("retrieval",) if "caption" in has else ()),
        *(LEARNING_TASKS if learn else ()),
    )
    if not tasks:
        raise CorpusError(
            f"{table.uri} has numbers as labels: give their names with classes=[…], or rows of a split "
            f"{config.train_split!r} to learn from"
        )
    case = _of_table(config, table, split, tasks, config.classes)
    other = splits_of.others(table.splits, expected={split or "", split_name(config.train_split)})
    samples = replace(case.samples, told=case.samples.told | ({telling.SPLITS: dict(other)} if other else {}))
    unused = [] if "split" in has or "split" not in config.model_fields_set else [config.split]
    lines = [f"split={split} has no effect: {table.uri} has no column {columns.split!r}" for split in unused]
    return replace(case, samples=samples, told=(*lines, *_lines(samples)))


def _of_table(
    config: EvaluateConfig,
    table: RawTable,
    split: str | None,
    tasks: tuple[str, ...],
    class_names: tuple[str, ...],
    benchmark: Benchmark | None = None,
) -> Case:
    tree = _ontology(config)
    samples = table.samples(split, class_names=class_names, ontology=tree, max_samples=config.max_samples)
    if outside := labels_outside(samples):
        samples = replace(samples, told=samples.told | {telling.OUTSIDE: outside})
    again = {telling.AGAIN: len(samples) - len(set(_addresses(samples)))}
    training = table.samples(config.train_split, class_names=class_names, ontology=tree) if _learn(tasks) else None
    if training is not None:
        again[telling.LEARNT] = len({*_addresses(samples)}.intersection(_addresses(training)))
    if images := {what: number for what, number in again.items() if number}:
        samples = replace(samples, told=samples.told | {telling.IMAGES: images})
    validation = (
        table.samples(config.validation_split, class_names=class_names, ontology=tree, max_samples=config.max_samples)
        if split and _calibrate(config, tasks, scored=split, splits=table.splits, name_of=split_name)
        else None
    )
    return Case(config, samples, training, tasks, benchmark, validation, _lines(samples))


def _addresses(samples: Samples) -> list[str]:
    return [uri for unit in samples.images if isinstance(unit, ImageFiles) for uri in unit.uris]


def _lines(samples: Samples) -> tuple[str, ...]:
    return tuple(f"{samples.uri}: {line}" for line in telling.lines(samples.told))


def _own_split(config: EvaluateConfig, splits: set[str]) -> str:
    """The split asked for; by itself: `test` where there is one."""
    return TEST if "split" not in config.model_fields_set and TEST in splits else split_name(config.split)


def _numbered(table: RawTable) -> bool:
    name = table.columns["label"]
    return name is not None and all(row[name].strip().replace(".", "").isdigit() for row in table.rows if row[name])


def _learn(tasks: tuple[str, ...]) -> bool:
    return any(kinds.find(task).learns for task in tasks)


def _calibrate(
    config: EvaluateConfig,
    tasks: tuple[str, ...],
    *,
    scored: str,
    splits: Collection[str],
    name_of: Callable[[str], str] = str,
) -> bool:
    """Whether there is a split to fit a temperature on that neither is scored nor teaches.

    Args:
        name_of: by which splits are one: in a prepared corpus each is what its name says.
    """
    wanted = name_of(config.validation_split)
    apart = wanted not in (name_of(scored), name_of(config.train_split))
    return apart and wanted in splits and any(kinds.find(task).calibrated for task in tasks)


def _ontology(config: EvaluateConfig) -> Ontology | None:
    return branches.load(config.ontology) if config.ontology else None


def of_suite(config: EvaluateConfig) -> tuple[benchmarks.Suite, list[Case | Skipped]]:
    """A benchmark's data sets below `config.data`, each as a case or with the reason why it is skipped.

    Raises:
        ConfigError: no benchmark has that name.
        CorpusError: none of its data sets is there; the message says where they are offered.
    """
    suite = benchmarks.load(config.benchmark or "")
    found = [of_benchmark(config, one, alone=len(suite.benchmarks) == 1) for one in suite.benchmarks]
    skipped = [str(one) for one in found if isinstance(one, Skipped)]
    if len(skipped) == len(found):
        bundle = f"; all of them together: {suite.bundle}" if suite.bundle else ""
        raise CorpusError(f"{config.data} holds no data of {suite.title}: {' | '.join(skipped)}{bundle}")
    return suite, found
