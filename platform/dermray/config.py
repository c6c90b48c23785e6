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
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticUndefined

from dermray import documents, keys, redaction, storage
from dermray.documents import Scalar
from dermray.errors import ConfigError, DocumentError
from dermray.keys import Argument, Reader


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
        """The resolved tree as YAML that `--config` accepts; secrets are hidden in it."""
        return yaml.safe_dump(self.recorded(), sort_keys=False, allow_unicode=True)

    def recorded(self, **selection: Any) -> dict[str, Any]:
        """The tree as JSON values for records and reports, with secrets hidden.

        Args:
            selection: `include` and `exclude`, as `model_dump` takes them.
        """
        return cast(dict[str, Any], redaction.hidden(self.model_dump(mode="json", **selection)))

    @classmethod
    def prepared(cls, tree: Mapping[str, Any], reader: Reader) -> Mapping[str, Any]:
        """The section as it was given, before its values are read; a section may read some by types of its own."""
        return tree


def absolute(uri: str) -> str:
    """A URI as `Uri` has it; ValueError says what is wrong with one that no file or folder can have."""
    if not uri:
        raise ValueError("must not be blank")
    if redaction.holds_credentials(uri):
        raise ValueError("must hold no user, password or signature; credentials come from the environment")
    return storage.normalise(uri)


class Bearing(Enum):
    """What a key of a training run has to do with the weights that come out; `dermray.train.trajectory` reads it."""

    DECIDES = "decides"
    LEAVES = "leaves"


ValueT = TypeVar("ValueT")
# Beside the key, in place of its type: another value gives other weights, or it does not (where things lie, how often
# something is told, how numbers are rounded). A section that says so speaks for all of its keys.
DecidesWeights = Annotated[ValueT, Bearing.DECIDES]
LeavesWeights = Annotated[ValueT, Bearing.LEAVES]

# A file or folder. Of a local one the path becomes absolute, since Ray's workers change directory.
Uri = Annotated[str, AfterValidator(absolute)]


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
    dashboard: bool = Field(
        True, description="an own cluster has Ray's dashboard, on this machine's loopback; false: none"
    )
    log_to_driver: bool = Field(False, description="true: show what Ray workers print (always in Ray's own log files)")


ConfigT = TypeVar("ConfigT", bound=Config)


def load(config_class: type[ConfigT], argv: Sequence[str] | None = None, *, prog: str, description: str) -> ConfigT:
    """Build `config_class` from a command line, answering `--help` and `--print-config` itself.

    On a bad key, value or file it prints one line that names it and exits with code 2, so call it before
    anything expensive starts.

    Args:
        prog: the script that does the same: "jobs/prepare.py".
    """
    called = _as_called(prog)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text(config_class, called=called, description=description))
        sys.exit(0)
    print_config = "--print-config" in arguments
    try:
        config = parse(config_class, [a for a in arguments if a != "--print-config"])
    except ConfigError as error:
        refuse(called.removeprefix("python "), error)
    if print_config:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config


def _as_called(script: str) -> str:
    """How whoever reads it has called a command: "dermray prepare", or "python jobs/prepare.py"."""
    own = f"dermray {Path(script).stem}"
    return own if sys.argv[0] == own else f"python {script}"


def refuse(prog: str, error: ConfigError) -> NoReturn:
    """Print a configuration error as one line and exit with its code."""
    print(f"{prog}: {redaction.without_secrets(str(error))}", file=sys.stderr)
    sys.exit(error.exit_code)


def parse(config_class: type[ConfigT], arguments: Sequence[str], values: Mapping[str, Any] | None = None) -> ConfigT:
    """`[--config FILE] [key=value …]` → a validated config.

    Args:
        config_class: what there is to configure.
        arguments: of a command line.
        values: dotted key → value, over the arguments; a text counts as one from the command line.

    Raises:
        ConfigError: unknown keys, wrong values, a missing file or malformed arguments: all of them, by name.
    """
    tree: dict[str, Any] = {}
    files: list[str] = []
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if argument == "--config" or argument.startswith("--config="):
            file = argument.partition("=")[2] or next(pending, "")
            tree = keys.merged(tree, read_yaml(file))
            files.append(os.path.abspath(file))
        elif "=" in argument and not argument.startswith("-"):
            key, _, text = argument.partition("=")
            overrides = keys.merged(overrides, _nest(key, Argument(text), problems))
        else:
            problems.append(f"cannot read the argument {argument!r}: write key=value, or see --help for what there is")
    for key, value in (values or {}).items():
        overrides = keys.merged(overrides, _nest(key, Argument(value) if isinstance(value, str) else value, problems))
    config = _read(config_class, keys.merged(tree, overrides), problems)
    config._files = tuple(files)
    return config


def _read(config_class: type[ConfigT], tree: Mapping[str, Any], malformed: Sequence[str]) -> ConfigT:
    reader = Reader()
    typed = reader.section(config_class, tree)
    error, config = None, None
    try:
        config = config_class.model_validate(typed)
    except ValidationError as found:
        error = found
    told = keys.explain(reader.names, error, reader.problems)
    if config is None or reader.problems or malformed:
        raise ConfigError("; ".join([*malformed, *([told] if told else [])]))
    return config


def validate(config_class: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """Validate a nested mapping; what is wrong becomes a one-line `ConfigError` that names each key."""
    try:
        return config_class.model_validate(dict(tree))
    except ValidationError as error:
        names = (name for name, _ in keys.described(config_class))
        raise ConfigError(keys.explain(names, error, {})) from None


def read_yaml(file: str) -> dict[str, Any]:
    """Read a YAML mapping from a local file, as `documents.parse_yaml` gives it.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping at the top.
    """
    if not file:
        raise ConfigError("--config needs a file: --config FILE.yaml")
    try:
        with open(file, "rb") as stream:
            # No more than what is refused as too large: the file may have no end.
            data = stream.read(documents.MAX_YAML_BYTES + 1)
        content = documents.parse_yaml(data, f"config file {file!r}")
    except FileNotFoundError:
        raise ConfigError(f"config file {file!r} does not exist (looked in {os.getcwd()})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {file!r} cannot be read: {error}") from None
    except DocumentError as error:
        raise ConfigError(str(error)) from None
    if content is None or content == Scalar(""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {file!r} must hold key: value pairs at its top level")
    return content


def help_text(config_class: type[Config], *, called: str, description: str) -> str:
    """Every key with its type, default and one line of explanation."""
    rows = list(_describe(config_class))
    width = min(max(len(key) + len(kind) for key, kind, _, _ in rows) + 3, 58)
    lines = [
        f"usage: {called} [--config FILE.yaml] [key=value ...] [--print-config] [--help]",
        "",
        description,
        "",
        "keys (dots reach into sections; defaults in brackets):",
    ]
    for key, kind, default, text in rows:
        lines.append(f"  {f'{key} ({kind})':<{width}} {text} [{default}]")
    return "\n".join(lines)


def _describe(config_class: type[Config]) -> Iterator[tuple[str, str, str, str]]:
    for name, field in keys.described(config_class):
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True)
            default = "required" if value is PydanticUndefined else _show(value)
        yield name, _type_name(field.annotation), default, field.description or ""


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


def _nest(key: str, value: Any, problems: list[str]) -> dict[str, Any]:
    parts = key.split(".")
    if not all(parts):
        problems.append(f"{key!r} is not a key: write section.name=value")
        return {}
    for part in reversed(parts):
        value = {part: value}
    return cast(dict[str, Any], value)
