"""Sentence pairs from any source, checked row by row, as plain arrays.

Sources: local files, `save_to_disk` folders, the hub, and the embedded data set. A row without a consensus label
(SNLI's `-`, the hub's -1) is dropped and counted; any other bad row is an error that names its place. Rows count from
0, header excluded, and a pair keeps the row it had in its source.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data import builtin
from trainer.data.labels import read_labels
from trainer.data.splits import Loaded, from_data_set, from_folder
from trainer.data.splits import Role as Role
from trainer.data.tables import LONGEST_ROW, MIXED, SUFFIXES, read_table, too_long, values_of
from trainer.data.targets import Targets, read_targets
from trainer.options import Objective

# AllNLI's splits by their number of rows, and the row where SNLI ends and MultiNLI begins: it has no column for that.
ALLNLI = {942069: 549367, 19657: 9842, 19656: 9824}
PREMISE, HYPOTHESIS, LABEL = ("premise", "sentence1"), ("hypothesis", "sentence2"), ("label", "gold_label")


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split. All sequences have the same length n.

    Attributes:
        name: where they come from, for messages.
        split: what reports, file names and metrics call them, such as AllNLI-dev.
        label: (n,) class numbers, or where `values` is given the places of the pairs' targets in it.
        values: targets of one score, float32, ascending; None = there are classes.
        label_names: of the classes, or of the labels 0 and 1; empty = the targets are numbers.
        of_class: (classes of the model,) the class of `label_names` that each is taken as; None = the classes are the
            model's.
        mapped: in words, which classes are taken as which; empty = none.
    """

    name: str
    premise: list[str]
    hypothesis: list[str]
    label: np.ndarray
    row: np.ndarray
    source: list[str] | None
    label_names: tuple[str, ...]
    num_dropped: int = 0
    num_available: int = 0  # pairs with a label in the source, of which these are the first
    columns: tuple[str, ...] = ("premise", "hypothesis", "label")  # as the source calls them
    split: str = ""
    values: np.ndarray | None = None
    of_class: np.ndarray | None = None
    mapped: str = ""

    def __len__(self) -> int:
        return len(self.premise)

    def at(self, number: int) -> str:
        """The pair's file and row, for messages."""
        return f"{self.name}, row {self.row[number]}"

    def target(self, number: int) -> str:
        """What the pair is labelled with."""
        place = self.label[number]
        return repr(self.label_names[place]) if self.values is None or self.label_names else f"{self.values[place]:g}"

    def describe(self) -> str:
        """How many there are, and what is not among them."""
        of = (
            f"the first {len(self):,} of {self.num_available:,}" if self.num_available > len(self) else f"{len(self):,}"
        )
        dropped = f" ({self.num_dropped:,} more dropped: no consensus label)" if self.num_dropped else ""
        return f"{self.name}: {of} pairs{dropped}"


def load_splits(config: DataConfig, objective: Objective = "cross_entropy") -> dict[str, Pairs]:
    """The train split and what there is of dev and test, with one set of classes. Raises UserError."""
    train = load_pairs(config, "train", objective=objective)
    if train is None:
        raise UserError("no training data: give --train_file FILE, or a --dataset_name that has a train split")
    if len(np.unique(train.label)) < 2:
        cut = "; shuffle them, or raise max_train_samples" if train.num_available > len(train) else ""
        raise UserError(f"{train.describe()}, all with label {train.target(0)}: there is nothing to learn{cut}")
    return {"train": train} | load_scored(config, train.label_names, objective=objective)


def load_scored(
    config: DataConfig, classes: Sequence[str], of_model: bool = False, objective: Objective = "cross_entropy"
) -> dict[str, Pairs]:
    """What there is of dev and test."""
    splits: dict[str, Pairs] = {}
    roles: tuple[Role, ...] = ("dev", "test")
    for role in roles:
        pairs = load_pairs(config, role, classes, of_model, objective)
        if pairs is not None:
            splits[role] = pairs
    return splits


def load_pairs(
    config: DataConfig,
    role: Role,
    classes: Sequence[str] | None = None,
    of_model: bool = False,
    objective: Objective = "cross_entropy",
) -> Pairs | None:
    """One split, or None where the data set has none, or none with labels, which is said.

    `classes` are those of the training split or, with `of_model`, of a model; None = from this split.
    """
    limit = {"train": config.max_train_samples, "dev": config.max_eval_samples, "test": config.max_test_samples}[role]
    if config.has_files:
        loaded = _load_file(config, role)
        return loaded and replace(
            _check(*loaded, config, classes, limit, of_model, objective), split=split_name(config, role)
        )
    for place, table, names in _splits(config, role):
        # Many test splits on the hub come without their labels.
        if role != "train" and (lack := _lack(table, config.label_column, place)):
            log.info(f"{place} is left out: {lack}")
            continue
        return replace(
            _check(place, table, names, config, classes, limit, of_model, objective), split=split_name(config, role)
        )
    return None


def _splits(config: DataConfig, role: Role) -> Iterator[Loaded]:
    if config.dataset_name == ["builtin"]:
        yield f"builtin {role}", pa.Table.from_pylist(builtin.pairs(role)), {"label": list(builtin.LABEL_NAMES)}
    elif config.dataset_name is not None:
        yield from from_data_set(config.dataset_name[0], config.dataset_config_name, config.dataset_revision, role)


def _lack(table: pa.Table, column: str | None, place: str) -> str | None:
    """Why nothing can be scored on this split."""
    if table.num_rows == 0:
        return "it has no rows"
    name = next((name for name in ((column,) if column else LABEL) if name in table.column_names), None)
    if name is None:
        return f"it has no column {column or ' or '.join(LABEL)}"
    return "it has no labels" if read_labels(table[name], place).missing else None


def split_name(config: DataConfig, role: Role) -> str:
    """`AllNLI-dev`, `snli-test`, ...: as reports, file names and metrics call a split."""
    name = Path((config.dataset_name or config.files(role) or ["data"])[0].rstrip("/")).name
    while (stem := name.removesuffix(Path(name).suffix)) != name and Path(name).suffix in SUFFIXES:
        name = stem
    if name.endswith(role):
        return name
    return f"{'AllNLI' if name == 'all-nli' else name}-{role}"


def _load_file(config: DataConfig, role: Role) -> Loaded | None:
    files = config.files(role)
    if files is None:
        return None
    (file,) = files
    path = Path(file)
    if path.is_dir():
        return from_folder(path, role)
    return file, read_table(path), {}


def _check(
    place: str,
    table: pa.Table,
    class_names: dict[str, list[str]],
    config: DataConfig,
    classes: Sequence[str] | None,
    limit: int | None,
    of_model: bool,
    objective: Objective,
) -> Pairs:
    if table.num_rows == 0:
        raise UserError(f"{place}: no rows")
    texts = _text_columns(table, place, config.premise_column, config.hypothesis_column)
    premise, hypothesis = (table[name] for name in texts)
    label = _column(table, place, "label_column", config.label_column, LABEL)
    labels = read_labels(table[label], place)
    found = read_targets(labels, config, objective, classes, class_names.get(label), of_model)
    available = np.flatnonzero(found.label >= 0)
    kept = available[:limit]
    if len(kept) == 0:
        raise UserError(f"{place}: no pair with a label ({table.num_rows} rows)")
    targets = Targets.joined([found], [kept])
    if len(absent := np.flatnonzero(np.bincount(targets.label, minlength=len(found.names)) == 0)):
        shown = " or ".join(found.names[number] for number in absent[:5]) + (" ..." if len(absent) > 5 else "")
        log.info(f"{place}: no pair has the label {shown}")
    column = next((table[name] for name in ("source", "genre") if name in table.column_names), None)
    source = None if column is None else [str(s) for s in only(column, kept).to_pylist()]
    if (
        source is None
        and (border := ALLNLI.get(table.num_rows))
        and Path((config.dataset_name or [""])[0]).name == "all-nli"
    ):
        source = ["SNLI" if row < border else "MNLI" for row in kept.tolist()]
    return Pairs(
        name=place,
        premise=_text(premise, place, "premise", kept),
        hypothesis=_text(hypothesis, place, "hypothesis", kept),
        label=targets.label,
        row=kept,
        source=source,
        label_names=found.names,
        num_dropped=int((found.label[: kept[-1] + 1 if len(kept) == limit else None] < 0).sum()),
        num_available=len(available),
        columns=(*texts, label),
        values=targets.values,
    )


def _text_columns(
    table: pa.Table, place: str, premise_column: str | None, hypothesis_column: str | None
) -> tuple[str, str]:
    premise = _column(table, place, "premise_column", premise_column, PREMISE)
    hypothesis = _column(table, place, "hypothesis_column", hypothesis_column, HYPOTHESIS)
    if premise == hypothesis:
        raise UserError(f"{place}: premise and hypothesis are both column {premise!r}; name two columns")
    return premise, hypothesis


def _column(table: pa.Table, place: str, field: str, name: str | None, usual: tuple[str, ...]) -> str:
    wanted = (name,) if name else usual
    for candidate in wanted:
        if table.column_names.count(candidate) > 1:
            raise UserError(f"{place}: two columns are called {candidate!r}; rename one")
        if candidate in table.column_names:
            return candidate
    raise UserError(
        f"{place}: no column {' or '.join(map(repr, wanted))}; it has {', '.join(table.column_names)}. "
        f"Name the right one with --{field}"
    )


def only(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """`rows`, which ascend. Chunk by chunk: `take` would make one chunk of them, which more than 2 GB do not fit."""
    mask = np.zeros(len(column), dtype=bool)
    mask[rows] = True
    return column.filter(pa.array(mask))


def _text(column: pa.ChunkedArray, place: str, field: str, rows: np.ndarray, start: int = 0) -> list[str]:
    if column.type == MIXED:
        _raise_no_text(values_of(column), place, field, start)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if column.null_count == len(column):
        column = pa.chunked_array([pa.nulls(len(column), pa.large_string())])
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        first = int(np.flatnonzero(column.is_valid().to_numpy())[0])
        raise UserError(f"{place}, row {start + first}: {field} must be text, found {column.type}")
    column = only(column.cast(pa.large_string()), rows)
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()
    if blank.any():
        first = int(np.flatnonzero(blank)[0])
        what = "null" if column[first].as_py() is None else "empty"
        raise UserError(
            f"{place}, row {start + rows[first]}: {field} is {what} (of {int(blank.sum())} such rows the first)"
        )
    lengths = pc.binary_length(column).to_numpy()
    if (lengths > LONGEST_ROW).any():
        raise too_long(f"{place}, row {start + rows[int(lengths.argmax())]}, {field}")
    return column.to_pylist()


def _raise_no_text(values: list[Any], place: str, field: str, start: int) -> NoReturn:
    """Names the first of `values` that a column of text cannot hold."""
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}, row {start + row}: {field} must be text, found {json.dumps(value)[:80]}")
        if value and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(
                f"{place}, row {start + row}: {field} holds half of a surrogate pair, which is no character; remove it"
            )
    raise AssertionError("text in a column of no text")


def unlabelled(
    table: pa.Table, place: str, premise_column: str | None, hypothesis_column: str | None, start: int = 0
) -> Pairs:
    """Pairs without labels, for prediction; `label` is 0 everywhere. Raises UserError naming a row without text.

    `start` is the first row's number in its file.
    """
    premise, hypothesis = (table[c] for c in _text_columns(table, place, premise_column, hypothesis_column))
    rows = np.arange(table.num_rows)
    texts = _text(premise, place, "premise", rows, start), _text(hypothesis, place, "hypothesis", rows, start)
    return Pairs(place, *texts, label=np.zeros_like(rows), row=start + rows, source=None, label_names=())
