"""From a request's fields to what the backend is asked: data URIs, class lists, limits. No Ray, no torch."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermray.corpus import spelling
from dermray.corpus.ontology import Ontology, display_names
from dermray.errors import ConfigError
from dermray.evaluate import benchmarks
from dermray.service.http import stray_images
from dermray.service.http.schemas import ClassifyRequest, EmbeddingsRequest
from dermray.service.refusals import Refusal, too_large
from dermray.service.settings import LimitsConfig
from dermray.serving import concept_names, num_prompts
from dermray.serving.classifier import PROMPT_CHARS

IMAGE_PREFIX = "data:image/"
# No class is written in so many letters and also in another spelling: a longer one is compared as it stands.
FOLDED_CHARS = 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of an embeddings request by kind; `order` holds (is image, position in its kind) per input."""

    images: list[bytes]
    texts: list[str]
    order: list[tuple[bool, int]]


def decode_data_uri(text: str, param: str) -> bytes:
    """The bytes of `data:image/…;base64,…`. What they hold is the decoder's business.

    Raises:
        Refusal: 400 when it is a link, a path, another kind of data URI, or not base64.
    """
    head, comma, payload = text.partition(",")
    if not comma or not head.lower().startswith(IMAGE_PREFIX) or not head.lower().endswith(";base64"):
        stray_images.refuse_as_image(text, param)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(
            400, f"{param}: what follows base64, is not valid base64", code="invalid_base64", param=param
        ) from None


def split_inputs(request: EmbeddingsRequest, limits: LimitsConfig) -> Inputs:
    """Tell images from texts and check each.

    Raises:
        Refusal: 400 or 413, naming the input at fault.
    """
    values = [request.input] if isinstance(request.input, str) else request.input
    if not values:
        raise Refusal(400, "input: send at least one text or image", code="empty_input", param="input")
    if len(values) > limits.items:
        raise too_large(f"input: {len(values)} items in one request", f"{limits.items} items")
    inputs = Inputs([], [], [])
    for index, value in enumerate(values):
        param = "input" if isinstance(request.input, str) else f"input.{index}"
        is_image = request.modality == "image" or (
            request.modality is None and value[: len(IMAGE_PREFIX)].lower() == IMAGE_PREFIX
        )
        if is_image:
            inputs.order.append((True, len(inputs.images)))
            inputs.images.append(decode_data_uri(value, param))
        else:
            if request.modality is None:
                stray_images.refuse(value, param)
            check_text(value, param, limits)
            inputs.order.append((False, len(inputs.texts)))
            inputs.texts.append(value)
    return inputs


def check_text(text: str, param: str, limits: LimitsConfig) -> None:
    """A text that says something and is not too long.

    Raises:
        Refusal: 400.
    """
    if not text.strip():
        raise Refusal(400, f"{param}: the text is empty", code="empty_input", param=param)
    if len(text) > limits.text_chars:
        message = f"{param}: {len(text):,} characters; the limit is {limits.text_chars:,}"
        raise Refusal(400, message, code="text_too_long", param=param)
    if not is_unicode(text):
        message = f"{param}: the text has half a surrogate pair; send whole Unicode characters"
        raise Refusal(400, message, code="invalid_text", param=param)


def check_query(text: str, limits: LimitsConfig) -> None:
    """A text to search for.

    Raises:
        Refusal: 400, as `check_text`, and for an image in another dress.
    """
    stray_images.refuse(text, "query", advice="into the field image")
    check_text(text, "query", limits)


def is_unicode(text: str) -> bool:
    """False for a text that JSON escapes can make and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def choose_concepts(given: Sequence[str] | None) -> tuple[str, ...]:
    """The concepts to score, in the published spelling; all that have terms when none are given.

    Raises:
        Refusal: 400 for an unknown, repeated or missing one.
    """
    known = concept_names()
    if given is None:
        return known
    names = [name.strip().lower().replace("_", " ") for name in given]
    if not names:
        raise Refusal(400, "concepts: send at least one concept", code="empty_input", param="concepts")
    for index, name in enumerate(names):
        param = f"concepts.{index}"
        if name not in known:
            message = f"{param}: {name[:80]!r} has no published terms; there are: {', '.join(known)}"
            raise Refusal(400, message.encode("utf-8", "replace").decode(), code="unknown_concept", param=param)
        if name in names[:index]:
            raise Refusal(400, f"{param}: {name!r} is listed twice", code="duplicate_label", param=param)
    return tuple(names)


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


def encode_vector(vector: np.ndarray, encoding_format: str | None) -> list[float] | str:
    """A vector as JSON numbers, or as the base64 of its little-endian float32 bytes."""
    if encoding_format == "base64":
        return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")
    return [float(value) for value in vector]


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
