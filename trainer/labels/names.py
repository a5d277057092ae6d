"""Names of classes where nobody lists them: what a column's names make, and what its numbers mean."""

import difflib
import re
from collections.abc import Sequence
from statistics import median

from trainer.base.arrays import counted
from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.labels.label_map import OPPOSITE, fold, shown
from trainer.labels.values import NLI, Labels

MANY = 100  # classes: of so many, some may well be in one row only
FEW = 20  # rows, of which none may be of a class by chance


def names_of(labels: Labels, texts: list[str]) -> tuple[str, ...]:
    """The classes that names without a list of classes make. Raises UserError where one seems to be a slip."""
    if texts and {text.lower() for text in texts} <= {"true", "false"}:
        raise UserError(
            f"{labels.at(texts[0])}: label is {texts[0]}, which says nothing of the classes; write names, or give "
            "--label_names False,True"
        )
    _check_strays(labels, texts)
    strange = [text for text in texts if text.lower() not in NLI]
    if strange and set(NLI) <= {text.lower() for text in texts}:
        raise UserError(f"{labels.at(strange[0])}: label {strange[0]!r} stands beside {shown(NLI)}; mend it, or name "
                        "all classes with --label_names")  # fmt: skip
    return tuple(sorted(texts, key=lambda text: (NLI.index(fold(text)) if not strange else 0, text)))


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
    return re.sub("[ _-]", " ", "not entailment" if OPPOSITE.fullmatch(fold(text)) else fold(text))


def one_spelling(labels: Labels) -> Labels:
    """Names that differ in case alone become the one that most rows have."""
    rows = counted(labels.codes, len(labels.values)).tolist()
    usual: dict[str, tuple[int, str]] = {}
    for name, count in zip(labels.values, rows, strict=True):
        if name is not None and count > usual.get(fold(name), (0, ""))[0]:
            usual[fold(name)] = count, name
    return labels.renamed([None if name is None else usual[fold(name)][1] for name in labels.values])


def _nli_order(names: list[str]) -> list[str]:
    """`names` as entailment, neutral, contradiction if they are that in any case and order; else as they are."""
    return sorted(names, key=lambda n: NLI.index(fold(n))) if {fold(n) for n in names} == set(NLI) else names


def before_map(classes: Sequence[str], label_map: dict[str, str]) -> tuple[str, ...]:
    """NLI's three classes, where these are what `classes` were before a map."""
    return NLI if label_map and {*NLI} <= {fold(name) for name in (*classes, *label_map)} else tuple(classes)


def meaning_of(
    labels: Labels,
    numbers: dict[str, int | float],
    named: Sequence[str] | None,
    known: tuple[str, ...],
    of_model: bool,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The name of each number, and those of all, from 0; `named` is what they mean, where somebody says it."""
    whole = {text: number for text, number in numbers.items() if isinstance(number, int)}
    if scores := [text for text in numbers if text not in whole]:
        raise UserError(f"{labels.at(scores[0])}: labels such as {scores[0]} are scores, not classes; --objective mse "
                        "learns a score; or make classes of them, numbered from 0")  # fmt: skip
    named = named or _numbered(labels, whole, known, of_model)
    for text, number in whole.items():
        if not 0 <= number < len(named):
            raise UserError(f"{labels.at(text)}: label {text} is outside the classes 0..{len(named) - 1} "
                            f"({shown(named)}); names count from 0, and -1 is a pair without label")  # fmt: skip
    return {text: named[number] for text, number in whole.items()}, tuple(named)


def _numbered(labels: Labels, numbers: dict[str, int], known: tuple[str, ...], of_model: bool) -> Sequence[str]:
    """What numbers mean where nobody says it: the usual order of NLI, or their places among the `known` classes.

    Raises UserError where they may as well mean something else.
    """
    found = sorted(number for number in numbers.values() if number >= 0)
    listed = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
    if not known:
        if found and len(found) <= found[-1]:
            names = listed.replace(", ", ",")
            raise UserError(f"{labels.at(str(found[-1]))}: class numbers must run from 0 without gaps, found {listed}; "
                            f"write names, or call the classes so: --label_names {names}")  # fmt: skip
        _check_strays(labels, list(numbers))
        return NLI if len(found) == 3 else [f"LABEL_{i}" for i in range(len(found))]
    usual = {fold(name) for name in known} == set(NLI)
    if not usual and known != tuple(f"LABEL_{i}" for i in range(len(known))):
        if not of_model:
            raise UserError(f"{labels.at(next(iter(numbers)))}: the labels here are numbers, and those of the training "
                            f"pairs are names ({shown(known)}); write names here too, or say what the numbers mean, "
                            "from 0, with --label_names")  # fmt: skip
        meaning = ", ".join(f"{number} = {known[number]}" for number in found[:5] if number < len(known))
        log.info(f"{labels.place}: its labels are taken as the model numbers its classes: {meaning}")
    two = usual and found == [0, 1]  # as RTE and others have it; of a few rows none may be of the third class
    # They may be those of fewer classes, or count from 1. 0 and 2 can only lack a class, as a small file may by chance.
    if (of_model and found and (found[0] > 0 or found[-1] + 1 == len(found) < len(known))) or (
        two and len(labels.codes) > FEW
    ):
        names, further = "names here", ", such as entailment and not_entailment"
        if of_model:
            names = "what the numbers mean, from 0, with --label_names"
            further = f"{' entailment,not_entailment' if two else ''}"
        raise UserError(f"{labels.place}: its labels are the numbers {listed}, the model has {len(known)} classes "
                        f"({shown(known)}); say {names}{further}")  # fmt: skip
    return _nli_order(list(known))
