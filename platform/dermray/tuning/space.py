"""Search spaces: how each key of a recipe varies, and a draw of trials from them. Pure; knows nothing of Ray.

A parameter is an entry of the union `Parameter`. A new kind is one more class with `sample` and `num_values`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from dermray.config import Config

# Enough to tell two settings apart, few enough to read and type again.
SIGNIFICANT_DIGITS = 4
EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
PARAMETER_KEYS = frozenset({"kind", "low", "high", "values"})


class _Range(Config):
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low:g} and {self.high:g}")
        return self

    def _readable(self, value: float) -> float:
        return min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), self.low), self.high)

    @property
    def num_values(self) -> float:
        """How many values there are: without limit."""
        return math.inf


class Uniform(_Range):
    """Every value between `low` and `high` alike."""

    kind: Literal["uniform"]

    def sample(self, random: np.random.Generator) -> float:
        """One value, of four significant digits."""
        return self._readable(random.uniform(self.low, self.high))


class LogUniform(_Range):
    """Every order of magnitude between `low` and `high` alike."""

    kind: Literal["loguniform"]
    low: float = Field(gt=0)

    def sample(self, random: np.random.Generator) -> float:
        """One value, of four significant digits."""
        return self._readable(math.exp(random.uniform(math.log(self.low), math.log(self.high))))


class Integer(Config):
    """Every whole number from `low` to `high`, both included."""

    kind: Literal["int"]
    low: int
    high: int

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self

    def sample(self, random: np.random.Generator) -> int:
        """One number."""
        return int(random.integers(self.low, self.high, endpoint=True))

    @property
    def num_values(self) -> float:
        """How many numbers there are."""
        return self.high - self.low + 1


class Choice(Config):
    """One of a list of values of any type that the key takes."""

    kind: Literal["choice"]
    values: list[Any] = Field(min_length=1)

    @field_validator("values")
    @classmethod
    def _numbers(cls, values: list[Any]) -> list[Any]:
        # YAML 1.1 takes 1e-4 for text, since it has no dot.
        return [float(v) if isinstance(v, str) and EXPONENT.fullmatch(v) else v for v in values]

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if len({_canonical(value) for value in self.values}) < len(self.values):
            raise ValueError(f"values must differ, got {self.values}")
        return self

    def sample(self, random: np.random.Generator) -> Any:
        """One of the values."""
        return self.values[int(random.integers(len(self.values)))]

    @property
    def num_values(self) -> float:
        """How many values there are."""
        return len(self.values)


Parameter = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="kind")]


def num_points(space: Mapping[str, Parameter]) -> float:
    """How many different trials a space holds."""
    return math.prod(parameter.num_values for parameter in space.values())


def sample(space: Mapping[str, Parameter], *, num_trials: int, seed: int) -> list[dict[str, Any]]:
    """Draw trials that all differ: the same seed gives the same ones, and more of them begin with those of fewer.

    Args:
        space: config key → parameter.
        num_trials: at most `num_points(space)`.
        seed: of the draw.
    """
    seen: set[str] = set()
    trials = []
    for number in range(num_trials):
        random = np.random.default_rng([seed, number])
        while True:
            values = {key: parameter.sample(random) for key, parameter in space.items()}
            if _canonical(values) not in seen:
                break
        seen.add(_canonical(values))
        trials.append(values)
    return trials


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A space's parameters by dotted key, whether it was written nested, dotted, or both (file and command line)."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and not PARAMETER_KEYS & value.keys():
            entries = dotted(value, f"{prefix}{key}.")
        else:
            entries = {f"{prefix}{key}": value}
        for name, entry in entries.items():
            both = isinstance(flat.get(name), Mapping) and isinstance(entry, Mapping)
            flat[name] = {**flat[name], **entry} if both else entry
    return flat


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
