"""What a column of labels means: the classes' names, and the number of each row's class.

The way of a label: a number gets its name, label maps replace names, and only then the classes are settled. Names
match whatever their case.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.base.arrays import smallest, taken
from trainer.base.errors import UserError, unknown
from trainer.base.fields import mapped
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.labels.label_map import (
    check_known,
    check_whole,
    finder,
    fold,
    images,
    in_words,
    map_of_set,
    replaced,
    shown,
)
from trainer.labels.names import before_map, meaning_of, names_of, one_spelling
from trainer.labels.values import MISSING, NO_CONSENSUS, Labels, Targets, number_in


@dataclass(frozen=True)
class Named:
    """A column whose values are names, and None where there is no consensus.

    Attributes:
        claims: what somebody says that the classes are: the user, then the column itself. For numbers never empty.
        numeric: whether the names are what numbers mean.
    """

    labels: Labels
    claims: tuple[tuple[str, ...], ...]
    numeric: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The classes of numbers, else those that there are rows of."""
        return self.claims[-1] if self.numeric else tuple(name for name in self.labels.values if name is not None)

    def mapped(self, label_map: dict[str, str]) -> "Named":
        targets = iter(replaced([name for name in self.labels.values if name is not None], label_map))
        labels = self.labels.renamed([None if name is None else next(targets) for name in self.labels.values])
        return replace(self, labels=labels, claims=tuple(images(claim, label_map)[0] for claim in self.claims))


def class_numbers(
    labels: Labels,
    classes: Sequence[str] | None = None,
    label_names: list[str] | None = None,
    own_names: list[str] | None = None,
    of_model: bool = False,
    *,
    label_map: dict[str, str] | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each row, -1 where there is no consensus; and the classes' names. Raises UserError.

    Args:
        classes: those of the training split or, with `of_model`, of a model; None = what the column holds.
        label_names: as the user gives them: the classes, or what the column's numbers mean, counted from 0.
        own_names: what the column itself says that its numbers mean.
        label_map: what names are replaced by; `classes` are those that it makes.
    """
    found = _named(labels, classes, label_names, own_names, of_model, label_map or {})
    return _settled(found.mapped(label_map or {}), classes)


def learned(
    labels: Labels, config: DataConfig, own_names: list[str] | None, classes: Sequence[str] | None = None
) -> Targets:
    """The classes of training pairs, once label_map has replaced their names.

    `classes` are those of the sources that were read before. What label_map names must be in one of them all:
    label_map.check_known says so, once all are read. Raises UserError.
    """
    label_map = mapped(config.label_map)
    found = _named(labels, classes, config.label_names, own_names, False, label_map)
    numbers, names = _settled(found.mapped(label_map), classes)
    words = in_words(label_map, found.names)
    return Targets(numbers, names, said=found.names, mapped=words)


def scored(
    labels: Labels, config: DataConfig, own_names: list[str] | None, classes: Sequence[str], of_model: bool
) -> Targets:
    """The classes of pairs that are scored by a model of these `classes`: the model's, or what a map makes of them.

    For a trained model (`of_model`) label_map is of the data and the model, on every set. In a run, whose model has
    the classes that it makes, it is of the data. eval_label_map is of both on the sets that need it: see
    label_map.map_of_set. Raises UserError where a set cannot be scored so.
    """
    label_map, eval_map = mapped(config.label_map), mapped(config.eval_label_map)
    field, given = ("label_map", label_map) if of_model and label_map else ("eval_label_map", eval_map)
    before = {} if of_model else label_map
    said = _named(labels, classes, config.label_names, own_names, of_model, before | given)
    found = said.mapped(before)
    own = map_of_set(found.names, classes, given, everywhere=field == "label_map")
    if given and own == given:
        check_whole(labels.place, field, given, classes, found.names)
    elif given and in_words(given, [*found.names, *classes]) and not own:
        log.info(f"{labels.place}: {field} is not needed: its labels are classes of the model")
    made, of_class = images(classes, own)
    if own:
        _check_targets(found, own, field, classes, made)
    numbers, _ = _settled(found.mapped(own), made)
    words = "; ".join(filter(None, (in_words(before, said.names), in_words(own, [*found.names, *classes]))))
    return Targets(
        numbers, made, said=said.names, of_class=of_class if len(made) < len(classes) else None, mapped=words
    )


def _check_targets(
    found: Named, label_map: dict[str, str], field: str, classes: Sequence[str], made: tuple[str, ...]
) -> None:
    """Raises UserError for a label that is none of the classes that a map makes of the model's."""
    labels, find = found.mapped(label_map).labels, finder(made)
    for name in labels.values:
        if name is not None and find(name) is None:
            if field == "label_map":  # the other one may name what other sets have: sources.check_maps
                check_known(field, label_map, [*found.names, *classes], f"{labels.place} or the model")
            raise UserError(f"{labels.at(name)}: label {name!r} is none of {shown(made)}, which {field} makes of the "
                            f"model's {shown(classes)}; the labels here are {shown(found.names)}")  # fmt: skip


def _named(
    labels: Labels,
    classes: Sequence[str] | None,
    label_names: list[str] | None,
    own_names: list[str] | None,
    of_model: bool,
    label_map: dict[str, str],
) -> Named:
    """The column with the names of its numbers; see class_numbers. Names are still as they are written."""
    # What is named is a class, whatever it is called.
    called = {fold(name) for name in (*(classes or ()), *(label_names or ()), *label_map)} if own_names is None else {}
    seen = [value for value in labels.values if value not in NO_CONSENSUS or fold(value) in called]
    texts = [value for value in seen if value is not None]
    if lacking := [v for v in seen if v is None or (v.lower() in MISSING and fold(v) not in called)]:
        what = "null" if lacking[0] is None else f"missing ({lacking[0]})" if lacking[0] else "empty"
        raise UserError(f"{labels.at(lacking[0])}: label is {what}; write -1 where a pair has none, and it is left "
                        "out; a class of that name must be among --label_names")  # fmt: skip
    numbers = {text: number for text in texts if (number := number_in(text)) is not None}
    claims = tuple(tuple(names) for names in (label_names, own_names) if names)
    # Classes that are called by numbers are meant by these, not by their places: 1 to 5 are 1 to 5.
    by_number = own_names is None and any(number_in(name) is not None for name in label_names or classes or ())
    if not numbers or by_number:
        kept = {*texts}
        return Named(labels.renamed([value if value in kept else None for value in labels.values]), claims, False)
    if len(numbers) < len(texts):
        first, name = next(iter(numbers)), next(text for text in texts if text not in numbers)
        row = labels.at(name).split(", ")[-1]
        raise UserError(f"{labels.at(first)}: label {first} is a number, and {name!r} in {row} is a name; write all "
                        "labels as names, or all as numbers")  # fmt: skip
    meaning, order = meaning_of(
        labels, numbers, own_names or label_names, before_map(classes or (), label_map), of_model
    )
    return Named(
        labels.renamed([None if value is None else meaning.get(value) for value in labels.values]),
        claims or (order,),
        True,
    )


def _settled(found: Named, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each row, and the classes' names: `classes`, else what is claimed, else what is there."""
    labels = found.labels
    known = tuple(classes or next(iter(found.claims), ()))
    if not known:
        labels = one_spelling(labels)
        known = names_of(labels, [name for name in labels.values if name is not None])
    find, number = finder(known), {name: number for number, name in enumerate(known)}
    own = [None if name is None else find(name) for name in labels.values]
    strange = [name for name, known_as in zip(labels.values, own, strict=True) if name is not None and known_as is None]
    for claim in found.claims:
        # Names of numbers say nothing of a column of names that are all known.
        if (other := [name for name in claim if find(name) is None]) and (found.numeric or strange):
            raise UserError(f"{labels.place}: its classes ({shown(claim)}) include {other[0]!r}, which is not among "
                            f"{shown(known)}")  # fmt: skip
    if strange:
        hint = ""
        if known == tuple(f"LABEL_{i}" for i in range(len(known))):
            hint = "; say what the numbers of the training pairs mean, from 0, with --label_names"
        raise UserError(f"{labels.at(strange[0])}: {unknown('label', strange[0], known)}{hint}")
    numbers = np.array([-1 if name is None else number[name] for name in own], smallest(len(known)))
    return taken(numbers, labels.codes), known
