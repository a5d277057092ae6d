"""From a column of class names or numbers to class numbers, with the classes' names.

A label means the same in every kind of file: 1, 1.0 and "1" are one class, -1 and "-" are no consensus. So a column
becomes text first, and all is decided on its distinct values.
"""

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError, unknown
from trainer.base.log import log
from trainer.data.tables import MIXED, values_of

NLI = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = ("-", "-1")
MANY = 100  # classes: of so many, some may well be in one row only
MISSING = ("", "nan", "<na>", "null", "none", "na", "n/a", "#n/a", "?")


@dataclass(frozen=True)
class Labels:
    """A column as its distinct values. `values` (None = null) are in the order of their first rows."""

    place: str
    values: list[str | None]
    codes: np.ndarray  # (n,) positions in `values`

    def at(self, value: str | None) -> str:
        """The first row that has it."""
        return f"{self.place}, row {int(np.argmax(self.codes == self.values.index(value)))}"

    def count(self, value: str | None) -> int:
        return int((self.codes == self.values.index(value)).sum())

    @property
    def missing(self) -> bool:
        """Whether no row says anything of its class."""
        return all(v is None or v in NO_CONSENSUS or v.lower() in MISSING for v in self.values)


def read_labels(column: pa.ChunkedArray, place: str) -> Labels:
    """Raises UserError where a row's label is neither text nor number."""
    if column.type == MIXED:
        column = _scalars(column, place)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):  # as a csv file says it
        column = pc.if_else(column, "True", "False")
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    except pa.ArrowException:
        rows = np.flatnonzero(column.is_valid().to_numpy())
        raise UserError(
            f"{place}, row {rows[0] if len(rows) else 0}: label must be a class name or number, found {column.type}"
        ) from None
    distinct = texts.unique()
    codes = pc.index_in(texts, distinct).to_numpy()
    values = [None if v is None else _plain(v) for v in distinct.to_pylist()]
    position = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return Labels(place, list(position), np.array([position[value] for value in values], np.int64)[codes])


def _scalars(column: pa.ChunkedArray, place: str) -> pa.ChunkedArray:
    values = values_of(column)
    for row, value in enumerate(values):
        if isinstance(value, (list, dict)):
            raise UserError(f"{place}, row {row}: label must be a class name or number, found {json.dumps(value)}")
    return pa.chunked_array([pa.array([_text(v) for v in values], pa.large_string())])


def _text(value: str | float | None) -> str | None:
    """Half of a surrogate pair is no text: it becomes a name that says so."""
    return None if value is None else str(value).encode("utf-8", "backslashreplace").decode()


def _number(text: str) -> float | int | None:
    """What a number says; None for a name, and for python's own spellings such as 1_000 and nan."""
    try:
        number = float(text)
    except ValueError:
        return None
    if math.isnan(number) or "_" in text:
        return None
    if not number.is_integer():
        return number
    return int(text) if text.lstrip("+-").isdigit() else int(number)


def _plain(text: str) -> str:
    """1.0, 01 and +1 are 1; an accent is a part of its letter, however the file writes it."""
    number = _number(text)
    return str(number) if isinstance(number, int) else unicodedata.normalize("NFC", text)


def class_numbers(
    labels: Labels,
    classes: Sequence[str] | None = None,
    label_names: list[str] | None = None,
    own_names: list[str] | None = None,
    of_model: bool = False,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each row, -1 where there is no consensus; and the classes' names.

    Args:
        classes: those of the training split or, with `of_model`, of a model; None = what the column holds.
        label_names: as the user gives them: the classes, or what the column's numbers mean, counted from 0.
        own_names: what the column itself says that its numbers mean.
    """
    known = tuple(classes or label_names or own_names or ())
    place = {_plain(name): number for number, name in enumerate(known) if own_names is None}
    for names in (label_names, own_names):
        if strange := [name for name in names or () if name not in known]:
            raise UserError(f"{labels.place}: its classes ({_shown(names or ())}) include {strange[0]!r}, which is not "
                            f"among {_shown(known)}")  # fmt: skip
    # What is named is a class, whatever it is called.
    seen = [value for value in labels.values if value in place or value not in NO_CONSENSUS]
    texts = [value for value in seen if value is not None]
    if lacking := [value for value in seen if value is None or (value not in place and value.lower() in MISSING)]:
        what = "null" if lacking[0] is None else f"missing ({lacking[0]})" if lacking[0] else "empty"
        raise UserError(f"{labels.at(lacking[0])}: label is {what}; write -1 where a pair has none, and it is left "
                        "out; a class of that name must be among --label_names")  # fmt: skip
    numbers = {text: number for text in texts if (number := _number(text)) is not None}
    # Classes that are called by numbers are meant by these, not by their places: 1 to 5 are 1 to 5.
    if known and own_names is None and (not numbers or any(_number(name) is not None for name in known)):
        for text in texts:
            if text not in place:
                raise UserError(f"{labels.at(text)}: {unknown('label', text, known)}")
        meaning = place
    elif not numbers:
        known = known or _names(labels, texts)
        meaning = {name: number for number, name in enumerate(known)}
    elif len(numbers) < len(texts):
        first, name = next(iter(numbers)), next(text for text in texts if text not in numbers)
        row = labels.at(name).split(", ")[-1]
        raise UserError(f"{labels.at(first)}: label {first} is a number, and {name!r} in {row} is a name; write all "
                        "labels as names, or all as numbers")  # fmt: skip
    else:
        meaning, known = _from_numbers(labels, numbers, own_names or label_names, known, of_model)
    table = np.array([-1 if value is None else meaning.get(value, -1) for value in labels.values], np.int64)
    return table[labels.codes], known


def _names(labels: Labels, texts: list[str]) -> tuple[str, ...]:
    """The classes that names without a list of classes make. Raises UserError where one seems to be a slip."""
    if texts and {text.lower() for text in texts} <= {"true", "false"}:
        raise UserError(
            f"{labels.at(texts[0])}: label is {texts[0]}, which says nothing of the classes; write names, or give "
            "--label_names False,True"
        )
    _check_strays(labels, texts)
    strange = [text for text in texts if text.lower() not in NLI]
    if strange and set(NLI) <= {text.lower() for text in texts}:
        raise UserError(f"{labels.at(strange[0])}: label {strange[0]!r} stands beside {_shown(NLI)}; mend it, or name "
                        "all classes with --label_names")  # fmt: skip
    return tuple(name for name in NLI if name in texts) if set(texts) <= set(NLI) else tuple(_nli_order(sorted(texts)))


def _check_strays(labels: Labels, texts: list[str]) -> None:
    """Raises UserError for a name that is hardly a class: another one misspelt, or in next to no row."""
    if not 2 <= len(texts) <= MANY:
        return
    counts = {text: labels.count(text) for text in texts}
    usual = median(counts.values())
    for text in sorted(texts, key=counts.__getitem__):
        others = [other for other in texts if other != text and counts[other] >= counts[text]]
        same = [other for other in others if _bare(other) == _bare(text)]
        likely = (*NLI, *(other for other in others if counts[other] >= 10 * counts[text]))
        near = difflib.get_close_matches(text.lower(), likely, 1, 0.9) if text.lower() not in NLI else []
        # What differs in nothing but a number, as class_11 and class_12, is no slip.
        meant = same or [other for other in near if re.sub("[0-9]", "", other) != re.sub("[0-9]", "", text)]
        if meant or (len(texts) > 2 and counts[text] <= usual / 100):
            hint = f" (did you mean {meant[0]!r}?)" if meant else ""
            raise UserError(
                f"{labels.at(text)}: label {text!r} is in {counts[text]:,} of {len(labels.codes):,} rows{hint}; mend "
                "it, or name all classes with --label_names"
            )


def _bare(text: str) -> str:
    """A name as anyone may write it."""
    return re.sub("[ _-]", " ", text.lower())


def _nli_order(names: list[str]) -> list[str]:
    """`names` as entailment, neutral, contradiction if they are that in any case and order; else as they are."""
    return sorted(names, key=lambda n: NLI.index(n.lower())) if {n.lower() for n in names} == set(NLI) else names


def _from_numbers(
    labels: Labels,
    numbers: dict[str, int | float],
    named: Sequence[str] | None,
    known: tuple[str, ...],
    of_model: bool,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Place of each number among the classes, and these; `named` is what the numbers mean, where somebody says it."""
    whole = {text: number for text, number in numbers.items() if isinstance(number, int)}
    if scores := [text for text in numbers if text not in whole]:
        raise UserError(f"{labels.at(scores[0])}: labels such as {scores[0]} are scores, not classes; learn them by "
                        "--objective mse, or make classes of them, numbered from 0")  # fmt: skip
    named = named or _numbered(labels, whole, known, of_model)
    for text, number in whole.items():
        if not 0 <= number < len(named):
            raise UserError(f"{labels.at(text)}: label {text} is outside the classes 0..{len(named) - 1} "
                            f"({_shown(named)}); names count from 0, and -1 is a pair without label")  # fmt: skip
    known = known or tuple(named)
    return {text: known.index(named[number]) for text, number in whole.items()}, known


def _numbered(labels: Labels, numbers: dict[str, int], known: tuple[str, ...], of_model: bool) -> Sequence[str]:
    """What numbers mean where nobody says it: the usual order of NLI, or their places among the `known` classes.

    Raises UserError where they may as well mean something else.
    """
    found = sorted(number for number in numbers.values() if number >= 0)
    shown = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
    if not known:
        if found and len(found) <= found[-1]:
            names = shown.replace(", ", ",")
            raise UserError(f"{labels.at(str(found[-1]))}: class numbers must run from 0 without gaps, found {shown}; "
                            f"write names, or call the classes so: --label_names {names}")  # fmt: skip
        _check_strays(labels, list(numbers))
        return NLI if len(found) == 3 else [f"LABEL_{i}" for i in range(len(found))]
    if {name.lower() for name in known} != set(NLI) and known != tuple(f"LABEL_{i}" for i in range(len(known))):
        if not of_model:
            raise UserError(f"{labels.at(next(iter(numbers)))}: the labels here are numbers, and those of the training "
                            f"pairs are names ({_shown(known)}); write names here too, or say what the numbers mean, "
                            "from 0, with --label_names")  # fmt: skip
        meaning = ", ".join(f"{number} = {known[number]}" for number in found[:5] if number < len(known))
        log.info(f"{labels.place}: its labels are taken as the model numbers its classes: {meaning}")
    # They may be those of fewer classes, or count from 1. 0 and 2 can only lack a class, as a small file may by chance.
    if of_model and found and (found[0] > 0 or found[-1] + 1 == len(found) < len(known)):
        raise UserError(f"{labels.place}: its labels are the numbers {shown}, the model has {len(known)} classes "
                        f"({_shown(known)}); say what the numbers mean, from 0, with --label_names")  # fmt: skip
    return _nli_order(list(known))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
