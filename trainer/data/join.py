"""The sources of a split as one: their classes, their order, and which of their pairs are used.

Sources stand one after the other. Their classes are those of the source that has the most of them; all others' must be
among these, by name. All of it is decided on codes; no text is looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.base.arrays import counted, places, smallest, taken
from trainer.base.arrays import parts as parts_of
from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data.pairs import Pairs, Spooled
from trainer.data.spool import SOURCES, SPLITS, Spool
from trainer.data.spooling import MOST_SOURCES
from trainer.labels.names import FEW
from trainer.labels.targets import read_targets
from trainer.labels.values import Targets
from trainer.options import Objective
from trainer.rows.places import Place, at
from trainer.rows.splits import Role

# AllNLI's splits by their number of rows, and the row where SNLI ends and MultiNLI begins: it has no column for that.
ALLNLI = {942069: 549367, 19657: 9842, 19656: 9824}


@dataclass(frozen=True)
class Part:
    """A source of a split: what it is called, and its rows. Raises UserError where they are of several splits."""

    source: str
    spool: Spool

    def __post_init__(self) -> None:
        if len(own := self.spool.splits) > 1:
            raise UserError(f"{self.place}: its column {SPLITS} says that it holds several splits ({', '.join(own)}); "
                            "write each into its own file, so that none is trained on that is tested on")  # fmt: skip

    @property
    def place(self) -> Place:
        return self.spool.place


def join(
    parts: list[Part],
    config: DataConfig,
    role: Role,
    classes: Sequence[str] | None,
    of_model: bool = False,
    objective: Objective = "cross_entropy",
) -> Pairs:
    """The split that `parts` make. Raises UserError naming the row that is bad."""
    labelled = [(part.spool.labels, part.spool.own_names) for part in parts]
    targets = read_targets(labelled, config, objective, classes, of_model)
    numbers = [own.label for own in targets]
    _check_labelled(parts, numbers)
    _say_uncounted(parts, config, role)
    kept, sources = _kept(parts, numbers, config, role)
    place = Place.joined([part.place for part in parts], [len(own) for own in numbers])
    starts = np.cumsum([0, *map(len, numbers)])
    for part, chosen in zip(parts, kept, strict=True):
        _check_texts(part, chosen)
    found = Targets.joined(targets, kept)
    _say_absent(place, found.label, found.names, scored=classes is not None)
    if found.mapped:
        log.info(f"{place}: {'taken' if classes is None else 'scored'} with {found.mapped}")
    row = _in_all(kept, starts)
    return Pairs(
        name=place,
        row=row,
        texts=Spooled(tuple(part.spool.held.path for part in parts), row),
        label=found.label.astype(smallest(int(found.label.max(initial=0))), copy=False),
        source=None if sources is None else sources[0],
        label_names=found.names,
        source_names=() if sources is None else sources[1],
        num_dropped=sum(_dropped(own, chosen) for own, chosen in zip(numbers, kept, strict=True)),
        num_available=sum(int((own >= 0).sum()) for own in numbers),
        columns=parts[0].spool.columns,
        values=found.values,
        of_class=found.of_class,
        mapped=found.mapped,
        said=found.said,
    )


def _in_all(rows: list[np.ndarray], starts: np.ndarray) -> np.ndarray:
    """Rows of each part as rows of all of them."""
    if len(rows) == 1:
        return rows[0]
    found, end = np.empty(sum(map(len, rows)), smallest(int(starts[-1]))), 0
    for own, start in zip(rows, starts, strict=False):
        np.add(own, start, out=found[end : end + len(own)], casting="unsafe")
        end += len(own)
    return found


def _check_texts(part: Part, chosen: np.ndarray) -> None:
    """Raises UserError naming the first of the `chosen` rows, which ascend, that has no text."""
    faults = part.spool.faults
    rows = np.array(sorted(faults), chosen.dtype)  # of another type all of `chosen` would be copied
    places = np.searchsorted(chosen, rows)
    among = places < len(chosen)
    among[among] = chosen[places[among]] == rows[among]
    if len(wrong := rows[among]):
        others = f" (of {len(wrong)} such rows the first)" if len(wrong) > 1 else ""
        raise UserError(f"{at(part.place, wrong[0])}: {faults[int(wrong[0])]}{others}")


def _check_labelled(parts: list[Part], numbers: list[np.ndarray]) -> None:
    for part, own in zip(parts, numbers, strict=True):
        if not (own >= 0).any():
            raise UserError(f"{part.place}: no pair with a label ({len(own)} rows)")


def _kept(
    parts: list[Part], numbers: list[np.ndarray], config: DataConfig, role: Role
) -> tuple[list[np.ndarray], tuple[np.ndarray, tuple[str, ...]] | None]:
    """The rows of each part whose pairs are used; and the source of each of those, as a place in their names.

    The latter None = there are no sources.
    """
    limit = {"train": config.max_train_samples, "dev": config.max_eval_samples, "test": config.max_test_samples}[role]
    kept: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    known: dict[str, int] = {}
    seen: dict[int, int] = {}
    for part, own in zip(parts, numbers, strict=True):
        rows = places(own, lambda codes: codes >= 0)
        coded = _sources(part, rows, config, len(parts) == 1)
        of_rows = np.broadcast_to(np.int8(0), len(rows)) if coded is None else _renumbered(*coded, known)
        if role == "train" and config.max_samples_per_source is not None:
            first = _first_of_each(of_rows, config.max_samples_per_source, seen)
            rows, of_rows = rows[first], of_rows[first]
        left = None if limit is None else limit - sum(map(len, kept))
        kept.append(rows[:left])
        codes.append(of_rows[:left] if coded is not None else np.empty(0, np.int8))
    together = np.concatenate(codes)
    # A limit may leave nothing of some sources.
    used = np.flatnonzero(counted(together, len(known)))
    names = [*known]
    _check_names(parts, [names[code] for code in used])
    if unused := [part.place for part, rows in zip(parts, kept, strict=True) if not len(rows)]:
        _say_unused(", ".join(unused), limit, config, role)
    if not len(together) or (len(parts) > 1 and len(used) == 1):
        return kept, None
    place = np.zeros(len(names), smallest(len(used)))
    place[used] = np.arange(len(used))
    return kept, (taken(place, together), tuple(names[code] for code in used))


def _say_uncounted(parts: list[Part], config: DataConfig, role: Role) -> None:
    """Raises UserError where something is asked for of each of the sources that a column has too many of."""
    asked = [name for name in ("max_samples_per_source", "source_weights") if getattr(config, name) is not None]
    for part in parts:
        for name in part.spool.uncounted:
            said = f"{part.place}: its column {name} has more than {MOST_SOURCES:,} different values"
            if role == "train" and asked:
                raise UserError(f"{said}, which is too many for {asked[0]}; leave that out, or write fewer")
            log.info(f"{said}; they are not told apart")


def _say_unused(places: str, limit: int | None, config: DataConfig, role: Role) -> None:
    if limit is None:
        log.info(f"max_samples_per_source {config.max_samples_per_source} is reached before {places}")
    else:
        more = "; max_samples_per_source takes some of each" if role == "train" else ""
        log.info(f"the first {limit:,} pairs are none of {places}{more}")


def _check_names(parts: list[Part], sources: list[str]) -> None:
    """Raises UserError where a column source has the name of another file's source: they would be one."""
    columned = [part for part in parts if part.spool.coded("source")]
    others = {part.source: part for part in parts if not part.spool.coded("source")}
    for name in (name for name in sources if name in others):
        for part in columned:
            coded = part.spool.coded("source")
            if coded and name in coded[0]:
                raise UserError(f"{part.place}: its column source has {name!r}, which is what {others[name].place} is "
                                "called; give that one another name, as in NAME=PATH")  # fmt: skip


def _first_of_each(codes: np.ndarray, limit: int, seen: dict[int, int]) -> np.ndarray:
    """(n,) whether a pair is among the first of its source; `seen` are those before, to which these are added."""
    first = np.zeros(len(codes), dtype=bool)
    for part in parts_of(len(codes)):
        order = np.argsort(codes[part], kind="stable")
        found, starts = np.unique(codes[part][order], return_index=True)
        for code, rows in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
            before = seen.get(code, 0)
            first[part][rows[: max(0, limit - before)]] = True
            seen[code] = before + len(rows)
    return first


def _renumbered(names: list[str], codes: np.ndarray, known: dict[str, int]) -> np.ndarray:
    """Codes (n,) of `names` as those of the names `known`, which grow in the order of first rows."""
    number = np.full(len(names), -1)
    for part in parts_of(len(codes)):
        used, first = np.unique(codes[part], return_index=True)
        for code in used[np.argsort(first)]:
            if number[code] < 0:
                number[code] = known.setdefault(names[code], len(known))
    return taken(number.astype(smallest(len(known))), codes)


def _sources(part: Part, rows: np.ndarray, config: DataConfig, alone: bool) -> tuple[list[str], np.ndarray] | None:
    """Names, and the place among them of each of `rows`: by its column, else by the file's name.

    None = it is `alone`, and has no column. MultiNLI's column genre says it of a file that is alone; among others it is
    one source.
    """
    for name in SOURCES if alone else SOURCES[:1]:
        if (coded := part.spool.coded(name)) is not None:
            return coded[0], taken(coded[1], rows)
    if not alone:
        return [part.source], np.broadcast_to(np.int8(0), len(rows))
    border = ALLNLI.get(part.spool.num_rows)
    if border and Path((config.dataset_name or [""])[0]).name == "all-nli":
        return ["SNLI", "MNLI"], (rows >= border).astype(np.int8)
    return None


def _dropped(numbers: np.ndarray, kept: np.ndarray) -> int:
    """Rows without a label among those that were looked at: not those behind the last pair of a limit."""
    cut = len(kept) < int((numbers >= 0).sum())
    end = None if not cut else kept[-1] + 1 if len(kept) else 0
    return int((numbers[:end] < 0).sum())


def _say_absent(place: str, label: np.ndarray, names: tuple[str, ...], scored: bool) -> None:
    if names and len(absent := np.flatnonzero(counted(label, len(names)) == 0)):
        shown = " or ".join(names[number] for number in absent[:5]) + (" ..." if len(absent) > 5 else "")
        log.info(f"{place}: no pair has the label {shown}")
        if scored and len(names) == 3 and len(absent) == 1 and len(label) > FEW:
            lost, other = names[absent[0]], names[2 if absent[0] == 1 else 1]
            log.warning(f"{place}: it is scored on {len(names)} classes; if it has two, as SciTail has, say "
                        f"--eval_label_map {lost}={other}")  # fmt: skip
