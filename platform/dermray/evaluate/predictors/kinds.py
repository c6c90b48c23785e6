"""Which predictors there are; what they compute with is imported only where they predict.

A run names one a task by `predictor.TASK=NAME`: a folder beside this file, an entry point of the group
`dermray.predictors` of an installed package, or `package.module:NAME`. All three lead to a `PredictorKind`, whose keys
are `predictor_keys.TASK.key=value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dermray import extensions
from dermray.config import Config

ENTRY_POINTS = "dermray.predictors"
# What a folder beside this file calls its `PredictorKind`.
ATTRIBUTE = "KIND"
# What classifiers give: probabilities of classes, float `[N, C]`.
CLASSES = "classes"
# How sure each of some concepts is present, float `[N, C]`; whatever is greater where it is.
CONCEPTS = "concepts"


class PredictorConfig(Config):
    """Keys of a predictor, below `predictor_keys.TASK`; the base has none."""


@dataclass(frozen=True)
class PredictorKind:
    """One way to turn samples into predictions.

    Attributes:
        module: name of the module with its `PREDICTOR` (`dermray.evaluate.predictors.contract.Predictor`), imported
            where it predicts.
        gives: what comes out, in a word that tasks ask for it by (`TaskKind.takes`): "classes", "concepts", "risk",
            "mask".
        vectors: it looks at the vectors that the run's model gives; else at the images themselves, and `model` is
            whatever it loads.
        settings: its keys.
        uses: keys of the run that decide what it says, beside the task's (`TaskKind.uses`).
    """

    module: str
    gives: str
    vectors: bool = True
    settings: type[PredictorConfig] = PredictorConfig
    uses: tuple[str, ...] = ()


@cache
def find(name: str) -> PredictorKind:
    """The predictor of a name or import path.

    Raises:
        ValueError: there is none, and says which there are.
    """
    return extensions.find(
        name, PredictorKind, package=__package__, group=ENTRY_POINTS, attribute=ATTRIBUTE, what="predictor"
    )


def ours() -> tuple[str, ...]:
    """The predictors that come with DermRay, by the alphabet."""
    return extensions.folders(__package__)
