"""What the text given for a key means, by the type of the key, and what is said when it means nothing.

A key that holds text takes its text as it stands: `run_name=2026_11`, `input="W/clinic #1"`. YAML is read for numbers,
lists and sections only, and for whatever begins with `[` or `{` where a list or section is wanted. In a file, a text
that YAML would cut (`input: W/clinic #1`, `input: W/clinic # 1`) is refused; two blanks before the `#` and one behind
it make a comment.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from dermray import documents
from dermray.documents import Scalar
from dermray.errors import DocumentError

# Names that are alike to so many percent, letter by letter, are told: `max_batch` is like `max_batch_size`.
LIKENESS = 70
MAX_TOLD = 20


@dataclass(frozen=True, slots=True)
class Argument:
    """The text behind `key=` on a command line."""

    text: str

    @property
    def is_collection(self) -> bool:
        """Whether it begins like a list or a mapping of YAML."""
        return self.text.lstrip()[:1] in ("[", "{")


class Reader:
    """Gives every value of a tree the form that its key's type asks for; what cannot be read is in `problems`.

    `names` are the keys of all sections that were met, also of those whose type hangs on a value (an objective's).
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.names: dict[str, None] = {}

    def section(self, section: type[BaseModel], tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """The keys of a section; unknown ones come through as they are."""
        prepared = getattr(section, "prepared", None)
        found = dict(tree if prepared is None else prepared(tree, self))
        self.names |= {name: None for name, _ in described(section, where)}
        for name, value in found.items():
            field = section.model_fields.get(name)
            found[name] = self.read(Any if field is None else field.annotation, value, f"{where}{name}")
        return found

    def read(self, annotation: Any, value: Any, where: str) -> Any:
        """One value for a key of the type `annotation`; `where` is the key's name."""
        try:
            return self._read(_kinds(annotation), value, where)
        except DocumentError as error:
            self.problems.setdefault(where, str(error))
            return None

    def _read(self, kinds: list[Any], value: Any, where: str) -> Any:
        if isinstance(value, Argument):
            value = _parsed(kinds, value)
        if isinstance(value, Mapping):
            return self._mapping(kinds, value, where)
        if isinstance(value, list | tuple):
            return self._items(kinds, value, where)
        if isinstance(value, Scalar):
            return _spelled(kinds, value)
        if isinstance(value, bool | int | float) and _is_text(kinds):
            raise DocumentError(f"a text is wanted, got {value!r}; put it in quotes")
        return value

    def _mapping(self, kinds: list[Any], tree: Mapping[str, Any], where: str) -> dict[str, Any]:
        section = _section(kinds, tree)
        if section is not None:
            return self.section(section, tree, f"{where}.")
        of_values = next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), Any)
        return {key: self.read(of_values, value, f"{where}.{key}") for key, value in tree.items()}

    def _items(self, kinds: list[Any], values: Sequence[Any], where: str) -> list[Any]:
        arguments = next((typing.get_args(kind) for kind in kinds if _is_sequence(kind)), ())
        fixed = arguments and arguments[-1] is not Ellipsis and len(arguments) == len(values)
        of_items = arguments if fixed else [arguments[0] if arguments else Any] * len(values)
        return [
            self.read(kind, value, f"{where}.{at}")
            for at, (kind, value) in enumerate(zip(of_items, values, strict=True))
        ]


def annotation_of(section: type[BaseModel], key: str) -> Any:
    """The type of a dotted key; Any for one that there is not."""
    name, _, rest = key.partition(".")
    field = section.model_fields.get(name)
    if field is None:
        return Any
    if not rest:
        return field.annotation
    kinds = _kinds(field.annotation)
    below = _section(kinds, {})
    if below is not None:
        return annotation_of(below, rest)
    return next((typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict), Any)


def _kinds(annotation: Any) -> list[Any]:
    """The members of a union, without None and what annotates them."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in _kinds(member)]
    return [] if annotation is type(None) else [annotation]


def _is_sequence(kind: Any) -> bool:
    return typing.get_origin(kind) in (list, tuple)


def _words(kind: Any) -> tuple[str, ...]:
    """The texts of a Literal."""
    if typing.get_origin(kind) is not typing.Literal:
        return ()
    return tuple(value for value in typing.get_args(kind) if isinstance(value, str))


def _is_text(kinds: list[Any]) -> bool:
    return str in kinds or (bool(kinds) and all(_words(kind) for kind in kinds))


def _section(kinds: list[Any], tree: Mapping[str, Any]) -> type[BaseModel] | None:
    """The section among `kinds`; of several the one whose Literal the tree names."""
    sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if len(sections) > 1:
        said = {value for value in map(_text, tree.values()) if value is not None}
        for section in sections:
            if any(said & set(_words(field.annotation)) for field in section.model_fields.values()):
                return section
    return sections[0] if sections else None


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type is, if it is one."""
    return _section(_kinds(annotation), {})


def section_of_entries(annotation: Any) -> type[BaseModel] | None:
    """The section that the entries of a list are, where a key of this type may be such a list."""
    lists = [kind for kind in _kinds(annotation) if _is_sequence(kind)]
    return next((section_of(typing.get_args(kind)[0]) for kind in lists if typing.get_args(kind)), None)


def _text(value: Any) -> str | None:
    if isinstance(value, Scalar | Argument):
        return value.text
    return value if isinstance(value, str) else None


def _parsed(kinds: list[Any], given: Argument) -> Any:
    """A text from the command line: as it stands where text is wanted, else as YAML."""
    if not given.text:
        return None
    if _is_text(kinds) and not (given.is_collection and any(_takes_collection(kind) for kind in kinds)):
        return given.text
    try:
        found = documents.parse_yaml(given.text, "it")
    except DocumentError as error:
        raise DocumentError(f"cannot read the value {_short(given.text)}: {error}") from None
    # `a: b` and `- a` are no flow collections: a bare text that only looks like YAML.
    return found if given.is_collection or not isinstance(found, dict | list) else given.text


def _takes_collection(kind: Any) -> bool:
    return _is_sequence(kind) or typing.get_origin(kind) is dict or _section([kind], {}) is not None


def _spelled(kinds: list[Any], scalar: Scalar) -> Any:
    if isinstance(scalar.value, bool) and kinds and all(kind in (int, float) for kind in kinds):
        raise DocumentError(f"a number is wanted, got {_short(scalar.text)}")
    if _is_text(kinds):
        if scalar.comment and not any(scalar.text in _words(kind) for kind in kinds):
            raise DocumentError(
                f"{_short(scalar.text)} is followed by {_short(scalar.comment)}, which YAML takes for a comment: put "
                "the text in quotes if it belongs to it, else two blanks before the # and one behind it"
            )
        # In a file, `key:` and `key: ~` say that there is nothing.
        return None if scalar.value is None else scalar.text
    return scalar.text if any(scalar.text in _words(kind) for kind in kinds) else scalar.value


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def explain(names: Iterable[str], error: ValidationError | None, problems: Mapping[str, str]) -> str:
    """Everything that is wrong with the keys, in one line: unknown names first, each with the nearest right one.

    Args:
        names: of all keys.
        error: what validation said.
        problems: key → what is wrong with its value, from before.
    """
    known = list(names)
    unknown: dict[str, str] = {}
    others = {key: f"{key}: {problem}" for key, problem in problems.items()}
    for one in error.errors() if error is not None else ():
        key = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            unknown[key] = f"unknown key {key!r}{_suggestion(key, known)}"
        elif not any(key == told or key.startswith(f"{told}.") for told in problems):
            others.setdefault(_owner(key, known), _described(key, one))
    told = [*unknown.values(), *others.values()]
    more = [f"and {len(told) - MAX_TOLD} more"] if len(told) > MAX_TOLD else []
    hint = ["--help lists every key"] if unknown else []
    return "; ".join([*told[:MAX_TOLD], *more, *hint])


def _owner(key: str, names: Sequence[str]) -> str:
    """The key that an error belongs to: each member of a union has an error of its own."""
    return next((name for name in names if key == name or key.startswith(f"{name}.")), key)


def _described(key: str, one: Mapping[str, Any]) -> str:
    if one["type"] == "missing":
        return f"{key} is required: give {key}=..."
    if one["type"] == "value_error":
        reason = one["msg"].removeprefix("Value error, ")
        return f"{key}: {reason}" if key else reason
    return f"{key}: {one['msg'][0].lower()}{one['msg'][1:]}, got {_short_value(one['input'])}"


def _short_value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _suggestion(key: str, names: Sequence[str]) -> str:
    from rapidfuzz import fuzz, process

    # A section that is misspelt is like the section, not like one of its keys; a key may be given without its section.
    depth = key.count(".") + 1
    alike = {name.rpartition(".")[2]: name for name in reversed(names)} if depth == 1 else {}
    alike |= {part: part for name in names for part in (".".join(name.split(".")[:depth]), name)}
    match = process.extractOne(key, list(alike), scorer=fuzz.ratio, score_cutoff=LIKENESS)
    return f", did you mean {alike[match[0]]!r}?" if match else ""


def merged(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `update` over it, section by section."""
    found = dict(base)
    for key, value in update.items():
        old, new = _opened(found.get(key), value), _opened(value, found.get(key))
        both = isinstance(old, Mapping) and isinstance(new, Mapping)
        found[key] = merged(old, new) if both else value
    return found


def _opened(value: Any, other: Any) -> Any:
    """`{…}` from the command line as a mapping, where it meets one."""
    if isinstance(value, Argument) and value.is_collection and isinstance(other, Mapping | Argument):
        try:
            return documents.parse_yaml(value.text, "it")
        except DocumentError:
            return value
    return value


def described(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a section and of those below it, with its field."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from described(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field
