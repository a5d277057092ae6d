"""Settings as frozen dataclasses whose fields say their own constraints.

warmup_ratio: float = option(0.0, at_least=0, below=1)
(and below it a docstring: the field's help on the command line)
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from trainer.base.errors import UserError, unknown

Kind = Literal["run", "source", "method", "upkeep", "local"]


@dataclass(frozen=True)
class Rule:
    """What holds for a field's value, and what the field decides.

    Attributes:
        above, at_least, below: bounds of a number.
        path: a path, in which ~ means the home folder.
        kind: `run`: another value makes another run, so a resumed one cannot have it. `source`: where data lies; what
            is in it counts. `method`: how, not what, is computed. `upkeep`: how the run is kept and watched.
            `local`: the same, and nothing that a reader of the model card would need.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    path: bool = False
    kind: Kind = "run"

    def check(self, name: str, value: Any) -> None:
        """Raises UserError."""
        if value == "":
            raise UserError(f"{name} is empty; leave it out, or give it a value")
        if not isinstance(value, (int, float)):
            return
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below}
        text = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number{' and ' + text if text else ''}, got {value}")
        if (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
        ):
            raise UserError(f"{name} must be {text}, got {value}")


def option(default: Any = None, *, factory: Callable[[], Any] | None = None, **constraints: Any) -> Any:
    """A field with a Rule of these constraints; `factory` makes a default that can be changed, such as a list."""
    metadata = {"rule": Rule(**constraints)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def rule(own: dataclasses.Field[Any]) -> Rule:
    return own.metadata.get("rule", Rule())


def default(own: dataclasses.Field[Any]) -> Any:
    return own.default if own.default_factory is dataclasses.MISSING else own.default_factory()


TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type of its field, from the command line's text, YAML's values or Python's objects alike.

    Text stays text, whatever it would mean to YAML. Raises UserError saying what would be right.
    """
    if hasattr(value, "tolist"):  # of numpy, pandas or torch
        value = value.tolist()
    if isinstance(kind, UnionType):
        (inner,) = (part for part in get_args(kind) if part is not NoneType)
        if value is None or (inner is not str and isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        return typed(name, value, inner)
    if value is None:
        raise UserError(f"{name} must have a value")
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise UserError(unknown(name, value if isinstance(value, str) else _shown(value), get_args(kind)))
        return value
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        items = _items(value) if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) and item for item in items):
            raise UserError(f"{name} must be a list of texts such as a,b, none of them empty, got {_shown(value)}")
        if items == ["none"] and get_origin(inner) is Literal:
            return []  # so TrainingArguments writes report_to
        return [typed(name, item, inner) for item in items]
    converted = _scalar(value, kind)
    if converted is None:
        raise UserError(f"{name} must be {WORDS[kind]}, got {_shown(value)}")
    return converted


def _shown(value: Any) -> str:
    """In a line, whatever it is."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _items(text: str) -> Any:
    """A list as `a,b`, or as JSON where an item holds a comma."""
    try:
        return json.loads(text) if text.startswith("[") else [item.strip() for item in text.split(",")]
    except ValueError:
        return [item.strip() for item in text.strip("[]").split(",")]


def _scalar(value: Any, kind: type) -> Any:
    """None where `value` cannot be that."""
    if kind is str:
        return os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if kind is bool:
        return value if isinstance(value, bool) else TRUTH.get(str(value).lower())
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return None
    return number if isinstance(value, str) or number == value or number != number else None  # 1.5 is no whole number


@lru_cache
def kinds(group: Any) -> dict[str, Any]:
    """The types of a group's fields."""
    return get_type_hints(group)


def checked(values: Mapping[str, Any], *groups: Any, place: object = "") -> dict[str, Any]:
    """`values` as fields of `groups`, of the right types. Raises UserError naming the field, and the file `place`."""
    types = {name: kind for group in groups for name, kind in kinds(group).items()}
    try:
        if strange := [name for name in values if name not in types]:
            raise UserError(unknown("field", str(strange[0]), types))
        return {name: typed(name, value, types[name]) for name, value in values.items()}
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A group of fields, whose values are typed and checked at construction. Raises UserError naming the field."""

    def __post_init__(self) -> None:
        group: Any = type(self)
        hints = kinds(group)
        for own in dataclasses.fields(self):
            value = typed(own.name, getattr(self, own.name), hints[own.name])
            rule(own).check(own.name, value)
            if rule(own).path and isinstance(value, str) and value.startswith("~"):
                full = os.path.expanduser(value)
                if full.startswith("~"):
                    raise UserError(f"{own.name}: no home folder is known for {value}; give the full path")
                value = full
            object.__setattr__(self, own.name, value)
