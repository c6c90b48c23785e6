"""One way to configure everything: typed models, a YAML file, `key=value` overrides.

Each stage declares its keys as a `Config` next to the code that obeys them; an entry point calls `load` with
that class and the command line. Precedence, low to high: defaults, the `--config` file, overrides.
"""

from __future__ import annotations

import os
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticUndefined

from dermray import storage
from dermray.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration section: unknown keys are errors, values are frozen after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, validate_default=True)

    _files: tuple[str, ...] = PrivateAttr(())

    @property
    def files(self) -> tuple[str, ...]:
        """The `--config` files that it was read from, by absolute path."""
        return self._files

    def __eq__(self, other: object) -> bool:
        """Equal values are equal, whichever files they were read from."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def to_yaml(self) -> str:
        """The resolved tree as YAML that `--config` accepts."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _absolute(uri: str) -> str:
    if not uri:
        raise ValueError("must not be blank")
    return storage.normalise(uri)


# A file or folder. Of a local one the path becomes absolute, since Ray's workers change directory.
Uri = Annotated[str, AfterValidator(_absolute)]


class TrackingConfig(Config):
    """Where MLflow keeps runs, artifacts and the registry."""

    uri: str | None = Field(
        None, description="MLflow tracking URI; empty: $MLFLOW_TRACKING_URI, else SQLite in ./mlflow.db"
    )
    experiment: str = Field("dermray", description="MLflow experiment name")
    enabled: bool = Field(True, description="false: this run leaves no trace in MLflow")
    spool: str | None = Field(
        None,
        description="local folder for what MLflow did not take yet; empty: $DERMRAY_SPOOL, else ~/.cache/dermray/spool",
    )
    system_metrics_interval_s: float = Field(
        10.0, ge=0, description="seconds between readings of the driver's processor, memory, disk, network; 0: none"
    )


class ClusterConfig(Config):
    """Which Ray cluster does the work."""

    address: str | None = Field(
        None, description="Ray address to join; empty: $RAY_ADDRESS, else a cluster of this machine's own"
    )
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of an own cluster; empty: twice the cores, since tasks wait for input"
    )
    log_to_driver: bool = Field(False, description="true: show what Ray workers print (always in Ray's own log files)")


ConfigT = TypeVar("ConfigT", bound=Config)


def load(config_class: type[ConfigT], argv: Sequence[str] | None = None, *, prog: str, description: str) -> ConfigT:
    """Build `config_class` from a command line, answering `--help` and `--print-config` itself.

    On a bad key, value or file it prints one line that names it and exits with code 2, so call it before
    anything expensive starts.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(config_class, prog=prog, description=description))
        sys.exit(0)
    print_config = "--print-config" in arguments
    try:
        config = parse(config_class, [a for a in arguments if a != "--print-config"])
    except ConfigError as error:
        refuse(prog, error)
    if print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def refuse(prog: str, error: ConfigError) -> NoReturn:
    """Print a configuration error as one line and exit with its code."""
    print(f"{prog}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def parse(config_class: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    """`[--config FILE] [key=value …]` → a validated config.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing file or a malformed argument, by name.
    """
    tree: dict[str, Any] = {}
    files: list[str] = []
    overrides: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config" or argument.startswith("--config="):
            file = argument.partition("=")[2] or next(pending, "")
            tree = _merge(tree, read_yaml(file))
            files.append(os.path.abspath(file))
        elif "=" in argument and not argument.startswith("-"):
            overrides.append(argument)
        else:
            raise ConfigError(
                f"cannot read the argument {argument!r}: write key=value, or see --help for what there is"
            )
    for override in overrides:
        key, _, text = override.partition("=")
        tree = _merge(tree, _nest(key, _parse_value(key, text)))
    config = validate(config_class, tree)
    config._files = tuple(files)
    return config


def validate(config_class: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """Validate a nested mapping; the first error becomes a one-line `ConfigError` that names its key."""
    try:
        return config_class.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_explain(config_class, error)) from None


def read_yaml(file: str) -> dict[str, Any]:
    """Read a YAML mapping from a local file.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping at the top.
    """
    if not file:
        raise ConfigError("--config needs a file: --config FILE.yaml")
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {file!r} does not exist (looked in {os.getcwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file!r} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {file!r} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {file!r} must hold key: value pairs at its top level")
    return content


def help_text(config_class: type[Config], *, prog: str, description: str) -> str:
    """Every key with its type, default and one line of explanation."""
    rows = list(_describe(config_class, ""))
    width = min(max(len(key) + len(kind) for key, kind, _, _ in rows) + 3, 58)
    lines = [
        f"usage: python {prog} [--config FILE.yaml] [key=value ...] [--print-config] [--help]",
        "",
        description,
        "",
        "keys (dots reach into sections; defaults in brackets):",
    ]
    for key, kind, default, text in rows:
        lines.append(f"  {f'{key} ({kind})':<{width}} {text} [{default}]")
    return "\n".join(lines)


def _describe(config_class: type[Config], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in config_class.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            yield from _describe(section, f"{prefix}{name}.")
            continue
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "required" if value is PydanticUndefined else _show(value)
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""


def _section_of(annotation: Any) -> type[Config] | None:
    """The config class of a nested section, also when it is optional."""
    candidates = typing.get_args(annotation) or (annotation,)
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin is not None:
        inner = ", ".join("..." if a is Ellipsis else _type_name(a) for a in arguments)
        return f"{origin.__name__}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def _show(value: Any) -> str:
    if value is None:
        return "empty"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def _parse_value(key: str, text: str) -> Any:
    """A YAML scalar or flow collection; whatever else YAML would see in a bare text (`a: b`, a date) stays text."""
    if not text:
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: cannot read the value {text!r}; quote it as YAML") from None
    if value is None or isinstance(value, bool | int | float | str) or text.lstrip()[0] in "[{":
        return value
    return text


def _nest(key: str, value: Any) -> dict[str, Any]:
    parts = key.split(".")
    if not all(parts):
        raise ConfigError(f"{key!r} is not a key: write section.name=value")
    for part in reversed(parts):
        value = {part: value}
    return value


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(config_class: type[Config], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_suggest(config_class, key)}{more}; --help lists every key"
    if first["type"] == "missing":
        return f"{key} is required: give {key}=...{more}"
    reason = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "value_error":
        reason = first["msg"].removeprefix("Value error, ")
        return f"{key}: {reason}{more}" if key else f"{reason}{more}"
    return f"{key}: {reason}, got {first['input']!r}{more}"


def _suggest(config_class: type[Config], key: str) -> str:
    from rapidfuzz import process

    names = [name for name, _, _, _ in _describe(config_class, "")]
    match = process.extractOne(key, names, score_cutoff=70)
    return f", did you mean {match[0]!r}?" if match else ""
