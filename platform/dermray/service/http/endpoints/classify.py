"""`/v1/classify`: zero-shot ranking of classes, which are texts, for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermray.corpus import spelling
from dermray.corpus.ontology import Ontology, display_names
from dermray.errors import ConfigError
from dermray.evaluate import benchmarks
from dermray.predict import roll_up
from dermray.service.engine.verbs.classify import CLASSIFY, Classified, check_cost
from dermray.service.fleet.catalogue import Served
from dermray.service.http.asking import ImageEndpoint
from dermray.service.http.payload import check_text
from dermray.service.http.schemas import EXAMPLE_IMAGE, ImageRequest, ModelIdentity, Texts
from dermray.service.refusals import Refusal
from dermray.service.settings import LimitsConfig

# No class is written in so many letters and also in another spelling: a longer one is compared as it stands.
FOLDED_CHARS = 128


class ClassifyRequest(ImageRequest):
    """One image and the classes to rank for it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"image": EXAMPLE_IMAGE, "labels": ["melanoma", "melanocytic nevus", "basal cell carcinoma"]},
                {"image": EXAMPLE_IMAGE, "benchmark": "derm1m/ham10000"},
            ]
        }
    )

    labels: Texts | None = Field(None, description="classes to rank; empty: the model's own list")
    benchmark: str | None = Field(
        None, description="rank the classes of this published benchmark, by its prompts if it has any"
    )
    ontology: str | None = Field(
        None, description="rank the leaves below this node of the served ontology, instead of labels"
    )
    templates: Texts | None = Field(None, description="prompts with {} for the class; empty: the published eight")


class RankedLabel(BaseModel):
    """One candidate class. Probabilities of a ranking sum to 1 over the classes that were asked about."""

    label: str
    probability: Annotated[float, Field(ge=0, le=1)]
    logit: float = Field(description="the model's logit scale times the cosine of image and class")
    path: Texts | None = Field(
        None, description="what is above the class on all its paths in the served ontology, and its node last"
    )


class RolledUpNode(BaseModel):
    """A node above ranked classes, with the sum of their probabilities."""

    node: str
    level: int = Field(description="1 right under the root")
    path: list[str]
    probability: Annotated[float, Field(ge=0, le=1)]


class ClassifyResponse(BaseModel):
    """Classes, most probable first, and the same rolled up the disease tree."""

    object: Literal["classification"] = "classification"
    ranking: list[RankedLabel]
    hierarchy: list[RolledUpNode] = Field(description="upper levels first; empty when no ontology knows the classes")
    model: str
    model_info: ModelIdentity
    logit_scale: float


def choose_labels(
    request: ClassifyRequest, own_classes: Sequence[str], ontology: Ontology | None, limits: LimitsConfig
) -> tuple[str, ...]:
    """The classes to rank: those given, a benchmark's, the leaves below an ontology node, or the model's own.

    Raises:
        Refusal: 400 when there are none, too many, too long, a blank or a repeated one, an unknown node or benchmark.
    """
    given = [name for name in ("labels", "benchmark", "ontology") if getattr(request, name) is not None]
    if len(given) > 1:
        raise Refusal(400, f"send {' or '.join(given)}, not both", code="conflict", param=given[1])
    if request.labels is not None:
        own = tuple(own_classes)
        return own if tuple(request.labels) == own else _check_labels(request.labels, request.templates, limits)
    if request.benchmark is not None:
        return _benchmark(request.benchmark).classes
    if request.ontology is not None:
        return _leaves_below(request.ontology, ontology, limits)
    if not own_classes:
        raise Refusal(400, "this model has no class list of its own: send labels", code="no_labels", param="labels")
    return tuple(own_classes)


def choose_templates(request: ClassifyRequest, limits: LimitsConfig) -> tuple[str, ...] | None:
    """The prompt templates of a request, else its benchmark's; None leaves the choice to the model.

    Raises:
        Refusal: 400.
    """
    if request.templates is None and request.benchmark is not None:
        return _benchmark(request.benchmark).templates or None
    return check_templates(request.templates, limits)


def check_templates(given: Sequence[str] | None, limits: LimitsConfig) -> tuple[str, ...] | None:
    """The prompt templates of a request; None leaves the choice to the model.

    Raises:
        Refusal: 400 when one has no place for the class, or there are none or too many.
    """
    if given is None:
        return None
    if not given or len(given) > limits.templates:
        message = f"templates: send 1 to {limits.templates}, got {len(given)}"
        raise Refusal(400, message, code="invalid_templates", param="templates")
    for index, template in enumerate(given):
        param = f"templates.{index}"
        check_text(template, param, limits)
        if template.count("{}") != 1 or template.replace("{}", "").count("{") + template.replace("{}", "").count("}"):
            message = f"{param}: write {{}} exactly once, where the class goes, and no other brace"
            raise Refusal(400, message, code="invalid_templates", param=param)
    return tuple(given)


def _check_labels(labels: Sequence[str], templates: Sequence[str] | None, limits: LimitsConfig) -> tuple[str, ...]:
    if not labels:
        raise Refusal(400, "labels: send at least one class", code="no_labels", param="labels")
    _check_count(len(labels), "labels", limits)
    if templates is None or len(templates) <= limits.templates:
        # Without templates the model has at least one of its own, of which the encoder knows more.
        check_cost(labels, templates or ("",), limits)
    names = [label.strip() for label in labels]
    for index, name in enumerate(names):
        check_text(name, f"labels.{index}", limits)
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        # One class for all ways to spell it, as in a corpus.
        folded = spelling.spelling(spelling.key(name)) if len(name) <= FOLDED_CHARS else ""
        first = seen.setdefault(folded or name, index)
        if first != index:
            other = "" if names[first] == name else f", before as {names[first][:80]!r}"
            message = f"labels.{index}: {name[:80]!r} is listed twice{other}"
            raise Refusal(400, message, code="duplicate_label", param=f"labels.{index}")
    return tuple(names)


def _leaves_below(text: str, ontology: Ontology | None, limits: LimitsConfig) -> tuple[str, ...]:
    if ontology is None:
        raise Refusal(400, "no ontology is served here: send labels", code="no_ontology", param="ontology")
    check_text(text, "ontology", limits)
    node = ontology.resolve(text)
    if node is None:
        message = f"ontology: {text[:80]!r} is not a node of the served ontology"
        raise Refusal(400, message, code="unknown_node", param="ontology")
    leaves = set(ontology.leaves())
    below = [name for name in (node, *ontology.descendants(node)) if name in leaves]
    if not below:
        message = f"ontology: every leaf that may be below {node[:80]!r} may be elsewhere too: send labels"
        raise Refusal(400, message, code="no_labels", param="ontology")
    _check_count(len(below), "ontology", limits)
    return display_names(below)


def _benchmark(name: str) -> benchmarks.Benchmark:
    try:
        found = benchmarks.load(name).benchmarks
    except ConfigError:
        found = ()
    if len(found) != 1 or not found[0].classes:
        known = [one for one in benchmarks.names() if "/" in one and benchmarks.load(one).benchmarks[0].classes]
        message = f"benchmark: {name[:80]!r} has no class list here; there are: {', '.join(known)}"
        message = message.encode("utf-8", "replace").decode()
        raise Refusal(400, message, code="unknown_benchmark", param="benchmark")
    return found[0]


def _check_count(count: int, param: str, limits: LimitsConfig) -> None:
    if count > limits.labels:
        message = f"{param}: {count:,} classes; the limit is {limits.labels:,}"
        raise Refusal(400, message, code="too_many_labels", param=param)


def _question(body: ClassifyRequest, served: Served, limits: LimitsConfig) -> tuple[Any, ...]:
    labels = choose_labels(body, served.model.classes, served.ontology, limits)
    return labels, choose_templates(body, limits)


def _content(said: Classified, served: Served) -> dict[str, Any]:
    """A ranking as it is answered, with what the tree says of its classes."""
    tree = served.ontology
    return {
        "object": "classification",
        "ranking": [
            {"label": one.label, "probability": one.probability, "logit": one.logit, "path": _path(tree, one.label)}
            for one in said.ranking
        ],
        "hierarchy": [asdict(node) for node in roll_up(said.ranking, tree)] if tree is not None else [],
        "logit_scale": served.model.logit_scale,
    }


def _path(ontology: Ontology | None, label: str) -> list[str] | None:
    node = ontology.resolve(label) if ontology is not None else None
    return ontology.path(node) if ontology is not None and node is not None else None


router = ImageEndpoint(
    name="classify",
    summary="Rank classes for one image",
    description="Zero-shot: the classes are texts. JSON with a data URI, or multipart with a file.",
    verb=CLASSIFY,
    request=ClassifyRequest,
    response=ClassifyResponse,
    question=_question,
    content=_content,
).router()
