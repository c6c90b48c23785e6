"""Which evaluation tasks there are, and the keys of each; what they compute with is imported only where they score.

A run names them by `tasks=[…]`: a folder beside this file, an entry point of the group `dermray.tasks` of an installed
package, or `package.module:NAME`. All three lead to a `TaskKind`. In reports, metrics and keys a task is called by its
name; one that is given by an import path by what stands behind the colon.
"""

from __future__ import annotations

import contextlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from dermray import extensions
from dermray.config import Config
from dermray.evaluate.predictors import kinds as predictors
from dermray.keys import Reader

ENTRY_POINTS = "dermray.tasks"
# What a folder beside this file calls its `TaskKind`.
ATTRIBUTE = "TASK"
# What a task may be called: files and keys have its name.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


ConfigT = TypeVar("ConfigT", bound=Config)


class TaskConfig(Config):
    """Keys of a task, below `task.NAME`; the base has none."""


@dataclass(frozen=True)
class TaskKind:
    """One way to score a model.

    Attributes:
        title: what the page calls it.
        module: name of the module with its `SCORER` (`dermray.evaluate.tasks.contract.Task`), imported where it scores.
        settings: its keys.
        uses: keys of the run that not every task looks at; one that no task of a run looks at is told, and reports that
            differ in one are not compared for promotion.
        learns: it needs a split to learn from.
        calibrated: its probabilities are calibrated on the validation split, where there is one.
        takes: what it scores, in the word by which predictors say what they give (`PredictorKind.gives`): "classes",
            "risk". Empty: it asks no predictor and works on vectors.
        predictor: who predicts where the run names none by `predictor.TASK`; empty: the run must name one.
        vectors: it looks at the images' vectors itself, whoever predicts.
        fixes: keys that who predicts uses and that it sets itself, whatever the run says.
    """

    title: str
    module: str
    settings: type[TaskConfig] = TaskConfig
    uses: tuple[str, ...] = ()
    learns: bool = False
    calibrated: bool = False
    takes: str = ""
    predictor: str = ""
    vectors: bool = True
    fixes: tuple[str, ...] = ()


def deciding(task: TaskKind, predictor: predictors.PredictorKind | None) -> tuple[str, ...]:
    """Keys of a run that decide a task's scores when somebody, or nobody, predicts for it."""
    keys = (*task.uses, *(predictor.uses if predictor else ()))
    return tuple(key for key in dict.fromkeys(keys) if key not in task.fixes)


@cache
def find(name: str) -> TaskKind:
    """The task of a name or import path.

    Raises:
        ValueError: there is none, and says which there are; or it would be called as one of ours, or by what no file
            and key should be.
    """
    if not _NAME.fullmatch(short(name)):
        raise ValueError(f"a task cannot be called {short(name)!r}: letters, digits, _ and - are")
    if short(name) != name and short(name) in ours():
        raise ValueError(
            f"the task {name!r} would be called {short(name)!r}, as DermRay's own is; give it another name"
        )
    return extensions.find(name, TaskKind, package=__package__, group=ENTRY_POINTS, attribute=ATTRIBUTE, what="task")


def short(name: str) -> str:
    """What a task is called in reports and keys: `lab.tasks:brightness` → `brightness`."""
    return name.rpartition(":")[2]


def named(names: Iterable[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        ValueError: two tasks would be called the same.
    """
    once = tuple(dict.fromkeys(names))
    for name in once:
        others = [other for other in once if short(other) == short(name)]
        if len(others) > 1:
            raise ValueError(f"the tasks {' and '.join(others)} would both be called {short(name)!r}")
    return once


def require_predictors(tasks: Iterable[str], named: Mapping[str, str]) -> None:
    """Refuse tasks that nobody predicts for, or somebody who gives something else than they score.

    Args:
        tasks: of a run.
        named: its keys `predictor.TASK`.

    Raises:
        ValueError: a task is not of the run or asks nobody, has no predictor, or one that gives something else.
    """
    by_name = {short(name): find(name) for name in tasks}
    for name in named:
        if name not in by_name:
            raise ValueError(f"predictor.{name}: {name} is not among tasks ({', '.join(by_name)})")
        if not by_name[name].takes:
            raise ValueError(
                f"predictor.{name}: {name} works on vectors of the run's model and asks no predictor; leave it out"
            )
    for name, takes in ((name, kind.takes) for name, kind in by_name.items() if kind.takes):
        predictor = named.get(name, by_name[name].predictor)
        if not predictor:
            raise ValueError(f"the task {name} needs a predictor that gives {takes}: predictor.{name}=NAME")
        if (gives := predictors.find(predictor).gives) != takes:
            raise ValueError(f"predictor.{name}: {predictor} gives {gives}, and {name} scores {takes}")


def settings_of(tasks: Iterable[str], sections: Any) -> dict[str, TaskConfig]:
    """The section `task` of a run by the keys of its tasks: all of them, with the defaults of what is not given.

    Raises:
        ValueError: a section is of no task of the run; of pydantic: its keys do not fit.
    """
    if not isinstance(sections, Mapping):
        raise ValueError(f"needs keys of tasks, task.NAME.key=value, got {sections!r}")
    by_name = {short(name): find(name) for name in tasks}
    unknown = next((name for name in sections if name not in by_name), None)
    if unknown is not None:
        raise ValueError(f"task.{unknown}: {unknown} is not among tasks ({', '.join(by_name) or 'none given'})")
    return {
        name: _validated(name, kind.settings, sections.get(name, {}))
        for name, kind in by_name.items()
        if kind.settings is not TaskConfig or name in sections
    }


def predictor_settings_of(
    tasks: Iterable[str], named: Mapping[str, str], sections: Any
) -> dict[str, predictors.PredictorConfig]:
    """The section `predictor_keys` of a run by the keys of who predicts for its tasks, with the defaults of the others.

    Args:
        tasks: of the run.
        named: its keys `predictor.TASK`; of a predictor that is not there `require_predictors` tells.
        sections: `predictor_keys.TASK`, as given.

    Raises:
        ValueError: a section is of no task that asks a predictor; of pydantic: its keys do not fit.
    """
    if not isinstance(sections, Mapping):
        raise ValueError(f"needs keys of predictors, predictor_keys.TASK.key=value, got {sections!r}")
    asked = {short(name): named.get(short(name)) or find(name).predictor for name in tasks if find(name).takes}
    unknown = next((name for name in sections if name not in asked), None)
    if unknown is not None:
        known = ", ".join(asked) or "none"
        raise ValueError(f"predictor_keys.{unknown}: {unknown} is not among tasks that ask a predictor ({known})")
    settings = {name: _settings_of_predictor(predictor) for name, predictor in asked.items()}
    return {
        name: _validated(name, kind, sections.get(name, {}))
        for name, kind in settings.items()
        if kind is not None and (kind is not predictors.PredictorConfig or name in sections)
    }


def _settings_of_predictor(name: str) -> type[predictors.PredictorConfig] | None:
    try:
        return predictors.find(name).settings
    except ValueError:
        return None


def _validated(name: str, settings: type[ConfigT], section: Any) -> ConfigT:
    """A section by a task's name; what is wrong with it is said of `task.NAME.key`, or as the section is called."""
    try:
        return settings.model_validate(section)
    except ValidationError as error:
        details = [
            InitErrorDetails(type=_type_of(one), loc=(name, *one["loc"]), input=one["input"], ctx=one.get("ctx", {}))
            for one in error.errors()
        ]
        raise ValidationError.from_exception_data(settings.__name__, details) from None


def _type_of(one: ErrorDetails) -> str | PydanticCustomError:
    """The type of an error of pydantic's; one of a task's own making is told by what it says."""
    if one["type"] in typing.get_args(ErrorType):
        return one["type"]
    return PydanticCustomError(one["type"], one["msg"])


def read_sections(tree: Mapping[str, Any], reader: Reader) -> Mapping[str, Any]:
    """The tree of a run with `task.NAME.key` and `predictor_keys.TASK.key` read by the types of each task's and each
    predictor's keys; what is unknown stays as it is.
    """
    by_name: dict[str, str] = {}
    who: dict[str, str] = {}
    found = dict(tree)
    settings: dict[str, Callable[[str], type[Config]]] = {
        "task": lambda name: find(by_name[name]).settings,
        "predictor_keys": lambda name: (
            predictors.find(str(who[name]) if name in who else find(by_name.get(name, name)).predictor).settings
        ),
    }
    for key, of in settings.items():
        sections = tree.get(key)
        if not isinstance(sections, Mapping):
            continue
        given = reader.read(tuple[str, ...], tree.get("tasks"), "tasks") or ()
        by_name |= {short(str(name)): str(name) for name in given if isinstance(name, str)}
        who |= reader.read(dict[str, str], tree.get("predictor"), "predictor") or {}
        read = found[key] = dict(sections)
        for name, section in sections.items():
            with contextlib.suppress(ValueError, KeyError):
                read[name] = reader.read(of(name), section, f"{key}.{name}")
    return found


def ours() -> tuple[str, ...]:
    """The tasks that come with DermRay, by the alphabet."""
    return extensions.folders(__package__)


def users() -> dict[str, list[str]]:
    """Keys of a run that only some of our tasks look at → those tasks."""
    found: dict[str, list[str]] = {}
    for name in ours():
        for key in find(name).uses:
            found.setdefault(key, []).append(name)
    return found


def _known(name: str) -> str:
    find(name)
    return name


TaskName = Annotated[str, AfterValidator(_known)]
