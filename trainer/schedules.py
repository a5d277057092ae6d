"""The learning rate: a pure function of the step, so that a resumed run needs no state of it.

Names, settings, defaults and formulas are those of transformers' get_scheduler. Nothing here imports torch: the
settings are checked where a config is.
"""

import math
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
        default: None = what transformers makes of the run.
        at_least: bound of a number.
        needed: whether the scheduler has no default for it.
    """

    kind: type | tuple[str, ...]
    default: Any = None
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


WAVES = {"num_cycles": Setting(float, 0.5)}
LOWEST = {"min_lr": Setting(float), "min_lr_rate": Setting(float)}
SETTINGS: dict[str, dict[str, Setting]] = {
    "linear": {},
    "cosine": WAVES,
    "cosine_with_restarts": {"num_cycles": Setting(int, 1, at_least=1)},
    "cosine_with_min_lr": WAVES | LOWEST,
    "cosine_warmup_with_min_lr": WAVES | LOWEST | {"warmup_lr_rate": Setting(float)},
    "polynomial": {"lr_end": Setting(float, 1e-7), "power": Setting(float, 1.0)},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": Setting(int, at_least=1)},
    "warmup_stable_decay": {
        "num_decay_steps": Setting(int, needed=True),
        "num_stable_steps": Setting(int),
        "warmup_type": Setting(SHAPES, "linear"),
        "decay_type": Setting(SHAPES, "cosine"),
        "min_lr_ratio": Setting(float, 0.0),
        "num_cycles": Setting(float, 0.5),
    },
}


def settings(config: Any) -> dict[str, Any]:
    """Those of the config's scheduler, with defaults. Raises UserError that lists the valid ones."""
    kind, given = config.lr_scheduler_type, mapped(config.lr_scheduler_kwargs)
    valid = SETTINGS[kind]
    shown = ", ".join(own.describe(name) for name, own in valid.items()) or "none"
    try:
        if strange := [name for name in given if name not in valid]:
            raise UserError(f"there is no {strange[0]}")
        if lacking := [name for name, own in valid.items() if own.needed and name not in given]:
            raise UserError(f"{lacking[0]} is missing")
        values = {name: own.read(name, given[name]) if name in given else own.default for name, own in valid.items()}
        _check(values, config.learning_rate)
    except UserError as error:
        raise UserError(f"lr_scheduler_kwargs: {error}; {kind} takes {shown}") from None
    return values


def _check(values: Mapping[str, Any], rate: float) -> None:
    """What one setting says of another, and of the rate. Raises UserError."""
    if "min_lr" in values:
        if (values["min_lr"] is None) == (values["min_lr_rate"] is None):
            raise UserError("it needs one of min_lr and min_lr_rate")
        if (values["min_lr"] or 0.0) > rate:
            raise UserError(f"min_lr must be at most the learning_rate {rate:g}, got {values['min_lr']:g}")
    for name in ("min_lr_rate", "warmup_lr_rate", "min_lr_ratio"):
        if (values.get(name) or 0.0) > 1:
            raise UserError(f"{name} must be at most 1, got {values[name]:g}")
    if values.get("lr_end", 0.0) >= rate and "lr_end" in values:
        raise UserError(f"lr_end must be below the learning_rate {rate:g}, got {values['lr_end']:g}")


class Schedule:
    """The learning rate of each step of a run that is planned to have `num_steps`.

    Raises UserError where a setting is wrong, or parts of the schedule are longer than the run.
    """

    def __init__(self, config: Any, num_steps: int) -> None:
        self.factor, self.settings = FACTORS[config.lr_scheduler_type], settings(config)
        self.num_steps, self.rate = num_steps, config.learning_rate
        self.warmup = config.warmup_steps if config.warmup_steps > 0 else math.ceil(num_steps * config.warmup_ratio)
        decay = self.settings.get("num_decay_steps", 0)
        if decay and self.settings["num_stable_steps"] is None and self.warmup + decay > num_steps:
            raise UserError(
                f"lr_scheduler_kwargs: {self.warmup} steps of warmup and num_decay_steps={decay} are more than the "
                f"{num_steps} steps of the run; lower num_decay_steps"
            )

    def __call__(self, step: int) -> float:
        """Of optimizer step `step`, counted from 0."""
        course = Course(step, self.num_steps, self.warmup, self.rate)
        return float(self.rate * self.factor(course, **self.settings))


@dataclass(frozen=True)
class Course:
    """Where a step is in its run."""

    step: int
    num_steps: int
    warmup: int
    rate: float

    @property
    def warming(self) -> float | None:
        """The linear warmup's factor, while it lasts."""
        return self.step / max(1, self.warmup) if self.step < self.warmup else None

    @property
    def progress(self) -> float:
        """Of what comes after the warmup."""
        return (self.step - self.warmup) / max(1, self.num_steps - self.warmup)


def warmed(factor: Callable[..., float]) -> Callable[..., float]:
    """`factor` after a linear warmup."""

    def whole(at: Course, **values: Any) -> float:
        return factor(at, **values) if at.warming is None else at.warming

    return whole


def linear(at: Course) -> float:
    return max(0.0, (at.num_steps - at.step) / max(1, at.num_steps - at.warmup))


def cosine(at: Course, num_cycles: float) -> float:
    return max(0.0, wave(at.progress, num_cycles))


def wave(progress: float, num_cycles: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))


def cosine_with_restarts(at: Course, num_cycles: int) -> float:
    if at.progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * at.progress) % 1.0))))


def lowest(at: Course, min_lr: float | None, min_lr_rate: float | None) -> float:
    """As a part of the rate."""
    if min_lr is None:
        return min_lr_rate or 0.0
    return min_lr / at.rate if at.rate else 0.0


def cosine_with_min_lr(at: Course, num_cycles: float, min_lr: float | None, min_lr_rate: float | None) -> float:
    low = lowest(at, min_lr, min_lr_rate)
    return max(0.0, wave(at.progress, num_cycles) * (1 - low) + low)


def cosine_warmup_with_min_lr(
    at: Course, num_cycles: float, min_lr: float | None, min_lr_rate: float | None, warmup_lr_rate: float | None
) -> float:
    """Its warmup begins above 0."""
    if at.step < at.warmup:
        if warmup_lr_rate is None:
            return (at.step + 1.0) / max(1.0, at.warmup)
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * at.step / max(1, at.warmup - 1)
    low = lowest(at, min_lr, min_lr_rate)
    progress = (at.step - at.warmup + 1.0) / max(1.0, at.num_steps - at.warmup)
    return max(0.0, wave(progress, num_cycles) * (1 - low) + low)


def polynomial(at: Course, lr_end: float, power: float) -> float:
    left = 1 - (at.step - at.warmup) / (at.num_steps - at.warmup)
    return ((at.rate - lr_end) * left**power + lr_end) / at.rate


def constant(at: Course) -> float:
    return 1.0


def inverse_sqrt(at: Course, timescale: int | None) -> float:
    timescale = timescale or at.warmup or 10_000
    return 1.0 / math.sqrt((at.step + timescale - at.warmup) / timescale)


def warmup_stable_decay(
    at: Course,
    num_decay_steps: int,
    num_stable_steps: int | None,
    warmup_type: str,
    decay_type: str,
    min_lr_ratio: float,
    num_cycles: float,
) -> float:
    stable = at.num_steps - at.warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    past = at.step - at.warmup - stable  # of the decay
    if at.step < at.warmup:
        part = at.step / max(1, at.warmup)
        factor = {
            "linear": part,
            "cosine": 0.5 * (1.0 - math.cos(math.pi * part)),
            "1-sqrt": 1.0 - math.sqrt(1 - part),
        }[warmup_type]
    elif past < 0:
        return 1.0
    elif past < num_decay_steps:
        part = past / max(1, num_decay_steps)
        factor = {"linear": 1.0 - part, "cosine": wave(part, num_cycles), "1-sqrt": 1.0 - math.sqrt(part)}[decay_type]
    else:
        return min_lr_ratio
    return max(0.0, factor * (1.0 - min_lr_ratio) + min_lr_ratio)


FACTORS: dict[str, Callable[..., float]] = {
    "linear": warmed(linear),
    "cosine": warmed(cosine),
    "cosine_with_restarts": warmed(cosine_with_restarts),
    "cosine_with_min_lr": warmed(cosine_with_min_lr),
    "cosine_warmup_with_min_lr": cosine_warmup_with_min_lr,
    "polynomial": warmed(polynomial),
    "constant": constant,
    "constant_with_warmup": warmed(constant),
    "inverse_sqrt": warmed(inverse_sqrt),
    "warmup_stable_decay": warmup_stable_decay,
}
