"""Search spaces: how each key of a recipe varies, and a draw of trials from them. Pure; knows nothing of Ray.

A parameter is an entry of the union `Parameter`. A new kind is one more class with `sample`, `perturbed`, `grid` and
`num_values`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from dermray.config import Config
from dermray.errors import ConfigError

# Enough to tell two settings apart, few enough to read and type again.
SIGNIFICANT_DIGITS = 4
EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
# Of population-based training (Jaderberg et al., 2017).
PERTURBATION_FACTORS = (0.8, 1.2)
PARAMETER_KEYS = frozenset({"kind", "low", "high", "values", "steps", "when"})
MAX_GRID_POINTS = 100_000
# Beyond this, floating-point numbers skip whole ones.
MAX_INTEGER = 2**53
# Draws that all give a trial which is there already: the space has, readably written, no others.
MAX_DRAWS = 1000


class _Parameter(Config):
    when: dict[str, list[Any]] = Field(
        {},
        description="parameter → values: this key varies only where that one has one of them, else it is the recipe's",
    )

    def varies(self, values: Mapping[str, Any]) -> bool:
        """Whether the conditions hold among the values drawn so far."""
        return all(key in values and values[key] in allowed for key, allowed in self.when.items())


class _Range(_Parameter):
    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    steps: int | None = Field(None, ge=2, le=MAX_GRID_POINTS, description="values of a grid, both ends included")

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

    def perturbed(self, value: float, random: np.random.Generator) -> float:
        """A fifth less or more than `value`, within the range."""
        return self._readable(value * _factor(random))

    def _grid(self, spaced: Callable[[float, float, int], np.ndarray]) -> list[float] | None:
        return None if self.steps is None else [self._readable(v) for v in spaced(self.low, self.high, self.steps)]


class Uniform(_Range):
    """Every value between `low` and `high` alike."""

    kind: Literal["uniform"]

    def sample(self, random: np.random.Generator) -> float:
        """One value, of four significant digits."""
        return self._readable(random.uniform(self.low, self.high))

    def grid(self) -> list[float] | None:
        """`steps` values at equal distances, or None."""
        return self._grid(np.linspace)


class LogUniform(_Range):
    """Every order of magnitude between `low` and `high` alike."""

    kind: Literal["loguniform"]
    low: float = Field(gt=0, allow_inf_nan=False)

    def sample(self, random: np.random.Generator) -> float:
        """One value, of four significant digits."""
        return self._readable(math.exp(random.uniform(math.log(self.low), math.log(self.high))))

    def grid(self) -> list[float] | None:
        """`steps` values at equal ratios, or None."""
        return self._grid(np.geomspace)


class Integer(_Parameter):
    """Every whole number from `low` to `high`, both included."""

    kind: Literal["int"]
    low: int = Field(ge=-MAX_INTEGER)
    high: int = Field(le=MAX_INTEGER)

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self

    def sample(self, random: np.random.Generator) -> int:
        """One number."""
        return int(random.integers(self.low, self.high, endpoint=True))

    def perturbed(self, value: int, random: np.random.Generator) -> int:
        """A fifth less or more than `value`, at least one, within the range."""
        factor = _factor(random)
        moved = math.floor(value * factor) if factor < 1 else math.ceil(value * factor)
        return min(max(moved, self.low), self.high)

    def grid(self) -> list[int]:
        """All of them."""
        return list(range(self.low, self.high + 1))

    @property
    def num_values(self) -> float:
        """How many numbers there are."""
        return self.high - self.low + 1


class Choice(_Parameter):
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

    def perturbed(self, value: Any, random: np.random.Generator) -> Any:
        """The value before or after `value` in the list; at an end of the list perhaps the same."""
        moved = self.values.index(value) + int(random.choice((-1, 1)))
        return self.values[min(max(moved, 0), len(self.values) - 1)]

    def grid(self) -> list[Any]:
        """All of them."""
        return list(self.values)

    @property
    def num_values(self) -> float:
        """How many values there are."""
        return len(self.values)


Parameter = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="kind")]


def num_points(space: Mapping[str, Parameter]) -> float:
    """How many different trials a space holds; of one with conditions, no fewer than that, up to MAX_GRID_POINTS."""
    most = math.prod(parameter.num_values for parameter in space.values())
    if most > MAX_GRID_POINTS or not any(parameter.when for parameter in space.values()):
        return most
    return len(grid(ordered(space)))


def grid(space: Mapping[str, Parameter]) -> list[dict[str, Any]]:
    """Every point of a space, the last parameter varying fastest.

    Raises:
        ValueError: a range has no `steps`, or there are more than MAX_GRID_POINTS points.
    """
    points: list[dict[str, Any]] = [{}]
    for key, parameter in space.items():
        if isinstance(parameter, Integer) and parameter.num_values > MAX_GRID_POINTS:
            raise ValueError(f"space.{key}: a grid of more than {MAX_GRID_POINTS:,} points; take fewer values")
        values = parameter.grid()
        if values is None:
            raise ValueError(f"space.{key}: a grid needs steps: how many values between low and high")
        longer: list[dict[str, Any]] = []
        for point in points:
            longer += [{**point, key: value} for value in values] if parameter.varies(point) else [point]
            if len(longer) > MAX_GRID_POINTS:
                raise ValueError(f"space: a grid of more than {MAX_GRID_POINTS:,} points; take fewer values")
        points = longer
    return points


def ordered(space: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The space with each parameter behind those that its conditions name, else as it was written.

    Raises:
        ValueError: a condition names no parameter, or conditions go round in a circle.
    """
    found: dict[str, Parameter] = {}
    waiting = dict(space)
    while waiting:
        ready = [key for key, parameter in waiting.items() if parameter.when.keys() <= found.keys()]
        if not ready:
            key, parameter = next(iter(waiting.items()))
            absent = sorted(parameter.when.keys() - space.keys())
            reason = f"{absent[0]} is no parameter of the space" if absent else "conditions go round in a circle"
            raise ValueError(f"space.{key}.when: {reason}")
        found |= {ready[0]: waiting.pop(ready[0])}
    return found


def sample(space: Mapping[str, Parameter], *, num_trials: int, seed: int) -> list[dict[str, Any]]:
    """Draw trials that all differ: the same seed gives the same ones, and more of them begin with those of fewer.

    Args:
        space: config key → parameter.
        num_trials: at most `num_points(space)`.
        seed: of the draw.

    Raises:
        ConfigError: ranges are so narrow that they hold fewer different values.
    """
    seen: set[str] = set()
    trials = []
    for number in range(num_trials):
        random = np.random.default_rng([seed, number])
        drawn = (draw(space, random) for _ in range(MAX_DRAWS))
        values = next((values for values in drawn if _canonical(values) not in seen), None)
        if values is None:
            raise ConfigError(
                f"space: {number} different trials were found in {MAX_DRAWS:,} draws, and num_trials={num_trials} are "
                f"wanted; widen the ranges (values have {SIGNIFICANT_DIGITS} digits), or take fewer trials"
            )
        seen.add(_canonical(values))
        trials.append(values)
    return trials


def draw(space: Mapping[str, Parameter], random: np.random.Generator) -> dict[str, Any]:
    """One point of the space; keys whose conditions do not hold are left out."""
    values: dict[str, Any] = {}
    for key, parameter in space.items():
        if parameter.varies(values):
            values[key] = parameter.sample(random)
    return values


def explore(
    space: Mapping[str, Parameter],
    values: Mapping[str, Any],
    random: np.random.Generator,
    *,
    resample_probability: float,
) -> dict[str, Any]:
    """A neighbour of the point `values`: each key perturbed, or drawn anew with `resample_probability`.

    Args:
        space: ordered; keys whose conditions hold in the new point only are drawn.
    """
    found: dict[str, Any] = {}
    for key, parameter in space.items():
        if parameter.varies(found):
            anew = key not in values or random.random() < resample_probability
            found[key] = parameter.sample(random) if anew else parameter.perturbed(values[key], random)
    return found


def _factor(random: np.random.Generator) -> float:
    return float(random.choice(PERTURBATION_FACTORS))


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
