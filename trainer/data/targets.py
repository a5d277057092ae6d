"""From a column of labels to what is learned: class numbers, or the targets of one score.

Of one score the targets are a small table of numbers, and each pair has its place there. So a batch carries an integer
a pair whatever is learned, and -100 for a pair that only fills up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.labels import MISSING, NO_CONSENSUS, Labels, class_numbers
from trainer.options import Objective

BINARY = ("0", "1")


@dataclass(frozen=True)
class Targets:
    """Of n rows.

    Attributes:
        label: (n,) class numbers, or places in `values`; -1 where there is no consensus.
        names: of the classes, or of the labels 0 and 1; of numbers none.
        values: float32, ascending; None = there are classes.
    """

    label: np.ndarray
    names: tuple[str, ...]
    values: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: "Sequence[Targets]", rows: Sequence[np.ndarray]) -> "Targets":
        """Those of some rows of each part, one part after the other. Of numbers only those that occur are kept."""
        names, values = parts[0].names, parts[0].values
        if values is None or names:
            return cls(np.concatenate([own.label[some] for own, some in zip(parts, rows, strict=True)]), names, values)
        numbers = [own.values[own.label[some]] for own, some in zip(parts, rows, strict=True) if own.values is not None]
        values, label = np.unique(np.concatenate(numbers), return_inverse=True)
        return cls(label, names, values)


def read_targets(
    labels: Labels,
    config: DataConfig,
    objective: Objective,
    classes: Sequence[str] | None = None,
    own_names: list[str] | None = None,
    of_model: bool = False,
) -> Targets:
    """What a column of labels says. For the arguments see labels.class_numbers; `classes` of binary cross-entropy are
    the names of 0 and 1, of which a model knows nothing. Raises UserError naming the first row that says something
    else."""
    if objective == "cross_entropy":
        return Targets(*class_numbers(labels, classes, config.label_names, own_names, of_model))
    for name in ("label_map", "eval_label_map"):
        if getattr(config, name):
            raise UserError(f"{name} is for classes, and the model here gives one score; leave it out")
    if objective == "mse":
        return _numbers(labels, config)
    return _binary(labels, config, None if of_model else classes, own_names)


def _numbers(labels: Labels, config: DataConfig) -> Targets:
    """Any finite numbers; -1 is one of them, since no score is a word for no consensus."""
    if config.label_names:
        raise UserError("label_names is for classes, and objective mse learns numbers; leave it out")
    for value in labels.values:
        try:
            number = float("nan" if value is None or "_" in value else value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
            said = "null" if value is None else repr(value)
            raise UserError(f"{labels.at(value)}: label is {said}, and objective mse needs a finite number in every "
                            "row; mend it, or leave the row out")  # fmt: skip
    numbers = np.array([float(value) for value in labels.values if value is not None], np.float32)
    values, places = np.unique(numbers, return_inverse=True)
    return Targets(places[labels.codes], (), values)


def _binary(labels: Labels, config: DataConfig, classes: Sequence[str] | None, own_names: list[str] | None) -> Targets:
    """0 and 1 as numbers, text, or false and true; or two names, of which somebody says the order."""
    named = config.label_names or own_names
    if named and len(named) != 2:
        raise UserError(f"{labels.place}: binary_cross_entropy needs two labels, and has {len(named)} "
                        f"({', '.join(named[:5])}); give --label_names NEGATIVE,POSITIVE, or use objective "
                        "cross_entropy")  # fmt: skip
    known = tuple(classes or named or BINARY)
    if known == BINARY and not named:
        labels = _as_digits(labels)
        for value in labels.values:
            if value is not None and value not in (*BINARY, *NO_CONSENSUS) and value.lower() not in MISSING:
                raise UserError(f"{labels.at(value)}: label is {value!r}, and objective binary_cross_entropy needs 0 "
                                "and 1; of two names say which is which by --label_names NEGATIVE,POSITIVE, of other "
                                "numbers --objective mse makes scores")  # fmt: skip
    numbers, names = class_numbers(labels, known, config.label_names, own_names)
    return Targets(numbers, names, np.array([0, 1], np.float32))


def _as_digits(labels: Labels) -> Labels:
    """false and true as 0 and 1."""
    digits = {"false": "0", "true": "1"}
    values = [value if value is None else digits.get(value.lower(), value) for value in labels.values]
    place = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return Labels(labels.place, list(place), np.array([place[value] for value in values], np.int64)[labels.codes])
