"""Sentence pairs from any source, checked row by row, as plain arrays.

Sources: local files, `save_to_disk` folders, the hub, and the embedded data set; several of them make one split, or of
test sets one each. A row without a consensus label (SNLI's `-`, the hub's -1) is dropped and counted; any other bad row
is an error that names its place. Rows count from 0, header excluded, and a pair keeps the row it had in its source.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.base.fields import mapped
from trainer.base.log import log
from trainer.config import DataConfig
from trainer.data import builtin
from trainer.data.join import Part, join, part_of
from trainer.data.mix import Mix
from trainer.data.pairs import Pairs as Pairs
from trainer.data.pairs import Texts
from trainer.labels.label_map import check_known
from trainer.labels.values import read_labels
from trainer.options import Objective
from trainer.rows.columns import LABELS, Wanted, candidates, text_columns
from trainer.rows.faults import Faults
from trainer.rows.files import Source, find_sources, is_kept
from trainer.rows.pipes import as_file
from trainer.rows.places import Place, listed
from trainer.rows.splits import Loaded, from_data_set, from_folder, is_saved, named_sets
from trainer.rows.splits import Role as Role
from trainer.rows.tables import joined, read_table
from trainer.rows.texts import checked, texts_of

LONGEST_TITLE = 100  # characters of several names together


@dataclass(frozen=True)
class Origin:
    """What a source is called, and how it is read; None where it has no split of the role that can be used."""

    name: str
    read: Callable[[], Loaded | None]
    files: tuple[str, ...] = ()


def load_splits(config: DataConfig, objective: Objective = "cross_entropy") -> dict[str, Pairs]:
    """The train split and what there is of dev and test, with one set of classes. Raises UserError."""
    found = load_pairs(config, "train", objective=objective)
    if not found:
        raise UserError("no training data: give --train_file FILE, or a --dataset_name that has a train split")
    (train,) = found
    check_known("label_map", mapped(config.label_map), train.said, train.name)
    if len(np.unique(train.label)) < 2:
        cut = "; shuffle them, or raise max_train_samples" if train.num_available > len(train) else ""
        if train.mapped and len(train.label_names) == 1:
            cut = f"; label_map takes {train.mapped}: leave one of the classes as it is"
        raise UserError(f"{train.describe()}, all with label {train.target(0)}: there is nothing to learn{cut}")
    Mix.of(config.source_weights, train)  # a mistake there shows before anything is computed
    return {"train": train} | load_scored(config, train.label_names, objective=objective)


def load_scored(
    config: DataConfig, classes: Sequence[str] | None, of_model: bool = False, objective: Objective = "cross_entropy"
) -> dict[str, Pairs]:
    """What there is of dev and test: the test sets are "test", "test 2", "test 3" and so on."""
    splits: dict[str, Pairs] = {}
    for pairs in load_pairs(config, "dev", classes, of_model, objective):
        splits["dev"] = pairs
    for number, pairs in enumerate(load_pairs(config, "test", classes, of_model, objective), 1):
        splits["test" if number == 1 else f"test {number}"] = pairs
    if splits:
        check_maps(config, splits.values(), classes or (), of_model)
    return splits


def check_maps(config: DataConfig, splits: Collection[Pairs], classes: Sequence[str], of_model: bool) -> None:
    """Raises UserError where a map of scoring names what neither the model nor any of the sets knows."""
    known = [*classes, *(name for pairs in splits for name in pairs.said)]
    where = listed([pairs.name for pairs in splits])
    for field in ("label_map", "eval_label_map") if of_model else ("eval_label_map",):
        check_known(field, mapped(getattr(config, field)), known, f"{where} or the model")


def load_pairs(
    config: DataConfig,
    role: Role,
    classes: Sequence[str] | None = None,
    of_model: bool = False,
    objective: Objective = "cross_entropy",
) -> list[Pairs]:
    """The role's split, or every test set; none where the data has none, or none with labels, which is said.

    `classes` are those of the training split or, with `of_model`, of a model; None = from this split.
    """
    origins = list(_of_files(config, role) if config.has_files else _of_data_sets(config, role, objective))
    sets = [[origin] for origin in origins] if role == "test" else [origins]
    made: dict[str, Pairs] = {}
    for own in sets:
        parts = [_part(origin, loaded, config, objective) for origin in own if (loaded := origin.read()) is not None]
        if not parts:
            continue
        name = split_name(_title(config, [part.source for part in parts], len(sets)), role)
        if (other := next((made[known] for known in made if known.lower() == name.lower()), None)) is not None:
            raise UserError(f"two test sets would be called {name!r}: {other.name} and {parts[0].place}; give them "
                            "names, as in NAME=PATH")  # fmt: skip
        files = tuple(file for origin in own for file in origin.files)
        pairs = join(parts, config, role, classes, of_model, objective)
        made[name] = replace(pairs, split=name, files=files)
    return list(made.values())


def _part(origin: Origin, loaded: Loaded, config: DataConfig, objective: Objective) -> Part:
    place, table, names = loaded
    return part_of(origin.name, place, table, names, config, objective)


def _of_files(config: DataConfig, role: Role) -> Iterator[Origin]:
    field = {"train": "train_file", "dev": "validation_file", "test": "test_file"}[role]
    for source in find_sources(config.files(role) or [], field):
        yield Origin(source.name, partial(_read_files, source, role), tuple(path.name for path in source.paths))


def _read_files(source: Source, role: Role) -> Loaded:
    """All shards of a source, as one."""
    if len(source.paths) == 1 and is_saved(source.paths[0]):
        return from_folder(source.paths[0], role)
    tables = []
    for path in source.paths:
        with as_file(path) as file:
            tables.append(read_table(file))
    places = [_of_program(path, source.name) if is_kept(path) else str(path) for path in source.paths]
    place = Place.joined(places, [table.num_rows for table in tables])
    return place, joined(tables), {}


def _of_program(path: Path, name: str) -> str:
    """What a Python program calls the pairs that given.py has written there."""
    argument = f"{ {'dev': 'eval'}.get(path.stem, path.stem) }_dataset"
    return argument if name == path.stem else f"{argument}[{name!r}]"


def _of_data_sets(config: DataConfig, role: Role, objective: Objective) -> Iterator[Origin]:
    found = named_sets(config.dataset_name or [], config.dataset_config_name)
    if config.dataset_revision is not None and len(found) > 1:
        raise UserError("dataset_revision is that of one data set, and dataset_name has several; leave it out")
    for title, name, configuration in found:
        if name == "builtin":
            yield Origin(name, partial(_read_builtin, role))
        else:
            yield Origin(title, partial(_read_data_set, config, name, configuration, role, objective))


def _read_builtin(role: Role) -> Loaded:
    return f"builtin {role}", pa.Table.from_pylist(builtin.pairs(role)), {"label": list(builtin.LABEL_NAMES)}


def _read_data_set(
    config: DataConfig, name: str, configuration: str | None, role: Role, objective: Objective
) -> Loaded | None:
    for place, table, names in from_data_set(name, configuration, config.dataset_revision, role):
        # Many test splits on the hub come without their labels.
        if role != "train" and (lack := lack_of(table, candidates(config.label_column, LABELS[objective]), place)):
            log.info(f"{place} is left out: {lack}")
            continue
        return place, table, names
    return None


def lack_of(table: pa.Table, columns: tuple[str, ...], place: str) -> str | None:
    """Why nothing can be scored on this split, whose labels are in one of `columns`."""
    if table.num_rows == 0:
        return "it has no rows"
    name = next((name for name in columns if name in table.column_names), None)
    if name is None:
        return f"it has no column {' or '.join(columns)}"
    return "it has no labels" if read_labels(table[name], place).missing else None


def _title(config: DataConfig, names: list[str], num_sets: int) -> str:
    """What the data of a split are called: by the data set's name, where there is one and nothing to tell apart."""
    if config.has_files and config.dataset_name and num_sets == 1:
        names = [title for title, _, _ in named_sets(config.dataset_name, None)]
    together = "+".join(names)
    return together if len(names) < 4 and len(together) <= LONGEST_TITLE else f"{names[0]}+{len(names) - 1}"


def split_name(title: str, role: Role) -> str:
    """`AllNLI-dev`, `snli-test`, ...: as reports, file names and metrics call a split."""
    if re.fullmatch(rf"(.*[^a-z])?{role}", title, re.IGNORECASE):
        return title
    return f"{'AllNLI' if title == 'all-nli' else title}-{role}"


def unlabelled(
    table: pa.Table,
    place: str,
    premise_column: Wanted,
    hypothesis_column: Wanted,
    start: int = 0,
    faults: Faults | None = None,
) -> Texts:
    """Pairs without labels, for prediction. Raises UserError naming a row without text.

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
    return Texts(place, start + rows, premise, hypothesis)
