"""From the label columns of a split's sources to what is learned: class numbers, or the targets of one score."""

import math
from collections.abc import Sequence

import numpy as np

from trainer.base.arrays import smallest, taken
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.labels.classes import class_numbers, learned, scored
from trainer.labels.label_map import fold, suggested
from trainer.labels.values import MISSING, NO_CONSENSUS, Labels, Targets, finite
from trainer.options import Objective

BINARY = ("0", "1")
# A column, and what it says itself that its numbers mean.
Column = tuple[Labels, list[str] | None]


def read_targets(
    columns: Sequence[Column],
    config: DataConfig,
    objective: Objective,
    classes: Sequence[str] | None = None,
    of_model: bool = False,
) -> list[Targets]:
    """What the columns of a split's sources say; classes are the same in all of them.

    Args:
        classes: those of the training split or, with `of_model`, of a model; None = this is the training split. Of
            binary cross-entropy they are the names of 0 and 1; None = the first column's, where it has any.

    Raises UserError naming the first row that says something else.
    """
    many = next((labels for labels, _ in columns if labels.scores is not None), None)
    if many is not None and objective != "mse":
        raise UserError(f"{many.place}: the labels are numbers, and too many different ones for classes; --objective "
                        "mse learns scores, --label_column names another column")  # fmt: skip
    if objective == "cross_entropy":
        return _learned(columns, config) if classes is None else _scored(columns, config, classes, of_model)
    for name in ("label_map", "eval_label_map"):
        if getattr(config, name):
            raise UserError(f"{name} is for classes, and the model here gives one score; leave it out")
    if objective == "mse":
        return [_numbers(labels, config) for labels, _ in columns]
    found: list[Targets] = []
    for labels, own_names in columns:
        found.append(_binary(labels, config, classes or (found[0].names if found else None), own_names))
    return found


def _learned(columns: Sequence[Column], config: DataConfig) -> list[Targets]:
    """The classes of a training split: those of the source that has the most of them."""
    found = [learned(labels, config, own_names) for labels, own_names in columns]
    if len(columns) == 1:
        return found
    classes = _common(columns, [own.names for own in found]) if config.label_names is None else found[0].names
    return [learned(labels, config, own_names, classes) for labels, own_names in columns]


def _scored(columns: Sequence[Column], config: DataConfig, classes: Sequence[str], of_model: bool) -> list[Targets]:
    found = [scored(labels, config, own_names, classes, of_model) for labels, own_names in columns]
    for (labels, _), own in zip(columns, found, strict=True):
        if own.names != found[0].names:
            raise UserError(
                f"sources of one split that are scored by different classes: {columns[0][0].place} by "
                f"{', '.join(found[0].names)}, and {labels.place} by {', '.join(own.names)}; give them as test files, "
                "of which each is a set by itself"
            )
    return found


def _common(columns: Sequence[Column], found: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The names of the column that has the most. Raises UserError where another one has others."""
    most = max(range(len(found)), key=lambda number: len(found[number]))
    classes, reference = found[most], columns[most]
    known = {fold(name) for name in classes}
    for column, names in zip(columns, found, strict=True):
        if _is_numbered(column) != _is_numbered(reference):
            one, other = (column, reference) if _is_numbered(column) else (reference, column)
            raise UserError(
                f"the labels of {one[0].place} are numbers, and those of {other[0].place} are names "
                f"({', '.join(names if other is column else classes)}): write names in both, or say what the numbers "
                "mean, from 0, with --label_names"
            )
        if any(fold(name) not in known for name in names):
            with_map = f'say which class is which with --label_map "{suggested(names, classes)}", or '
            raise UserError(
                f"sources with different classes: {reference[0].place} has {', '.join(classes)}, and "
                f"{column[0].place} has {', '.join(names)}; {'' if _is_numbered(column) else with_map}name all "
                "classes, in the order of their numbers, with --label_names"
            )
    return classes


def _is_numbered(column: Column) -> bool:
    labels, own_names = column
    return own_names is None and labels.numbered


def _numbers(labels: Labels, config: DataConfig) -> Targets:
    """Any finite numbers; -1 is one of them, since no score is a word for no consensus."""
    if config.label_names:
        raise UserError("label_names is for classes, and objective mse learns numbers; leave it out")
    if labels.scores is not None:
        values, places = np.unique(labels.scores, return_inverse=True)
        return Targets(places.astype(smallest(len(values))), (), values)
    for value in labels.values:
        if math.isnan(finite(value)):
            said = "null" if value is None else repr(value)
            raise UserError(f"{labels.at(value)}: label is {said}, and objective mse needs a finite number in every "
                            "row; mend it, or leave the row out")  # fmt: skip
    numbers = np.array([float(value) for value in labels.values if value is not None], np.float32)
    values, places = np.unique(numbers, return_inverse=True)
    return Targets(taken(places.astype(smallest(len(values))), labels.codes), (), values)


def _binary(labels: Labels, config: DataConfig, classes: Sequence[str] | None, own_names: list[str] | None) -> Targets:
    """0 and 1 as numbers, text, or false and true; or two names, of which somebody says the order."""
    named = config.label_names or own_names
    if named and len(named) != 2:
        raise UserError(f"{labels.place}: binary_cross_entropy needs two labels, and has {len(named)} "
                        f"({', '.join(named[:5])}); give --label_names NEGATIVE,POSITIVE, or use objective "
                        "cross_entropy")  # fmt: skip
    if classes is not None and tuple(classes) == BINARY:
        classes = None  # which say nothing of names
    known = tuple(classes or named or BINARY)
    digits = _as_digits(labels)
    if not named and all(value is None or value in (*BINARY, *NO_CONSENSUS) for value in digits.values):
        numbers, _ = class_numbers(digits, BINARY)
        return Targets(numbers, known, np.array([0, 1], np.float32))
    if known == BINARY and not named:
        for value in digits.values:
            if value is not None and value not in (*BINARY, *NO_CONSENSUS) and value.lower() not in MISSING:
                raise UserError(f"{labels.at(value)}: label is {value!r}, and objective binary_cross_entropy needs 0 "
                                "and 1; of two names say which is which by --label_names NEGATIVE,POSITIVE, of other "
                                "numbers --objective mse makes scores")  # fmt: skip
    numbers, names = class_numbers(labels, known, config.label_names, own_names)
    return Targets(numbers, names, np.array([0, 1], np.float32))


def _as_digits(labels: Labels) -> Labels:
    """false and true as 0 and 1."""
    digits = {"false": "0", "true": "1"}
    return labels.renamed([value if value is None else digits.get(value.lower(), value) for value in labels.values])
