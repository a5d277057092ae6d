"""Settings as frozen dataclasses whose fields say their own constraints.

warmup_ratio: float = option(0.0, at_least=0, below=1)
(and below it a docstring: the field's help on the command line)
"""

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.base.errors import UserError

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


def option(
    default: Any = None,
    *,
    factory: Callable[[], Any] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    path: bool = False,
    kind: Kind = "run",
) -> Any:
    """A field with a Rule; `factory` makes a default that can be changed, such as a list."""
    metadata = {"rule": Rule(above, at_least, below, path, kind)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def rule(own: dataclasses.Field[Any]) -> Rule:
    return own.metadata.get("rule", Rule())


def default(own: dataclasses.Field[Any]) -> Any:
    return own.default if own.default_factory is dataclasses.MISSING else own.default_factory()


@dataclass(frozen=True, kw_only=True)
class Fields:
    """A group of fields, whose values are checked at construction."""

    def __post_init__(self) -> None:
        for own in dataclasses.fields(self):
            name, value = own.name, getattr(self, own.name)
            if value is None and "None" not in str(own.type):
                raise UserError(f"{name} must have a value")
            rule(own).check(name, value)
            if rule(own).path and isinstance(value, str) and value.startswith("~"):
                full = os.path.expanduser(value)
                if full.startswith("~"):
                    raise UserError(f"{name}: no home folder is known for {value}; give the full path")
                object.__setattr__(self, name, full)
