"""What a sweep may change of a recipe, and the settings that each of its trials draws. Pure: no disk, no cluster.

::

    optim.lr=log:3e-4:1e-2            log-uniform between two numbers
    backbone.dropout=uniform:0:0.3    uniform; between whole numbers where the setting is one, ends included
    optim.weight-decay=0.01,0.05,0.1  one of these

Trial 0 is the recipe as it stands. Trial i draws from ``numpy.random.default_rng([seed, i])`` and draws again while an
earlier trial has the same settings, so it depends on space, recipe, seed and i only: a sweep of 16 starts with the
trials of a sweep of 8.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from foundation.config import Recipe

DEFAULT_SPACE = (
    "optim.lr=log:3e-4:1e-2",
    "optim.weight-decay=0.01,0.05,0.1,0.2",
    "backbone.dropout=uniform:0:0.3",
    "backbone.token-dropout=uniform:0:0.3",
)
COMPONENTS = ("backbone", "loss", "optim")
"""Parts of the recipe that may be searched; what a trial is shown and measured on is the same for all."""
_ATTEMPTS = 1000

Value = bool | int | float | str | None
Settings = dict[str, Value]
"""Settings by dotted name, as in ``optim.weight_decay``."""


@dataclass(frozen=True)
class Choices:
    """One of several values."""

    values: tuple[Value, ...]

    def draw(self, rng: np.random.Generator) -> Value:
        """Return one of them."""
        return self.values[rng.integers(len(self.values))]

    def examples(self) -> Sequence[Value]:
        """Return all."""
        return self.values


@dataclass(frozen=True)
class Uniform:
    """A number between two others."""

    low: float
    high: float

    def draw(self, rng: np.random.Generator) -> float:
        """Return a number of three digits."""
        return _three_digits(rng.uniform(self.low, self.high), self.low, self.high)

    def examples(self) -> Sequence[Value]:
        """Return both ends."""
        return self.low, self.high


@dataclass(frozen=True)
class LogUniform(Uniform):
    """A number between two others, each order of magnitude as likely as the next."""

    def draw(self, rng: np.random.Generator) -> float:
        """Return a number of three digits."""
        return _three_digits(math.exp(rng.uniform(math.log(self.low), math.log(self.high))), self.low, self.high)


@dataclass(frozen=True)
class Integers:
    """A whole number between two others, ends included."""

    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        """Return one."""
        return int(rng.integers(self.low, self.high, endpoint=True))

    def examples(self) -> Sequence[Value]:
        """Return both ends."""
        return self.low, self.high


Distribution = Choices | Uniform | LogUniform | Integers
Space = Mapping[str, Distribution]
"""Where a setting's values come from, by dotted name."""


def parse_space(words: Sequence[str], recipe: Recipe) -> Space:
    """Return the space that ``SETTING=RANGE`` words describe.

    Raises
    ------
    ValueError
        If a setting is unknown or named twice, or a range is none or goes beyond what the setting may be.
    """
    space: dict[str, Distribution] = {}
    known = dict(_fields(recipe))
    for word in words:
        name, is_range, text = word.partition("=")
        name = name.replace("-", "_")
        if not is_range or not text:
            raise ValueError(f"--space {word} has no range; write it as {name}=log:LOW:HIGH, uniform:LOW:HIGH or A,B,C")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(COMPONENTS)} and a field"
            raise ValueError(f"--space {word}: the recipe has no setting {name!r}; {hint}")
        if name in space:
            raise ValueError(f"--space names {name} twice; once is enough")
        try:
            space[name] = _distribution(text, known[name])
            for value in space[name].examples():
                with_settings(recipe, {name: value})
        except ValueError as error:
            raise ValueError(f"--space {word}: {error}") from None
    if not space:
        raise ValueError("--space names nothing; leave it out for the default, or name a setting and its range")
    return space


def draws(space: Space, recipe: Recipe, *, seed: int, n_trials: int) -> list[Settings]:
    """Return the settings of each trial, trial 0 being the recipe's own.

    Raises
    ------
    ValueError
        If the space has fewer different settings, or what was drawn contradicts itself (its message tells what).
    """
    found: list[Settings] = [{name: _value_of(recipe, name) for name in space}]
    for trial in range(1, n_trials):
        rng = np.random.default_rng([seed, trial])
        drawn = ({name: of_setting.draw(rng) for name, of_setting in space.items()} for _ in range(_ATTEMPTS))
        new = next((settings for settings in drawn if settings not in found), None)
        if new is None:
            raise ValueError(
                f"--trials {n_trials}: the space seems to have no more than {len(found)} different settings; "
                f"lower --trials or widen --space"
            )
        with_settings(recipe, new)
        found.append(new)
    return found


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Return the recipe with these settings in place of its own."""
    for name, value in settings.items():
        recipe = _replaced(recipe, name.split("."), value)
    return recipe


def told_settings(settings: Settings) -> str:
    """Return settings in a line."""
    return "  ".join(f"{name}={value}" for name, value in settings.items())


def _replaced(config: Any, path: Sequence[str], value: Value) -> Any:
    first, *rest = path
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})


def _value_of(recipe: Recipe, name: str) -> Value:
    found: Any = recipe
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and type of everything in a config."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if not prefix and field.name not in COMPONENTS:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def _distribution(text: str, kind: Any) -> Distribution:
    """Return what a range's text describes, for a setting of this type."""
    how, *ends = text.split(":")
    if not ends:
        return Choices(tuple(_read(word, kind) for word in text.split(",")))
    if how not in ("log", "uniform") or len(ends) != 2:
        raise ValueError(f"{text!r} is no range; write log:LOW:HIGH, uniform:LOW:HIGH or A,B,C")
    kinds = _alternatives(kind)
    if float not in kinds and int not in kinds:
        raise ValueError("the setting is no number; list its values as A,B,C")
    if how == "log" and float not in kinds:
        raise ValueError("the setting is a whole number; use uniform:LOW:HIGH or list its values as A,B,C")
    number = float if float in kinds else int
    low, high = (_read(end, number) for end in ends)
    if not low < high:
        raise ValueError(f"{low:g} must be below {high:g}")
    if how == "log" and low <= 0:
        raise ValueError(f"a logarithmic range starts above 0, not at {low:g}")
    if number is int:
        return Integers(low, high)
    return LogUniform(low, high) if how == "log" else Uniform(low, high)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _read(word: str, kind: Any) -> Any:
    """Return a word as a value of a type, the first of the alternatives that it can be."""
    allowed = []
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            values = {str(value): value for value in get_args(one)}
        elif one is bool:
            values = {"true": True, "false": False}
        elif one is type(None):
            values = {"none": None}
        elif one in (int, float):
            try:
                number = one(word)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
            allowed.append("a whole number" if one is int else "a number")
            continue
        else:
            raise ValueError("the setting is a list or the like, which can't be searched; make a recipe of each")
        if word.lower() in values or word in values:
            return values.get(word, values.get(word.lower()))
        allowed += values
    raise ValueError(f"{word!r} is not {' or '.join(allowed)}")


def _three_digits(number: float, low: float, high: float) -> float:
    """Round to three digits, for people, and stay within the ends."""
    return min(max(float(f"{number:.3g}"), low), high)
