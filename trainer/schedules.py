"""The learning rate: a pure function of the step, so that a resumed run needs no state of it.

Schedules are transformers', and so are the names and defaults of their settings. These are checked where a config is,
on machines that may have no torch, which only `Schedule` imports.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.base.errors import UserError
from trainer.base.fields import mapped, typed

SHAPES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class Setting:
    """A setting of a scheduler.

    Attributes:
        kind: int, float, or the words that it can be.
        at_least: bound of a number.
        needed: whether the scheduler has no default for it.
    """

    kind: type | tuple[str, ...]
    at_least: float = 0.0
    needed: bool = False

    def read(self, name: str, text: str) -> Any:
        """Raises UserError where `text` is no value."""
        if isinstance(self.kind, tuple):
            if text not in self.kind:
                raise UserError(f"{name} must be one of {', '.join(self.kind)}, got {text!r}")
            return text
        value = typed(name, text, self.kind)
        if not (math.isfinite(value) and value >= self.at_least):
            raise UserError(f"{name} must be at least {self.at_least:g}, got {text}")
        return value

    def describe(self, name: str) -> str:
        kind = {int: "whole number", float: "number"}.get(self.kind) if isinstance(self.kind, type) else None  # type: ignore[call-overload]
        return f"{name} ({kind or '|'.join(self.kind)}{', needed' if self.needed else ''})"  # type: ignore[arg-type]


WAVES = {"num_cycles": Setting(float)}
LOWEST = {"min_lr": Setting(float), "min_lr_rate": Setting(float)}
SETTINGS: dict[str, dict[str, Setting]] = {
    "linear": {},
    "cosine": WAVES,
    "cosine_with_restarts": {"num_cycles": Setting(int, at_least=1)},
    "cosine_with_min_lr": WAVES | LOWEST,
    "cosine_warmup_with_min_lr": WAVES | LOWEST | {"warmup_lr_rate": Setting(float)},
    "polynomial": {"lr_end": Setting(float), "power": Setting(float)},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": Setting(int, at_least=1)},
    "warmup_stable_decay": {
        "num_decay_steps": Setting(int, needed=True),
        "num_stable_steps": Setting(int),
        "warmup_type": Setting(SHAPES),
        "decay_type": Setting(SHAPES),
        "min_lr_ratio": Setting(float),
        "num_cycles": Setting(float),
    },
}


def settings(config: Any) -> dict[str, Any]:
    """Those that the config gives its scheduler. Raises UserError that lists the valid ones."""
    kind, given = config.lr_scheduler_type, mapped(config.lr_scheduler_kwargs)
    valid = SETTINGS[kind]
    shown = ", ".join(own.describe(name) for name, own in valid.items()) or "none"
    try:
        if strange := [name for name in given if name not in valid]:
            raise UserError(f"there is no {strange[0]}")
        if lacking := [name for name, own in valid.items() if own.needed and name not in given]:
            raise UserError(f"{lacking[0]} is missing")
        values = {name: valid[name].read(name, text) for name, text in given.items()}
        if "min_lr" in valid and len(values.keys() & {"min_lr", "min_lr_rate"}) != 1:
            raise UserError("it needs one of min_lr and min_lr_rate")
        _check(values, config.learning_rate)
    except UserError as error:
        raise UserError(f"lr_scheduler_kwargs: {error}; {kind} takes {shown}") from None
    return values


def _check(values: Mapping[str, Any], rate: float) -> None:
    """What the rate says of settings. Raises UserError."""
    if values.get("min_lr", 0.0) > rate:
        raise UserError(f"min_lr must be at most the learning_rate {rate:g}, got {values['min_lr']:g}")
    for name in ("min_lr_rate", "warmup_lr_rate", "min_lr_ratio"):
        if values.get(name, 0.0) > 1:
            raise UserError(f"{name} must be at most 1, got {values[name]:g}")
    if "lr_end" in values and values["lr_end"] >= rate:
        raise UserError(f"lr_end must be below the learning_rate {rate:g}, got {values['lr_end']:g}")


class Schedule:
    """The learning rate of each step of a run that is planned to have `num_steps`.

    Raises UserError where a setting is wrong, or parts of the schedule are longer than the run.
    """

    def __init__(self, config: Any, num_steps: int) -> None:
        values, self.rate = settings(config), config.learning_rate
        warmup = config.warmup_steps if config.warmup_steps > 0 else math.ceil(num_steps * config.warmup_ratio)
        decay = values.get("num_decay_steps", 0)
        if "num_stable_steps" not in values and decay and warmup + decay > num_steps:
            raise UserError(
                f"lr_scheduler_kwargs: {warmup} steps of warmup and num_decay_steps={decay} are more than the "
                f"{num_steps} steps of the run; lower num_decay_steps"
            )
        self.factor = _factor(config.lr_scheduler_type, self.rate, warmup, num_steps, values)

    def __call__(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        return float(self.rate * self.factor(step))


def _factor(kind: str, rate: float, warmup: int, num_steps: int, values: dict[str, Any]) -> Callable[[int], float]:
    """transformers' own function from a step to a part of the rate."""
    import torch
    from transformers import get_scheduler

    # It asks an optimizer for the rate, of which some settings are a part; of a rate of 0 everything is.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate or 1.0)
    with warnings.catch_warnings():  # that num_stable_steps counts more than the number of steps
        warnings.simplefilter("ignore")
        try:
            scheduler: Any = get_scheduler(kind, optimizer, warmup, num_steps, values)
        except ValueError as error:  # of what it has for a setting that is not given, such as an lr_end
            raise UserError(f"lr_scheduler_type {kind}: {error}; see lr_scheduler_kwargs") from None
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor
