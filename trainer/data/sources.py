"""Sentence pairs from any source, checked row by row, as plain arrays.

Sources: local files, `save_to_disk` folders, the hub, and the embedded data set. A row without a consensus label
(SNLI's `-`, the hub's -1) is dropped and counted; any other bad row is an error that names its place. Rows count from
0, header excluded, and a pair keeps the row it had in its source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data import builtin
from trainer.data.faults import Faults
from trainer.data.labels import class_numbers, read_labels
from trainer.data.splits import Loaded, from_data_set, from_folder
from trainer.data.splits import Role as Role
from trainer.data.tables import SUFFIXES, read_table
from trainer.data.texts import checked, only, texts_of

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
        values: targets of one score, float32; None = there are classes.
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

    def describe(self) -> str:
        """How many there are, and what is not among them."""
        of = (
            f"the first {len(self):,} of {self.num_available:,}" if self.num_available > len(self) else f"{len(self):,}"
        )
        dropped = f" ({self.num_dropped:,} more dropped: no consensus label)" if self.num_dropped else ""
        return f"{self.name}: {of} pairs{dropped}"


def load_splits(config: DataConfig) -> dict[str, Pairs]:
    """The train split and what there is of dev and test, with one set of classes. Raises UserError."""
    train = load_pairs(config, "train")
    if train is None:
        raise UserError("no training data: give --train_file FILE, or a --dataset_name that has a train split")
    if len(np.unique(train.label)) < 2:
        cut = "; shuffle them, or raise max_train_samples" if train.num_available > len(train) else ""
        raise UserError(f"{train.describe()}, all with label {train.label_names[train.label[0]]!r}: there is nothing "
                        f"to learn{cut}")  # fmt: skip
    return {"train": train} | load_scored(config, train.label_names)


def load_scored(config: DataConfig, classes: Sequence[str], of_model: bool = False) -> dict[str, Pairs]:
    """What there is of dev and test."""
    splits: dict[str, Pairs] = {}
    roles: tuple[Role, ...] = ("dev", "test")
    for role in roles:
        pairs = load_pairs(config, role, classes, of_model)
        if pairs is not None:
            splits[role] = pairs
    return splits


def load_pairs(
    config: DataConfig, role: Role, classes: Sequence[str] | None = None, of_model: bool = False
) -> Pairs | None:
    """One split, or None where the data set has none, or none with labels, which is said.

    `classes` are those of the training split or, with `of_model`, of a model; None = from this split.
    """
    limit = {"train": config.max_train_samples, "dev": config.max_eval_samples, "test": config.max_test_samples}[role]
    if config.has_files:
        loaded = _load_file(config, role)
        return loaded and replace(_check(*loaded, config, classes, limit, of_model), split=split_name(config, role))
    for place, table, names in _splits(config, role):
        # Many test splits on the hub come without their labels.
        if role != "train" and (lack := _lack(table, config.label_column, place)):
            log.info(f"{place} is left out: {lack}")
            continue
        return replace(_check(place, table, names, config, classes, limit, of_model), split=split_name(config, role))
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
) -> Pairs:
    if table.num_rows == 0:
        raise UserError(f"{place}: no rows")
    texts = text_columns(table, place, config.premise_column, config.hypothesis_column)
    premise, hypothesis = (table[name] for name in texts)
    label = _column(table, place, "label_column", config.label_column, LABEL)
    found = read_labels(table[label], place)
    numbers, names = class_numbers(found, classes, config.label_names, class_names.get(label), of_model)
    available = np.flatnonzero(numbers >= 0)
    kept = available[:limit]
    if len(kept) == 0:
        raise UserError(f"{place}: no pair with a label ({table.num_rows} rows)")
    if len(absent := np.flatnonzero(np.bincount(numbers[kept], minlength=len(names)) == 0)):
        shown = " or ".join(names[number] for number in absent[:5]) + (" ..." if len(absent) > 5 else "")
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
        premise=texts_of(premise, place, "premise", kept),
        hypothesis=texts_of(hypothesis, place, "hypothesis", kept),
        label=numbers[kept],
        row=kept,
        source=source,
        label_names=names,
        num_dropped=int((numbers[: kept[-1] + 1 if len(kept) == limit else None] < 0).sum()),
        num_available=len(available),
        columns=(*texts, label),
    )


def text_columns(
    table: pa.Table, place: str, premise_column: str | None, hypothesis_column: str | None
) -> tuple[str, str]:
    """The names of the columns of premise and hypothesis. Raises UserError."""
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


def unlabelled(
    table: pa.Table,
    place: str,
    premise_column: str | None,
    hypothesis_column: str | None,
    start: int = 0,
    faults: Faults | None = None,
) -> Pairs:
    """Pairs without labels, for prediction; `label` is 0 everywhere. Raises UserError naming a row without text.

    `start` is the first row's number in its file. With `faults`, rows without text are left out and noted there, and so
    are those that it has already.
    """
    names = text_columns(table, place, premise_column, hypothesis_column)
    columns = dict(zip(("premise", "hypothesis"), names, strict=True))
    rows = np.arange(table.num_rows)
    if faults is not None:
        for field, name in columns.items():
            for row, what in checked(table[name], field)[1].items():
                faults.setdefault(start + row, what)
        rows = np.array([row for row in rows if start + row not in faults], dtype=np.int64)
    premise, hypothesis = (texts_of(table[name], place, field, rows, start) for field, name in columns.items())
    return Pairs(place, premise, hypothesis, label=np.zeros_like(rows), row=start + rows, source=None, label_names=())
