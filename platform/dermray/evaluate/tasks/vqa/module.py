"""Closed questions scored: which condition, which body site, what kind of picture, is a finding there.

The questions are those of `dermray.corpus.questions`. Each answer has some statements that would be true of the
picture; the answer whose mean statement has the greatest cosine with the image is the model's (`classifier_weights`,
as zero-shot asks for its classes). A picture with a finding is told from one without by the statements without the
finding, as MONET's references are (Kim et al., 2024): models of this type do not understand "no".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermray.corpus.accounts import require_balance
from dermray.corpus.questions.closed import (
    ABSENT,
    KINDS,
    NUM_ANSWERS,
    PRESENT,
    Asker,
    Facts,
    Pool,
    Question,
    plain_concepts,
    plain_site,
)
from dermray.corpus.questions.templates import Templates
from dermray.errors import EvaluationError
from dermray.evaluate.classes import classes_of
from dermray.evaluate.features import Features
from dermray.evaluate.predictions import OwnPredictions
from dermray.evaluate.predictors.contract import UNREADABLE
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import groups
from dermray.evaluate.statistics.bootstrap import Distribution, Metric, Seed, resample_weights
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.predict.zero_shot import classifier_weights

NOTHING_TO_ASK = "nothing to ask"
NOT_ASKED = -1
# Scores over the questions of some kinds: name → kinds.
PARTS: Mapping[str, tuple[str, ...]] = {
    "accuracy": KINDS,
    "condition_accuracy": ("condition",),
    "body_site_accuracy": ("body_site",),
    "modality_accuracy": ("modality",),
    "presence_accuracy": (PRESENT, ABSENT),
    "present_accuracy": (PRESENT,),
    "absent_accuracy": (ABSENT,),
}
NUM_EXAMPLES = 6
# Cosines that differ by no more are equal, as in retrieval.
TIE = 1e-12

# Of each sample: kind → the question, or why it is not asked.
Asked = list[dict[str, Question | str]]


class Vqa:
    """Asks every image what its sample answers, and ranks the answers' texts."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """The statements of all answers, each once."""
        asked = _ask(samples, config.seed)
        return list(
            dict.fromkeys(text for _, _, question in _questions(asked) for each in question.statements for text in each)
        )

    def run(self, context: Context) -> TaskResult:
        """Score every question of a readable image; what cannot be asked is counted by reason."""
        samples, features, config = context.samples, context.features, context.config
        asked = _ask(samples, config.seed)
        has_any = np.array([any(isinstance(each, Question) for each in kinds.values()) for kinds in asked], dtype=bool)
        kept = np.flatnonzero(has_any & features.usable)
        if len(kept) == 0:
            raise EvaluationError(
                f"no sample of the split {samples.split!r} has both something to ask (a label, a body site, a kind of "
                "picture, a mark) and a readable image"
            )
        scores, truth = _scores(asked, features, kept)
        predictions = OwnPredictions([samples.ids[row] for row in kept], scores, truth)
        found = self.distributions(predictions, bootstrap=config.bootstrap, seed=config.seed)
        metrics = {name: one.metric() for name, one in found.items()}
        rights = _rights(scores, truth)
        examples = _examples(samples, asked, kept, scores, config.seed)
        return TaskResult(
            metrics=metrics,
            headline=tuple(metrics)[:3],
            num_samples=len(kept),
            excluded={NOTHING_TO_ASK: int((~has_any).sum()), UNREADABLE: int((has_any & ~features.usable).sum())},
            details={
                "seed": config.seed,
                "num_questions": sum(int((one != NOT_ASKED).sum()) for one in truth.values()),
                "chance": _chances(scores, truth),
                "kinds": _kind_rows(asked, features.usable, scores, truth, metrics),
                "examples": examples,
                "groups": groups.breakdown(
                    samples.groups,
                    kept,
                    lambda rows, seed: _distributions(
                        {kind: each[rows] for kind, each in rights.items()}, ("accuracy",), config.bootstrap, seed
                    ),
                    min_size=config.min_group_size,
                    seed=config.seed,
                ),
            },
            pictures=frozenset(example["index"] for example in examples),
            predictions=predictions,
        )

    def distributions(self, predictions: OwnPredictions, *, bootstrap: int, seed: Seed) -> dict[str, Distribution]:
        """Scores by the names of `PARTS` that have questions; whole samples are resampled, all questions together."""
        return _distributions(_rights(predictions.predicted, predictions.truth), tuple(PARTS), bootstrap, seed)


def _ask(samples: Samples, seed: int) -> Asked:
    """What each sample is asked; the answers to choose from are those of the split, or the benchmark's classes."""
    facts, conditions = _facts(samples)
    asker = Asker(Pool.of(facts, conditions), samples.ontology, seed)
    return [asker.ask(each) for each in facts]


def _facts(samples: Samples) -> tuple[list[Facts], dict[str, str]]:
    """What the samples say, and class → its name; a sample counts with its most specific label, as in zero-shot."""
    classes = classes_of(samples) if any(samples.labels) else None
    nothing: list[str | None] = [None] * len(samples)
    texts = samples.all_texts()
    sites, modalities = (samples.groups.get(name, nothing) for name in ("body_site", "modality"))
    facts = [
        Facts(
            sample_id=samples.ids[row],
            condition=classes.labels[classes.targets[row]] if classes and classes.targets[row] >= 0 else None,
            labels=tuple(samples.labels[row]),
            concepts=plain_concepts(samples.concepts[row]),
            body_site=plain_site(sites[row]),
            modality=modalities[row],
            captions=texts[row],
        )
        for row in range(len(samples))
    ]
    return facts, dict(zip(classes.labels, classes.names, strict=True)) if classes else {}


def _questions(asked: Asked) -> Iterator[tuple[int, str, Question]]:
    for row, kinds in enumerate(asked):
        for kind, question in kinds.items():
            if isinstance(question, Question):
                yield row, kind, question


def _scores(asked: Asked, features: Features, kept: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Cosines of the answers, float64 `[N, 4]` by kind, NaN where there are fewer; and the right one, int64 `[N]`.

    Raises:
        EvaluationError: a cosine is not finite.
    """
    scores = {kind: np.full((len(kept), NUM_ANSWERS), np.nan) for kind in KINDS}
    truth = {kind: np.full(len(kept), NOT_ASKED, dtype=np.int64) for kind in KINDS}
    place_of = {row: place for place, row in enumerate(kept.tolist())}
    weights: dict[tuple[str, ...], np.ndarray] = {}
    for row, kind, question in _questions(asked):
        if row not in place_of:
            continue
        for statements in question.statements:
            if statements not in weights:
                vectors = torch.from_numpy(features.of_texts(statements))
                weights[statements] = classifier_weights(vectors[None].double())[0].numpy()
        cosines = np.stack([weights[statements] for statements in question.statements]) @ features.images[row]
        if not np.isfinite(cosines).all():
            raise EvaluationError("cosines of images and answers are not finite; look for NaN in the model's weights")
        scores[kind][place_of[row], : len(cosines)] = cosines
        truth[kind][place_of[row]] = question.answer
    return scores, truth


def _rights(scores: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """How right each answer is, float64 `[N]` by kind, NaN where nothing was asked.

    1 where the right answer scores highest; where it shares that with others, its expectation over their order.
    """
    found = {}
    for kind, right in truth.items():
        rows = np.flatnonzero(right != NOT_ASKED)
        best = scores[kind][rows] >= np.nanmax(scores[kind][rows], axis=1, keepdims=True, initial=-np.inf) - TIE
        values = np.full(len(right), np.nan)
        values[rows] = best[np.arange(len(rows)), right[rows]] / np.maximum(1, best.sum(axis=1))
        found[kind] = values
    return found


def _chances(scores: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What guessing scores, by the names of `PARTS`: the mean over questions of one in so many answers."""
    of_kind = {kind: 1.0 / (~np.isnan(scores[kind][right != NOT_ASKED])).sum(axis=1) for kind, right in truth.items()}
    parts = {name: np.concatenate([of_kind[kind] for kind in kinds]) for name, kinds in PARTS.items()}
    return {name: float(each.mean()) for name, each in parts.items() if len(each)}


def _distributions(
    rights: Mapping[str, np.ndarray], names: Sequence[str], bootstrap: int, seed: Seed
) -> dict[str, Distribution]:
    """The share of right answers of some of `PARTS`, of those that have questions."""
    sums = {
        name: np.stack(
            [
                np.sum([np.nan_to_num(rights[kind]) for kind in PARTS[name]], axis=0),
                np.sum([~np.isnan(rights[kind]) for kind in PARTS[name]], axis=0),
            ]
        )
        for name in names
    }
    # float64 [2, N]: right answers and questions of each sample
    sums = {name: each for name, each in sums.items() if each[1].any()}
    num_samples = len(next(iter(rights.values())))
    chunks: dict[str, list[np.ndarray]] = {name: [] for name in sums}
    for weights in resample_weights(np.zeros(num_samples, dtype=np.int64), bootstrap, seed):
        for name, each in sums.items():
            right, asked = each @ weights
            chunks[name].append(np.divide(right, asked, out=np.full(len(asked), np.nan), where=asked > 0))
    return {
        name: Distribution(float(each[0].sum() / each[1].sum()), np.concatenate(chunks[name] or [np.empty(0)]))
        for name, each in sums.items()
    }


def _kind_rows(
    asked: Asked,
    usable: np.ndarray,
    scores: Mapping[str, np.ndarray],
    truth: Mapping[str, np.ndarray],
    metrics: Mapping[str, Metric],
) -> list[dict[str, Any]]:
    """Kind by kind: questions, score, chance, and why others of the samples were not asked."""
    words, chances, rows = Templates.load().closed, _chances(scores, truth), []
    for kind in KINDS:
        reasons = Counter(
            UNREADABLE if not usable[row] else said
            for row, kinds in enumerate(asked)
            for said in [kinds[kind]]
            if not usable[row] or isinstance(said, str)
        )
        number, name = int((truth[kind] != NOT_ASKED).sum()), f"{kind}_accuracy"
        told = require_balance(f"questions of {kind}", len(asked), number, {str(key): reasons[key] for key in reasons})
        score = asdict(metrics[name]) if name in metrics else {"value": None, "low": None, "high": None}
        rows.append(
            {
                "kind": kind,
                "title": words[kind].title,
                "num_questions": number,
                **score,
                "chance": chances.get(name),
                "not_asked": told["told"],
            }
        )
    return rows


def _examples(
    samples: Samples, asked: Asked, kept: np.ndarray, scores: Mapping[str, np.ndarray], seed: int
) -> list[dict[str, Any]]:
    """A question of a few samples drawn at random, the kinds going round, with the model's answer."""
    examples: list[dict[str, Any]] = []
    for place in np.random.default_rng(seed).permutation(len(kept))[:NUM_EXAMPLES].tolist():
        row = int(kept[place])
        there = [kind for kind in KINDS if isinstance(asked[row][kind], Question)]
        kind = there[len(examples) % len(there)]
        question = asked[row][kind]
        assert isinstance(question, Question)
        given = int(np.nanargmax(scores[kind][place]))
        examples.append(
            {
                "index": row,
                "sample_id": samples.ids[row],
                "kind": kind,
                "question": question.text,
                "options": list(question.options),
                "answer": question.options[question.answer],
                "given": question.options[given],
            }
        )
    return examples


SCORER = Vqa()
