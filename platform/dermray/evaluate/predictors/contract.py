"""The contract of a predictor: which texts it needs encoded, what it is made ready by, and what it says of samples.

A predictor is a folder beside this file, or lives in a package of one's own (`dermray.evaluate.predictors.kinds`): a
`PredictorKind` that says what comes out, and a module with a `PREDICTOR`, which is a `Predictor`. It is told nothing of
what is scored but the images, their vectors, and what a physician knows beforehand (age, sex, skin type, body site,
source, modality): the truth is the task's, which asks it (`dermray.evaluate.tasks.contract`), and which samples
resemble a training image is the report's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from dermray import extensions
from dermray.errors import EvaluationError
from dermray.evaluate import leakage
from dermray.evaluate.classes import Classes
from dermray.evaluate.predictors import kinds
from dermray.evaluate.predictors.kinds import PredictorConfig
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.vectors.encoder_info import EncoderInfo

if TYPE_CHECKING:
    from dermray.evaluate.features import Features

UNREADABLE = "image not readable"


@dataclass(frozen=True, eq=False)
class Seen:
    """Samples that a predictor looks at.

    Attributes:
        samples: all of their split; where they are to be predicted, without labels, concepts and captions, and without
            the group that says which resemble a training image.
        features: their vectors; of no width where the run encodes no images.
        rows: int64 `[N]`, the samples that are asked for.
    """

    samples: Samples
    features: Features
    rows: np.ndarray

    @classmethod
    def of(cls, samples: Samples, features: Features, rows: np.ndarray) -> Seen:
        """Some samples without what is to be predicted, or says how the model learnt."""
        nothing: list[list[str]] = [[] for _ in samples.ids]
        known = {name: members for name, members in samples.groups.items() if name != leakage.DIMENSION}
        untold = replace(samples, labels=nothing, concepts=nothing, captions=[None] * len(samples), groups=known)
        return cls(untold, features, rows)

    def vectors(self) -> np.ndarray:
        """The vectors in the length that the tower gives them, float32 `[N, D]`."""
        return self.features.images[self.rows] * self.features.lengths[self.rows, None]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a predictor is made ready by.

    Attributes:
        config: of the run; `config.model` may be a name, `model_uri` is where the model lies.
        texts: vectors of texts that it asked for, float32 `[len(texts), D]`.
        classes: those to tell apart, of tasks that take classes; without the class of any sample.
        learnt: samples to learn from, all that is known of them included.
        labels: int64 `[M]`, their classes.
        settings: the predictor's own keys, of the type `PredictorKind.settings`; whom `Context.predictor` gives has
            those of the run.
    """

    config: EvaluateConfig
    model_uri: str
    texts: Callable[[Sequence[str]], np.ndarray]
    classes: Classes | None = None
    learnt: Seen | None = None
    labels: np.ndarray | None = None
    settings: PredictorConfig = field(default_factory=PredictorConfig)

    def told_apart(self) -> Classes:
        """The classes.

        Raises:
            EvaluationError: the task names none.
        """
        if self.classes is None:
            raise EvaluationError("a predictor of classes is asked by a task that names none")
        return self.classes

    def examples(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and classes to learn from, float32 `[M, D]` and int64 `[M]`.

        Raises:
            EvaluationError: the task hands none over.
        """
        if self.learnt is None or self.labels is None:
            raise EvaluationError("a predictor that learns is asked by a task that hands over nothing to learn from")
        return self.learnt.vectors(), self.labels


@dataclass(frozen=True, eq=False)
class Predicted:
    """What was said of N samples.

    Attributes:
        values: `[N, …]`, one row a sample: probabilities `[N, C]`, risks `[N]`, masks `[N, H, W]`; zeros where there is
            a reason.
        reasons: object `[N]`, why nothing was said of a sample; empty where something was.
    """

    values: np.ndarray
    reasons: np.ndarray

    @property
    def answered(self) -> np.ndarray:
        """Of which samples something was said, bool `[N]`."""
        return self.reasons == ""

    def left_out(self) -> dict[str, int]:
        """Samples of which nothing was said, by reason."""
        return {UNREADABLE: 0} | dict(sorted(Counter(filter(None, self.reasons)).items()))


@dataclass(frozen=True, eq=False)
class Heard:
    """What one or several predictors say of the same N samples, those left out that some of them says nothing of.

    Attributes:
        answered: of which samples each of them says something, bool `[N]`.
        values: of each predictor, `[n, K]`, the n answered samples in their order.
        left_out: samples of which some say nothing, by the first reason given.
    """

    answered: np.ndarray
    values: tuple[np.ndarray, ...]
    left_out: dict[str, int]

    @classmethod
    def of(cls, said: Sequence[Predicted], num: int, what: str) -> Heard:
        """Take what was said of one list of samples.

        Args:
            said: by each predictor, one at least.
            num: K, the numbers that it was to give a sample.
            what: they are of, for messages: "classes".

        Raises:
            EvaluationError: nothing is left, or a predictor gives other than K numbers a sample.
        """
        reasons = said[0].reasons
        for one in said[1:]:
            reasons = np.where(reasons == "", one.reasons, reasons)
        together = Predicted(said[0].values, reasons)
        if not together.answered.any():
            raise EvaluationError(f"its predictor says nothing of the {len(reasons)} samples: {together.left_out()}")
        for one in said:
            if one.values.shape[1:] != (num,):
                shape = list(one.values.shape[1:])
                raise EvaluationError(f"its predictor gives {shape} numbers a sample for {num} {what}")
        return cls(together.answered, tuple(one.values[together.answered] for one in said), together.left_out())


# What a predictor that is ready says of samples.
Predict = Callable[[Seen], Predicted]


class Predictor(Protocol):
    """Turns samples into predictions."""

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """Texts whose vectors `ready` will ask for; `classes` are those to tell apart, if any."""

    def ready(self, lesson: Lesson) -> Predict:
        """Learn, or load what is needed.

        Raises:
            EvaluationError: the lesson does not allow it; the message says why.
            ModelError: the model cannot be loaded.
        """


class ImagePredictor(Predictor, Protocol):
    """One that looks at the images themselves (`PredictorKind.vectors` is False)."""

    def info(self, model_uri: str) -> EncoderInfo:
        """What the model at a URI is called, its digests and size, for the report; widths that it lacks are 0.

        Raises:
            ModelError: there is no such model.
        """


@dataclass(frozen=True)
class Asked:
    """A predictor with the keys that a run gives it for a task: the lesson that makes it ready holds them."""

    predictor: Predictor
    settings: PredictorConfig

    def texts(self, classes: Classes | None, config: EvaluateConfig) -> list[str]:
        """As the predictor's."""
        return self.predictor.texts(classes, config)

    def ready(self, lesson: Lesson) -> Predict:
        """As the predictor's."""
        return self.predictor.ready(replace(lesson, settings=self.settings))


@cache
def load(name: str) -> Predictor:
    """A predictor, imported.

    Raises:
        EvaluationError: its module cannot be imported or has no `PREDICTOR`.
    """
    found = extensions.member(kinds.find(name).module, "PREDICTOR", f"the predictor {name!r}", EvaluationError)
    return cast(Predictor, found)


def by_vectors(seen: Seen, say: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Predicted:
    """Predictions from vectors.

    Args:
        seen: the samples; of those without a vector nothing is said.
        say: from unit vectors and their lengths, float32 `[n, D]` and `[n]`, to values `[n, …]`.
    """
    usable = seen.features.usable[seen.rows]
    rows = seen.rows[usable]
    found = say(seen.features.images[rows], seen.features.lengths[rows])
    values = np.zeros((len(usable), *found.shape[1:]), found.dtype)
    values[usable] = found
    return Predicted(values, np.where(usable, "", UNREADABLE).astype(object))
