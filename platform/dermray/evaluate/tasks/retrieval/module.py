"""Retrieval scored: recall, mean and median rank in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dermray.errors import EvaluationError
from dermray.evaluate.predictions import RetrievalPredictions
from dermray.evaluate.retrieval import DEFAULT_KS, group_scores, score_ranks
from dermray.evaluate.samples import Samples
from dermray.evaluate.settings import EvaluateConfig
from dermray.evaluate.statistics import groups
from dermray.evaluate.statistics.bootstrap import Metric
from dermray.evaluate.statistics.ranks import pair_ranks
from dermray.evaluate.tasks.contract import Context, TaskResult
from dermray.scales import RETRIEVAL_WAYS

NUM_EXAMPLES = 6
NUM_NEAREST = 5


class Retrieval:
    """Finds an image's raw caption among all captions, and a caption's image among all images."""

    page = Path(__file__).with_name("page.html").read_text("utf-8")

    def texts(self, samples: Samples, config: EvaluateConfig) -> list[str]:
        """The raw captions."""
        return [caption for caption in samples.captions if caption is not None]

    def run(self, context: Context) -> TaskResult:
        """Score every sample that has a raw caption and an image."""
        samples, features, config = context.samples, context.features, context.config
        captioned = np.array([caption is not None for caption in samples.captions])
        kept = np.flatnonzero(captioned & features.usable)
        if len(kept) == 0:
            raise EvaluationError(
                f"no sample of the split {samples.split!r} has both a raw caption and a readable image"
            )
        captions = [samples.captions[index] or "" for index in kept]
        images, texts = features.images[kept], features.of_texts(captions)
        both_ways = dict(zip(RETRIEVAL_WAYS, pair_ranks(images, texts), strict=True))
        examples = _examples(samples, kept, images, texts, captions, config.seed)
        scores: dict[str, Metric] = {}
        for direction, ranks in both_ways.items():
            scores |= score_ranks(ranks, direction, DEFAULT_KS, bootstrap=config.bootstrap, seed=config.seed)
        return TaskResult(
            metrics=scores,
            headline=("image_to_text_R@1", "image_to_text_R@5", "image_to_text_R@10"),
            num_samples=len(kept),
            excluded={
                "without a raw caption": int((~captioned).sum()),
                "image not readable": int((captioned & ~features.usable).sum()),
            },
            details={
                "ks": list(DEFAULT_KS),
                "chance": {f"R@{k}": min(1.0, k / len(kept)) for k in DEFAULT_KS},
                "num_distinct_captions": len(set(captions)),
                "ties": "expected value over random order of equal scores",
                "examples": examples,
                "groups": groups.breakdown(
                    samples.groups,
                    kept,
                    lambda rows, seed: group_scores(both_ways, rows, bootstrap=config.bootstrap, seed=seed),
                    min_size=config.min_group_size,
                    seed=config.seed,
                ),
            },
            pictures=frozenset(_shown(examples)),
            predictions=RetrievalPredictions(
                [samples.ids[index] for index in kept],
                *(part for ranks in both_ways.values() for part in (ranks.higher, ranks.tied)),
            ),
        )


def _examples(
    samples: Samples,
    kept: np.ndarray,
    images: np.ndarray,
    texts: np.ndarray,
    captions: list[str],
    seed: int,
) -> list[dict[str, Any]]:
    """A few queries drawn at random, with the captions nearest to the image and the images nearest to the caption."""
    queries = np.random.default_rng(seed).permutation(len(kept))[:NUM_EXAMPLES]
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    distinct = np.array(sorted(first.values()))
    examples = []
    for query in sorted(int(one) for one in queries):
        to_text = texts[distinct] @ images[query]
        to_image = images @ texts[query]
        nearest_texts = distinct[np.argsort(-to_text, kind="stable")[:NUM_NEAREST]]
        nearest_images = np.argsort(-to_image, kind="stable")[:NUM_NEAREST]
        examples.append(
            {
                "index": int(kept[query]),
                "sample_id": samples.ids[kept[query]],
                "caption": captions[query],
                "captions": [
                    {"text": captions[row], "is_own": captions[row] == captions[query]} for row in nearest_texts
                ],
                "images": [
                    {"index": int(kept[row]), "is_own": bool(captions[row] == captions[query])}
                    for row in nearest_images
                ],
            }
        )
    return examples


def _shown(examples: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Samples whose pictures stand beside the examples."""
    for query in examples:
        yield query["index"]
        yield from (one["index"] for one in query["images"])


SCORER = Retrieval()
