"""The one JSON parser and the one YAML parser: whatever the bytes are, they cost little and fail in one line.

Limits on size, depth, digits and number of values are looked at before anything is built from a document, so that
nested brackets, numbers of a million digits or aliases of aliases end in a `DocumentError` that names the document.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from dermray.errors import DocumentError

# A manifest of a million shards is smaller.
MAX_JSON_BYTES = 1 << 28
MAX_JSON_VALUES = 8_000_000
MAX_YAML_BYTES = 1 << 20
MAX_YAML_VALUES = 50_000
MAX_DEPTH = 64
# The state of a random generator has 39; no count or size that means anything has more.
MAX_DIGITS = 40

_NUMBER = re.compile(r"-?\d+")
# People write two blanks before the `#` of a comment, and one behind it.
_DOUBTFUL = re.compile(r"(?:[ \t](?![ \t])|[ \t]+(?=#[^\s#]))(#[^\r\n]*)")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+")
_FLOAT = re.compile(
    r"[-+]?(?:\d[\d_]*\.\d*|\.\d+)(?:[eE][-+]?\d{1,5})?|[-+]?\d+[eE][-+]?\d{1,5}"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TRUE = {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"}
_FALSE = {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"}
_NULL = {"", "~", "null", "Null", "NULL"}
_TAGS = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAGS}{name}" for name in ("int", "float", "bool", "null", "timestamp", "value")}
RecordT = TypeVar("RecordT")
_Loader = cast(type[yaml.SafeLoader], getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def parse_json(data: bytes | str, name: str, doubled: Counter[str] | None = None) -> Any:
    """The JSON document in `data`, UTF-8 with or without a byte order mark.

    Args:
        name: of the file or field, for messages.
        doubled: takes the keys that stand twice in one object, each with the number of such objects. The value that
            stands last is the one in the document.

    Raises:
        DocumentError: it is not JSON, or larger, deeper or longer in its numbers than a document of ours.
    """
    if len(data) > MAX_JSON_BYTES:
        raise DocumentError(f"{name} has {len(data):,} bytes, more than the {MAX_JSON_BYTES:,} of a JSON document")
    text = _decoded(data, name)
    if sum(map(text.count, ",[{:")) > 2 * MAX_JSON_VALUES:
        raise DocumentError(f"{name} holds more than {MAX_JSON_VALUES:,} values")
    try:
        hook = None if doubled is None else _noting(doubled)
        document = json.loads(text, parse_int=_integer, object_pairs_hook=hook)
    except RecursionError:
        raise DocumentError(f"{name} is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise DocumentError(f"{name} is not valid JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(document):
        raise DocumentError(f"{name} is nested deeper than {MAX_DEPTH} levels")
    if _HALF.search(text):
        _check_text(json.dumps(document, ensure_ascii=False), name)
    return document


def _noting(doubled: Counter[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Makes objects of their pairs, and notes the keys that stand twice."""

    def built(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            doubled.update(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        return found

    return built


def _decoded(data: bytes | str, name: str) -> str:
    if isinstance(data, str):
        return data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{name} is not UTF-8 text: {error}") from None


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _is_deep(document: Any) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DocumentError(f"{name} holds half of a surrogate pair, which is no text") from None


def json_text(document: Any) -> str:
    """A JSON document as it is written to files."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def as_object(document: Any, name: str) -> dict[str, Any]:
    """A document that is an object.

    Raises:
        DocumentError: it is a list, a text, a number or nothing.
    """
    if not isinstance(document, dict):
        raise DocumentError(f"{name} should hold a JSON object, and holds a {type(document).__name__}")
    return document


def as_record(kind: TypeAdapter[RecordT], document: Any, name: str, advice: str) -> RecordT:
    """A document as what it should be.

    Args:
        kind: of a dataclass or another type that pydantic knows.
        name: of the file, for messages.
        advice: what to do about one that is something else.

    Raises:
        DocumentError: a field is missing or of another type; names the first.
    """
    try:
        return kind.validate_python(document)
    except ValidationError as error:
        raise DocumentError(f"{name} is damaged ({first_fault(error)}); {advice}") from None


def first_fault(error: ValidationError) -> str:
    """The first field that pydantic found wrong, and why, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return " ".join(f"{place}: {first['msg']}".removeprefix(": ").split())


@dataclass(frozen=True, slots=True)
class Scalar:
    """A YAML value as it was spelled, without quotes around it: `0042`, `1.10`, `no`, `2026-02-30`.

    `comment` is what stands behind it on its line, `#` included, where that may belong to the text: `#1` in `clinic #1`
    and `# 1` in `clinic # 1`, but not `# of 2026` behind two blanks.
    """

    text: str
    comment: str = field(default="", compare=False)

    @property
    def value(self) -> Any:
        """None, a bool, a number, or the text itself where it is none of them; no date, no base of sixty.

        Raises:
            DocumentError: a number of more than `MAX_DIGITS` digits.
        """
        if self.text in _NULL:
            return None
        if self.text in _TRUE or self.text in _FALSE:
            return self.text in _TRUE
        is_integer = _INTEGER.fullmatch(self.text)
        if (is_integer or _FLOAT.fullmatch(self.text)) and len(self.text) > MAX_DIGITS:
            raise DocumentError(f"{self.text[:12]}… is a number of {len(self.text):,} digits")
        if is_integer:
            return int(self.text.replace("_", ""), 0)
        if _FLOAT.fullmatch(self.text):
            return float(re.sub(r"\.(?=inf|nan)", "", self.text.replace("_", "").lower()))
        return self.text


def parse_yaml(data: bytes | str, name: str) -> Any:
    """The YAML document in `data` as dicts with text keys, lists, texts (from quotes) and `Scalar`s.

    Raises:
        DocumentError: it is not YAML, names a key twice, uses tags, or is larger, deeper or more repetitive (aliases)
            than a file of settings.
    """
    if len(data) > MAX_YAML_BYTES:
        raise DocumentError(f"{name} has {len(data):,} bytes, more than the {MAX_YAML_BYTES:,} of a YAML document")
    text = _decoded(data, name)
    try:
        _check_events(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        document = None if node is None else _built(loader, node, text)
    except DocumentError as error:
        raise DocumentError(f"{name} {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    return document


def plain(tree: Any) -> Any:
    """A tree of `parse_yaml` with the value of each `Scalar`."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [plain(value) for value in tree]
    return tree.value if isinstance(tree, Scalar) else tree


@dataclass(slots=True)
class _Open:
    """A collection whose end has not come: its anchor, and the size and depth of what was in it so far."""

    anchor: str | None
    num_values: int = 1
    depth: int = 1


def _check_events(text: str) -> None:
    """Refuse what would be too deep or too large once every alias stands for what it names."""
    sizes: dict[str, tuple[int, int]] = {}
    open_ones = [_Open(None)]
    for event in cast(Iterator[Any], yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            open_ones.append(_Open(event.anchor))
        elif isinstance(event, yaml.ScalarEvent):
            _add(open_ones[-1], 1, 0)
            if event.anchor:
                sizes[event.anchor] = (1, 0)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise DocumentError(f"uses the alias *{event.anchor} before what it names is complete")
            _add(open_ones[-1], *sizes[event.anchor])
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            done = open_ones.pop()
            if done.anchor:
                sizes[done.anchor] = (done.num_values, done.depth)
            _add(open_ones[-1], done.num_values, done.depth)
        if len(open_ones) + open_ones[-1].depth > MAX_DEPTH + 2:
            raise DocumentError(f"is nested deeper than {MAX_DEPTH} levels")


def _add(parent: _Open, num_values: int, depth: int) -> None:
    parent.num_values += num_values
    parent.depth = max(parent.depth, depth + 1)
    if parent.num_values > MAX_YAML_VALUES:
        raise DocumentError(f"holds more than {MAX_YAML_VALUES:,} values")


def _built(loader: yaml.SafeLoader, node: yaml.Node, text: str) -> Any:
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAGS}seq":
        return [_built(loader, child, text) for child in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAGS}map":
        return _mapping(loader, node, text)
    if isinstance(node, yaml.ScalarNode):
        if node.tag == f"{_TAGS}str" and node.style:
            _check_text(node.value, "")
            return node.value
        if node.tag in _PLAIN_TAGS or node.tag == f"{_TAGS}str":
            behind = _DOUBTFUL.match(text, node.end_mark.index)
            return Scalar(node.value, behind[1] if behind else "")
    raise DocumentError(f"uses the tag {node.tag.replace(_TAGS, '!!')!r}, which is not read{_place(node)}")


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, text: str) -> dict[str, Any]:
    own = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    if len(set(own)) < len(own):
        twice = next(name for name in own if own.count(name) > 1)
        raise DocumentError(f"names the key {twice!r} twice{_place(node)}")
    # `<<: *other` is what stands before the keys of the mapping itself.
    loader.flatten_mapping(node)
    found = {}
    for key, value in cast(Sequence[tuple[yaml.Node, yaml.Node]], node.value):
        if not isinstance(key, yaml.ScalarNode):
            raise DocumentError(f"has a key that is no text{_place(key)}")
        found[key.value] = _built(loader, value, text)
    return found


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})" if node.start_mark is not None else ""
