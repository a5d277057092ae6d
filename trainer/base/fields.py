"""Settings as frozen dataclasses whose fields say their own constraints.

warmup_ratio: float = option(0.0, at_least=0, below=1)
(and below it a docstring: the field's help on the command line)
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trainer.base.errors import UserError, unknown

Kind = Literal["run", "source", "method", "upkeep", "local"]


@dataclass(frozen=True)
class Rule:
    """What holds for a field's value, and what the field decides.

    Attributes:
        above, at_least, below, at_most: bounds of a number.
        numbers: a list of numbers, which is kept as texts, or of words.
        refused: words that are no value of the field, and why.
        path: a path, in which ~ means the home folder; or a list of them.
        mapping: a list of `name=value`, such as `a=x,b=x`, which is also `a,b=x`, and in Python a dict.
        repeats: a list, whose option is given once for each item.
        kind: `run`: another value makes another run, so a resumed one cannot have it. `source`: where data lies; what
            is in it counts. `method`: how, not what, is computed. `upkeep`: how the run is kept and watched.
            `local`: the same, and nothing that a reader of the model card would need.
    """

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    path: bool = False
    mapping: bool = False
    numbers: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = False
    kind: Kind = "run"

    def check(self, name: str, value: Any) -> None:
        """Raises UserError."""
        if value == "":
            raise UserError(f"{name} is empty; leave it out, or give it a value")
        if not isinstance(value, (int, float)):
            return
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        text = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        if not math.isfinite(value):
            raise UserError(f"{name} must be a finite number{' and ' + text if text else ''}, got {value}")
        if (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
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


def typed(name: str, value: Any, kind: Any, rule: Rule = Rule()) -> Any:
    """`value` as the type of its field, from the command line's text, YAML's values or Python's objects alike.

    Text stays text, whatever it would mean to YAML. Raises UserError saying what would be right.
    """
    if hasattr(value, "tolist"):  # of numpy, pandas or torch
        value = value.tolist()
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (part for part in get_args(kind) if part is not NoneType)
        is_text = inner is str or rule.path
        if value is None or (not is_text and isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        return typed(name, value, inner, rule)
    if value is None:
        raise UserError(f"{name} must have a value")
    if get_origin(kind) is Literal:
        if isinstance(value, str) and value in rule.refused:
            raise UserError(f"{name} {value}: {rule.refused[value]}")
        if not isinstance(value, str) or value not in get_args(kind):
            raise UserError(unknown(name, value if isinstance(value, str) else _shown(value), get_args(kind)))
        return value
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        if rule.mapping:
            return _mapping(name, value)
        found = items(value, rule.path) if isinstance(value, (str, os.PathLike)) else value
        if rule.numbers and isinstance(found, (list, tuple)):
            found = [_number(item) for item in found]
        if rule.path and isinstance(found, (list, tuple)):
            found = [os.fspath(item) if isinstance(item, os.PathLike) else item for item in found]
        if not isinstance(found, (list, tuple)) or not all(isinstance(item, str) and item for item in found):
            what = "numbers such as 1,2,1" if rule.numbers else "texts such as a,b"
            raise UserError(f"{name} must be a list of {what}, none of them empty, got {_shown(value)}")
        if found == ["none"] and get_origin(inner) is Literal:
            return []  # so TrainingArguments writes report_to
        return [typed(name, item, inner) for item in found]
    converted = _scalar(value, kind)
    if converted is None:
        raise UserError(f"{name} must be {WORDS[kind]}, got {_shown(value)}")
    return converted


def _shown(value: Any) -> str:
    """In a line, whatever it is."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _number(item: Any) -> Any:
    """A number as its shortest text, however it was written; anything else as it is."""
    try:
        number = float(item) if isinstance(item, (str, int, float)) and not isinstance(item, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        return item
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def items(value: str | os.PathLike[str], paths: bool) -> Any:
    """A list as `a,b`, or as JSON where an item holds a comma; of paths, one that is there is one."""
    text = os.fspath(value)
    if paths and (value is not text or os.path.exists(text)):
        return [text]
    try:
        return json.loads(text) if text.startswith("[") else [item.strip() for item in text.split(",")]
    except ValueError:  # brackets in a path are a glob's
        return [item.strip() for item in (text if paths else text.strip("[]")).split(",")]


def _mapping(name: str, value: Any) -> list[str]:
    """Each `name=value` by itself."""
    if isinstance(value, Mapping):
        value = [f"{own}={target}" for own, target in value.items()]
    if isinstance(value, str):
        value = re.split("[,;]", value)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{name} must look like a=x,b=y, got {_shown(value)}")
    made: dict[str, str] = {}
    waiting: list[str] = []  # for the value that they share
    for item in ",".join(value).split(","):
        own, equals, target = (part.strip() for part in item.rpartition("="))
        if not equals:
            waiting.append(target)
            continue
        for one in [*waiting, own]:
            if "=" in one:
                raise UserError(f"{name}: {item.strip()!r} has more than one =; write each as a=x")
            if not one or not target or target.startswith(">"):
                raise UserError(f"{name} must look like a=x,b=y, none of them empty, got {_shown(','.join(value))}")
            if made.get(one, target) != target:
                raise UserError(f"{name} gives {one!r} two values, {made[one]!r} and {target!r}; leave one out")
            made[one] = target
        waiting = []
    if waiting:
        raise UserError(f"{name}: {', '.join(waiting)} has no value; write it as {waiting[-1]}=...")
    return [f"{own}={target}" for own, target in made.items()]


def mapped(items: list[str] | None) -> dict[str, str]:
    """The value of a field that is a mapping."""
    return {own: target for own, _, target in (item.rpartition("=") for item in items or ())}


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
        fields = {own.name: own for group in groups for own in dataclasses.fields(group)}
        made = {name: typed(name, value, types[name], rule(fields[name])) for name, value in values.items()}
        for name, value in made.items():
            rule(fields[name]).check(name, value)
        return made
    except UserError as error:
        raise UserError(f"{place}: {error}" if place else str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A group of fields, whose values are typed and checked at construction. Raises UserError naming the field."""

    def __post_init__(self) -> None:
        group: Any = type(self)
        hints = kinds(group)
        for own in dataclasses.fields(self):
            value = typed(own.name, getattr(self, own.name), hints[own.name], rule(own))
            rule(own).check(own.name, value)
            if rule(own).path and value is not None:
                value = [_home(own.name, path) for path in value] if isinstance(value, list) else _home(own.name, value)
            object.__setattr__(self, own.name, value)


def _home(name: str, path: str) -> str:
    """~ is the home folder, also behind `NAME=`."""
    title, equals, rest = path.partition("=~")
    full = f"{title}={os.path.expanduser('~' + rest)}" if equals else os.path.expanduser(path)
    if full.startswith("~") or "=~" in full:
        raise UserError(f"{name}: no home folder is known for {path}; give the full path")
    return full
