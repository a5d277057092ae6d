"""The sources of a split as one: their classes, their order, and which of their pairs are used.

Sources stand one after the other. Their classes are those of the source that has the most of them; all others' must be
among these, by name. A text becomes a Python string only if its pair is used, and a table goes once it is read.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data.pairs import Pairs
from trainer.labels.names import FEW
from trainer.labels.targets import read_targets
from trainer.labels.values import Labels, Targets, read_labels
from trainer.options import Objective
from trainer.rows.columns import LABELS, column_named, text_columns
from trainer.rows.places import Place
from trainer.rows.splits import Role
from trainer.rows.texts import only, texts_of

# AllNLI's splits by their number of rows, and the row where SNLI ends and MultiNLI begins: it has no column for that.
SPLITS = "SemEval_set"  # a column of SICK.txt
ALLNLI = {942069: 549367, 19657: 9842, 19656: 9824}


@dataclass(frozen=True)
class Part:
    """A source as it was read: its columns, and its labels as they are written.

    `columns`: those of premise, hypothesis and label. `own_names`: what the label's column says its numbers mean.
    """

    source: str
    place: str
    table: pa.Table
    columns: tuple[str, str, str]
    labels: Labels
    own_names: list[str] | None


def part_of(
    source: str,
    place: str,
    table: pa.Table,
    names: dict[str, list[str]],
    config: DataConfig,
    objective: Objective = "cross_entropy",
) -> Part:
    """Raises UserError where it has no rows, or no such columns."""
    if table.num_rows == 0:
        raise UserError(f"{place}: no rows")
    if SPLITS in table.column_names and len(own := table[SPLITS].unique().to_pylist()) > 1:
        raise UserError(f"{place}: its column {SPLITS} says that it holds several splits ({', '.join(map(str, own))}); "
                        "write each into a file of its own, so that none is trained on that is tested on")  # fmt: skip
    texts = text_columns(table, place, config.premise_column, config.hypothesis_column)
    label = column_named(table.column_names, place, "label_column", config.label_column, LABELS[objective])
    used = [name for name in (*texts, label, "source", "genre") if table.column_names.count(name) == 1]
    found = read_labels(table[label], place)
    return Part(source, place, table.select(list(dict.fromkeys(used))), (*texts, label), found, names.get(label))


def join(
    parts: list[Part],
    config: DataConfig,
    role: Role,
    classes: Sequence[str] | None,
    of_model: bool = False,
    objective: Objective = "cross_entropy",
) -> Pairs:
    """The split that `parts` make; they are used up. Raises UserError naming the row that is bad."""
    labelled = [(part.labels, part.own_names) for part in parts]
    targets = read_targets(labelled, config, objective, classes, of_model)
    numbers = [own.label for own in targets]
    _check_labelled(parts, numbers)
    kept, sources = _kept(parts, numbers, config, role)
    place = Place.joined([part.place for part in parts], [len(own) for own in numbers])
    premise: list[str] = []
    hypothesis: list[str] = []
    rows, start, columns = [], 0, parts[0].columns
    dropped = sum(_dropped(own, chosen) for own, chosen in zip(numbers, kept, strict=True))
    for own, chosen in zip(numbers, kept, strict=True):
        part = parts.pop(0)
        for field, texts, column in zip(("premise", "hypothesis"), (premise, hypothesis), part.columns, strict=False):
            texts += texts_of(part.table[column], part.place, field, chosen)
        rows.append(start + chosen)
        start += len(own)
    found = Targets.joined(targets, kept)
    _say_absent(place, found.label, found.names, scored=classes is not None)
    if found.mapped:
        log.info(f"{place}: {'taken' if classes is None else 'scored'} with {found.mapped}")
    return Pairs(
        name=place,
        premise=premise,
        hypothesis=hypothesis,
        label=found.label,
        row=np.concatenate(rows),
        source=sources,
        label_names=found.names,
        num_dropped=dropped,
        num_available=sum(int((own >= 0).sum()) for own in numbers),
        columns=columns,
        values=found.values,
        of_class=found.of_class,
        mapped=found.mapped,
        said=found.said,
    )


def _check_labelled(parts: list[Part], numbers: list[np.ndarray]) -> None:
    for part, own in zip(parts, numbers, strict=True):
        if not (own >= 0).any():
            raise UserError(f"{part.place}: no pair with a label ({len(own)} rows)")


def _kept(
    parts: list[Part], numbers: list[np.ndarray], config: DataConfig, role: Role
) -> tuple[list[np.ndarray], list[str] | None]:
    """The rows of each part whose pairs are used, and the source of each of those; None = there are no sources."""
    limit = {"train": config.max_train_samples, "dev": config.max_eval_samples, "test": config.max_test_samples}[role]
    kept: list[np.ndarray] = []
    sources: list[str] = []
    seen: Counter[str] = Counter()
    for part, own in zip(parts, numbers, strict=True):
        rows = np.flatnonzero(own >= 0)
        names = _sources(part, rows, config, len(parts) == 1)
        if role == "train" and config.max_samples_per_source is not None:
            first = _first_of_each(names or [part.source] * len(rows), config.max_samples_per_source, seen)
            rows, names = rows[first], names and [name for name, own in zip(names, first, strict=True) if own]
        left = None if limit is None else limit - sum(map(len, kept))
        kept.append(rows[:left])
        sources += (names or [])[:left]
    _check_names(parts, sources)
    if unused := [part.place for part, rows in zip(parts, kept, strict=True) if not len(rows)]:
        places = ", ".join(unused)
        if limit is None:
            log.info(f"max_samples_per_source {config.max_samples_per_source} is reached before {places}")
        else:
            more = "; max_samples_per_source takes some of each" if role == "train" else ""
            log.info(f"the first {limit:,} pairs are none of {places}{more}")
    return kept, sources if sources and (len(parts) == 1 or len(set(sources)) > 1) else None


def _check_names(parts: list[Part], sources: list[str]) -> None:
    """Raises UserError where a column source has the name of another file's source: they would be one."""
    columned = [part for part in parts if "source" in part.table.column_names]
    others = {part.source: part for part in parts if "source" not in part.table.column_names}
    if columned and (name := next((name for name in dict.fromkeys(sources) if name in others), None)):
        for part in columned:
            if name in part.table["source"].unique().to_pylist():
                raise UserError(f"{part.place}: its column source has {name!r}, which is what {others[name].place} is "
                                "called; give that one another name, as in NAME=PATH")  # fmt: skip


def _first_of_each(names: list[str], limit: int, seen: Counter[str]) -> np.ndarray:
    """(n,) whether a pair is among the first of its source; `seen` are those before."""
    first = np.zeros(len(names), dtype=bool)
    for place, name in enumerate(names):
        seen[name] += 1
        first[place] = seen[name] <= limit
    return first


def _sources(part: Part, rows: np.ndarray, config: DataConfig, alone: bool) -> list[str] | None:
    """The source of each of `rows`: of its column, else by the file's name; None = it is `alone`, and has no column.

    MultiNLI's column genre says it of a file that is alone; among others it is one source.
    """
    table, named = part.table, ("source", "genre") if alone else ("source",)
    column = next((table[name] for name in named if name in table.column_names), None)
    if column is not None:
        known: dict[str, str] = {}  # one object a name, not one a row
        return [known.setdefault(name, name) for name in map(str, only(column, rows).to_pylist())]
    if not alone:
        return [part.source] * len(rows)
    border = ALLNLI.get(table.num_rows)
    if border and Path((config.dataset_name or [""])[0]).name == "all-nli":
        return ["SNLI" if row < border else "MNLI" for row in rows.tolist()]
    return None


def _dropped(numbers: np.ndarray, kept: np.ndarray) -> int:
    """Rows without a label among those that were looked at: not those behind the last pair of a limit."""
    cut = len(kept) < int((numbers >= 0).sum())
    end = None if not cut else kept[-1] + 1 if len(kept) else 0
    return int((numbers[:end] < 0).sum())


def _say_absent(place: str, label: np.ndarray, names: tuple[str, ...], scored: bool) -> None:
    if len(absent := np.flatnonzero(np.bincount(label, minlength=len(names)) == 0)):
        shown = " or ".join(names[number] for number in absent[:5]) + (" ..." if len(absent) > 5 else "")
        log.info(f"{place}: no pair has the label {shown}")
        if scored and len(names) == 3 and len(absent) == 1 and len(label) > FEW:
            lost, other = names[absent[0]], names[2 if absent[0] == 1 else 1]
            log.warning(f"{place}: it is scored on {len(names)} classes; if it has two, as SciTail has, say "
                        f"--eval_label_map {lost}={other}")  # fmt: skip
