"""Which of these classes does an image show? The classes are texts, and their classifier is built once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dermray.predict import RankedClass, num_prompts, rank
from dermray.predict.classifier import PROMPT_CHARS
from dermray.service.engine.answers import Rejection, Timing
from dermray.service.engine.verb import Verb
from dermray.service.engine.verbs.embed import embed
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig

if TYPE_CHECKING:
    from dermray.service.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Classified:
    """The ranking of one image, most probable class first; or why the image was rejected."""

    ranking: tuple[RankedClass, ...]
    timing: Timing
    rejection: Rejection | None = None


async def classify(engine: Engine, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> Classified:
    """Rank `labels` for one encoded image by the text classifier that `templates` make of them.

    Without templates the published ones are used.
    """
    embedded = await embed(engine, [image], [])
    if embedded.rejections:
        return Classified((), embedded.timing, embedded.rejections[0])
    chosen = tuple(templates or engine.templates)
    weights, timing = await engine.table(labels, chosen, engine.classifier_of(chosen), embedded.timing)
    return Classified(tuple(rank(embedded.images[0], weights, labels, engine.encoder.logit_scale)), timing)


def check_cost(labels: Sequence[str], templates: Sequence[str], limits: LimitsConfig) -> None:
    """Refuse a class list whose classifier takes more than `limits.prompts`, by the lengths of its texts alone.

    Raises:
        Refusal: 400.
    """
    cost = num_prompts(labels, templates)
    if cost > limits.prompts:
        message = (
            f"labels: {len(labels):,} classes in {len(templates)} templates make {cost:,} prompts, each counted once "
            f"for every {PROMPT_CHARS} characters begun; the limit is {limits.prompts:,}"
        )
        raise Refusal(400, message, code="too_many_prompts", param="labels")


def _check(engine: Engine, image: bytes, labels: Sequence[str], templates: Sequence[str] | None) -> None:
    # The model's own list has its classifier from the start.
    if templates is not None or tuple(labels) != engine.model.classes:
        check_cost(labels, tuple(templates or engine.templates), engine.limits)


CLASSIFY = Verb(classify, needs=("images", "texts"), check=_check)
