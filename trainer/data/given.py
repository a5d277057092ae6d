"""Pairs that a Python program has in memory: as a table to predict, or as files that fields name, a run can resume,
and every rank can read.

A data set is a `datasets.Dataset`, a pandas DataFrame, a pyarrow.Table, a list of (premise, hypothesis, label), or a
list of dicts. As a file it is <cache>/data/<hash of its content>/NAME.parquet, so the same pairs are the same file.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError, named
from trainer.base.fields import typed
from trainer.base.files import replacing
from trainer.base.log import log
from trainer.data.pairs import Texts
from trainer.data.sources import lack_of
from trainer.rows.columns import HYPOTHESIS, LABELS, PREMISE, Wanted, candidates, column_named, text_columns
from trainer.rows.faults import Faults
from trainer.rows.files import kept_folder, may_be_title
from trainer.rows.splits import NAMES, Role
from trainer.rows.tables import LONGEST_ROW, column_of
from trainer.rows.texts import checked, texts_of

FIELDS = {"train": "train_file", "eval": "validation_file", "test": "test_file"}
ROLES: dict[str, Role] = {"train": "train", "eval": "dev", "test": "test"}
Column = Callable[[str], pa.ChunkedArray | pa.Array]
PLACE = "pairs"  # what messages call those that are to be predicted


def is_pair(given: Any) -> bool:
    """Whether it is a premise and a hypothesis, and no list of pairs."""
    return isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(text, str) for text in given)


def plain_pairs(given: Any) -> Texts | None:
    """A list of pairs of texts, as it is: a table would take longer than a small model.

    None where it is anything else, or holds a text that is blank, too long or no Unicode, which the table's way names.
    """
    if not isinstance(given, list) or not given or not all(map(is_pair, given)):
        return None
    premise, hypothesis = [own[0] for own in given], [own[1] for own in given]
    texts = premise + hypothesis
    if not all(text and not text.isspace() and len(text) < LONGEST_ROW // 4 for text in texts):
        return None
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return None
    return Texts(PLACE, np.arange(len(given)), premise, hypothesis)


def pairs_of(given: Any, premise_column: Wanted = None, hypothesis_column: Wanted = None) -> pa.Table:
    """The columns premise and hypothesis of a data set without labels, which may be empty. Raises UserError."""
    texts = ("premise", "hypothesis")
    given = given.tolist() if hasattr(given, "tolist") and not _is_table(given) else given  # numpy's
    if isinstance(given, Iterable) and not (_is_table(given) or isinstance(given, (str, bytes, Mapping))):
        given = list(given)
    if isinstance(given, (list, tuple)) and not given:
        return pa.table({name: pa.array([], pa.string()) for name in texts})
    names, column = _columns(given, PLACE, texts)
    chosen = text_columns(names, PLACE, premise_column, hypothesis_column)
    return pa.table(dict(zip(texts, map(column, chosen), strict=True)))


def as_files(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with files in the place of what dataset, train_dataset, eval_dataset and test_dataset hold.

    Raises UserError where one is nothing that can be read, or has a file beside it that would be the same split.
    """
    fields = dict(fields)
    given = {name: fields.pop(f"{name}_dataset", None) for name in FIELDS}
    whole = fields.pop("dataset", None)
    if whole is not None and any(data is not None for data in given.values()):
        raise UserError("dataset holds all splits; leave out train_dataset, eval_dataset and test_dataset")
    found = {name: _items(f"{name}_dataset", data, ROLES[name], fields) for name, data in given.items()}
    if whole is not None:
        found = _splits(whole, fields)
    for name, items in found.items():
        if items and fields.get(FIELDS[name]) is not None:
            raise UserError(f"{FIELDS[name]} is the split that {name}_dataset or dataset holds; leave one out")
        if items:
            fields[FIELDS[name]] = items
    return fields


def _items(name: str, data: Any, role: Role, fields: Mapping[str, Any]) -> list[str]:
    """The files of what is given for a split: one, or of a dict one each."""
    if data is None:
        return []
    if not isinstance(data, Mapping):
        return [str(_kept(_table(data, name, fields), role))]
    if len([own for own, names in NAMES.items() if any(title in names for title in data)]) > 1:
        raise UserError(f"{name} holds several splits ({', '.join(map(str, data))}); give them all as dataset=")
    if wrong := [title for title in data if not isinstance(title, str) or not may_be_title(title)]:
        raise UserError(f"{name}: {_shown(wrong[0])} is no name that a file may have")
    if not data:
        raise UserError(f"{name} is empty")
    return [f"{title}={_kept(_table(own, f'{name}[{title!r}]', fields), role)}" for title, own in data.items()]


def _splits(whole: Any, fields: Mapping[str, Any]) -> dict[str, list[str]]:
    """Those of a DatasetDict, by their names; as from the hub, one without labels is left out, which is said."""
    if not isinstance(whole, Mapping):
        raise UserError(f"dataset must be a DatasetDict, or a dict of splits, found {_kind(whole)}; give one split as "
                        "train_dataset")  # fmt: skip
    found: dict[str, list[str]] = {}
    for name, role in ROLES.items():
        for split in (split for split in NAMES[role] if split in whole and name not in found):
            place = f"dataset[{split!r}]"
            table = _table(whole[split], place, fields, may_lack=role != "train")
            if role != "train" and (
                lack := lack_of(
                    table.num_rows, table.column_names, table.column, _wanted(fields)["label_column"], place
                )
            ):
                log.info(f"{place} is left out: {lack}")
                continue
            found[name] = [str(_kept(table, role))]
    if not found:
        raise UserError(f"dataset has no split by a usual name, with labels; it has {', '.join(map(str, whole))}")
    return found


def _table(data: Any, place: str, fields: Mapping[str, Any], may_lack: bool = False) -> pa.Table:
    """The columns that count. `may_lack`: it may have neither labels nor rows."""
    names, column = _columns(data, place)
    named = _wanted(fields)
    if may_lack and not any(name in names for name in named["label_column"]):
        del named["label_column"]
    wanted = [column_named(names, place, field, None, own) for field, own in named.items()]
    wanted += [own for own in ("source", "genre") if own in names]
    table = pa.table({name: column(name) for name in dict.fromkeys(wanted)})
    if table.num_rows == 0 and not may_lack:
        raise UserError(f"{place} is empty")
    return table


def _wanted(fields: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names that each column may have."""
    label = LABELS.get(fields.get("objective", ""), LABELS["cross_entropy"])
    usual = {"premise_column": PREMISE, "hypothesis_column": HYPOTHESIS, "label_column": label}
    return {name: candidates(typed(name, fields.get(name), list[str] | None), own) for name, own in usual.items()}


def _is_table(data: Any) -> bool:
    return hasattr(data, "column_names") or (hasattr(data, "columns") and hasattr(data, "iloc"))


def _columns(
    data: Any, place: str, row_names: tuple[str, ...] = ("premise", "hypothesis", "label")
) -> tuple[list[str], Column]:
    """The names of the columns, and a function from one to its values. `row_names` are those of a list of tuples.

    Raises UserError.
    """
    if isinstance(data, pa.Table):
        return data.column_names, lambda name: data[name]
    if hasattr(data, "features") and hasattr(data, "with_format"):
        if not hasattr(data, "__len__"):
            raise UserError(f"{place} is a stream; take as many of its pairs as you need, as a Dataset")
        return list(data.column_names), lambda name: _of_dataset(data, name)
    if hasattr(data, "columns") and hasattr(data, "iloc"):  # a DataFrame
        return list(map(str, data.columns)), lambda name: _values(
            data.iloc[:, list(map(str, data.columns)).index(name)].tolist(), place, name
        )
    if not isinstance(data, (list, tuple)):
        raise UserError(f"{place} must be a datasets.Dataset, a pandas DataFrame, or a list of "
                        f"({', '.join(row_names)}) or of dicts, found {_kind(data)}")  # fmt: skip
    if not data:
        raise UserError(f"{place} is empty")
    if _is_table(data[0]):
        raise UserError(f"{place} is a list of tables; give them names, as in {{'snli': ..., 'mnli': ...}}")
    if isinstance(data[0], Mapping):
        if strange := next((row for row, own in enumerate(data) if not isinstance(own, Mapping)), None):
            raise UserError(f"{place}, row {strange}: expected a dict as in row 0, found {_shown(data[strange])}")
        names = list(dict.fromkeys(str(name) for own in data for name in own))
        return names, lambda name: _values([own.get(name) for own in data], place, name)
    for row, own in enumerate(data):
        if not isinstance(own, (tuple, list)) or len(own) != len(row_names):
            raise UserError(f"{place}, row {row}: expected ({', '.join(row_names)}), found {_shown(own)}")
    return [*row_names], lambda name: _values([own[row_names.index(name)] for own in data], place, name)


def _of_dataset(data: Any, name: str) -> pa.ChunkedArray | pa.Array:
    """Integers of a column of classes become the classes' names, since a file does not say what they mean."""
    column = data.select_columns([name]).with_format("arrow")[:][name]
    classes = getattr(data.features[name], "names", None)
    if classes is None:
        return column
    return pa.array([None if n is None else "-" if n < 0 else classes[n] for n in column.to_pylist()], pa.string())


def _values(values: list[Any], place: str, name: str) -> pa.Array:
    """NaN and NA are pandas' words for nothing."""
    plain = [value.item() if getattr(value, "ndim", 1) == 0 else value for value in values]  # numpy's scalars
    plain = [None if type(own).__name__ == "NAType" or (type(own) is float and own != own) else own for own in plain]
    for row, value in enumerate(plain):
        if not isinstance(value, (str, int, float, bool, NoneType)):
            raise UserError(f"{place}, row {row}: {name} must be text or a number, found {_shown(value)}")
    return column_of(plain)


def _kept(table: pa.Table, stem: str) -> Path:
    """Its file in the cache."""
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table.combine_chunks(), sink)
    content = memoryview(sink.getvalue())
    folder = kept_folder() / hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{stem}.parquet"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"pairs in memory cannot be written ({named(error)}); set CROSSRANK_CACHE to a folder that "
                        "you may write to") from None  # fmt: skip
    return path


def _kind(data: Any) -> str:
    return f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


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
    names = text_columns(table.column_names, place, premise_column, hypothesis_column)
    columns = dict(zip(("premise", "hypothesis"), names, strict=True))
    rows = np.arange(table.num_rows)
    if faults is not None:
        for field, name in columns.items():
            for row, what in checked(table[name], field)[1].items():
                faults.setdefault(start + row, what)
        rows = np.array([row for row in rows if start + row not in faults], dtype=np.int64)
    premise, hypothesis = (texts_of(table[name], place, field, rows, start) for field, name in columns.items())
    return Texts(place, start + rows, premise, hypothesis)
