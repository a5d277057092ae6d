"""Which names are one class: those that differ in case alone, and those that a label map takes as one.

A map is applied once, so `a=b,b=a` swaps two classes. What is plain needs none: see `obvious`.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from trainer.base.errors import UserError
from trainer.labels.values import NLI, plain

OPPOSITE = re.compile(r"no[nt][ _-]?entailment")  # of entailment, as RTE, QNLI, HANS and others write it


def fold(name: str) -> str:
    """The same for all spellings of a class."""
    return plain(name.strip()).casefold()


def finder(names: Iterable[str]) -> Callable[[str], str | None]:
    """What finds the one of `names` that is meant: that very name, else the only one that differs in case alone."""
    own, spelled = set(names), defaultdict(list)
    for name in own:
        spelled[fold(name)].append(name)

    def find(name: str) -> str | None:
        same = [name] if name in own else spelled.get(fold(name), [])
        return same[0] if len(same) == 1 else None

    return find


def replaced(names: Iterable[str], label_map: dict[str, str]) -> list[str]:
    """What each of `names` is taken as."""
    find = finder(label_map)
    return [name if (own := find(name)) is None else label_map[own] for name in names]


def images(classes: Sequence[str], label_map: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes that a map makes of `classes`, in order of first appearance; and of each the number of its own.

    A target that is one of `classes` in another case is that class.
    """
    find, spelled = finder(classes), dict[str, str]()
    targets = [find(name) or spelled.setdefault(fold(name), name) for name in replaced(classes, label_map)]
    made = list(dict.fromkeys(targets))
    return tuple(made), np.array([made.index(name) for name in targets], np.int64)


def obvious(names: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """The map that nobody needs to say, empty where there is none.

    It is that of NLI's three classes to entailment and its opposite, where the model's `classes` are the one and a
    set's `names` are among the other.
    """
    theirs, ours = ({fold(name): name for name in side} for side in (names, classes))
    for three, two in ((ours, theirs), (theirs, ours)):
        opposite = [key for key in two if OPPOSITE.fullmatch(key)]
        full = len(ours) == (3 if three is ours else 2)
        if full and len(opposite) == 1 and three.keys() <= {*NLI} and two.keys() <= {"entailment", *opposite}:
            return {three[key]: two[opposite[0]] for key in NLI[1:] if key in three}
    return {}


# What corpora call NLI's classes: ANLI, FEVER, SciTail.
ALSO = {"e": NLI[0], "n": NLI[1], "c": NLI[2], "entails": NLI[0], "supports": NLI[0], "refutes": NLI[2],
        "contradicts": NLI[2], "not enough info": NLI[1]}  # fmt: skip


def suggested(names: Sequence[str], classes: Sequence[str]) -> str:
    """A map from the names of one source to the classes of another, as far as anybody can tell."""
    if plain := obvious(names, classes):
        return ",".join(f"{name}={target}" for name, target in plain.items())
    find = finder(classes)
    return ",".join(f"{name}={find(ALSO.get(fold(name), '')) or '...'}" for name in names if find(name) is None)


def map_of_set(
    names: Sequence[str], classes: Sequence[str], label_map: dict[str, str], everywhere: bool
) -> dict[str, str]:
    """The map by which a set of these `names` is scored by a model of these `classes`; empty = as it is.

    A map that is for the sets that need one leaves alone a set whose names are all classes of the model: scores of
    fewer classes would be asked of a set that has them all. It is for one that has the very classes which it makes,
    such as SciTail's entailment and neutral. Where the given map does not lead to a set's names, the obvious one is
    tried: so one command scores sets that need several.
    """
    find, named = finder(classes), finder(label_map)
    complete = all(find(name) is not None for name in names)
    if complete and not everywhere:
        made = {fold(name) for name in images(classes, label_map)[0]}
        return label_map if len(made) < len(classes) and made == {fold(name) for name in names} else {}
    plain = {} if complete else obvious(names, classes)
    if all(named(name) is None for name in (*names, *classes)):
        return plain
    # One that says what becomes of all that the obvious one names is meant for this set, and may be misspelt.
    others = bool(plain) and not all(named(name) is not None for name in plain)
    return plain if others and not everywhere and not _fits(names, classes, label_map) else label_map


def _fits(names: Sequence[str], classes: Sequence[str], label_map: dict[str, str]) -> bool:
    """Whether a map makes of the model's classes what it makes of a set's names."""
    find = finder(images(classes, label_map)[0])
    return all(find(name) is not None for name in replaced(names, label_map))


def check_known(field: str, label_map: dict[str, str], known: Sequence[str], where: str) -> None:
    """Raises UserError for a name on the left of a map that is not `known`; `where` says whose names these are."""
    find, spelled = finder(known), {fold(name): name for name in known}
    for name in label_map:
        if find(name) is None:
            near = difflib.get_close_matches(fold(name), spelled, n=1)
            hint = f"; did you mean {spelled[near[0]]!r}?" if near else ""
            raise UserError(f"{field} maps {name!r}, which is no class of {where} ({shown([*spelled.values()])}){hint}")


def check_whole(
    place: str, field: str, label_map: dict[str, str], classes: Sequence[str], names: Sequence[str]
) -> None:
    """Raises UserError where a map of the model's `classes` is not meant for a set of these `names`."""
    made, of_class = images(classes, label_map)
    if len(made) == 1:
        raise UserError(f"{place}: {field} takes all classes ({shown(classes)}) as {made[0]!r}: there is nothing to "
                        "score; leave one as it is")  # fmt: skip
    if not in_words(label_map, classes):
        return  # it is of the data's names alone
    in_map, in_data = finder(label_map), finder(images(names, label_map)[0])
    for name, number in zip(classes, of_class, strict=True):
        if in_map(name) is None and in_data(made[number]) is None and (of_class == number).sum() == 1:
            if field == "label_map":  # it may be misspelt; the other one may name what other sets have
                check_known(field, label_map, [*names, *classes], f"{place} or the model")
            raise UserError(f"{place}: {name} is mapped to nothing, and no class here ({shown(names)}) is called so; "
                            f"map it too with {field}, or to itself: {name}={name}")  # fmt: skip


def in_words(label_map: dict[str, str], names: Iterable[str]) -> str:
    """`neutral, contradiction as not_entailment`: which of `names` are taken as another class."""
    together: dict[str, list[str]] = {}
    for name, target in zip(names := [*names], replaced(names, label_map), strict=True):
        if fold(name) != fold(target) and name not in together.setdefault(target, []):
            together[target].append(name)
    return "; ".join(f"{', '.join(own)} as {target}" for target, own in together.items() if own)


def shown(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
