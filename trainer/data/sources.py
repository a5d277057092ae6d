"""Sentence pairs from any source, checked row by row, as plain arrays.

Sources: local files, `save_to_disk` folders, the hub, and the embedded data set. A row without a consensus label
(SNLI's `-`, the hub's -1) is dropped and counted; any other bad row is an error that names its place. Rows count from
0, header excluded, and a pair keeps the row it had in its source.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.config import DataConfig, UserError, first_line, unknown
from trainer.data import builtin

Role = Literal["train", "dev", "test"]
SPLITS: dict[Role, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("validation", "dev", "validation_matched"),
    "test": ("test", "validation_mismatched"),
}
NLI = ("entailment", "neutral", "contradiction")
NO_CONSENSUS = "-"
LONGEST_ROW = 1 << 26  # bytes
# AllNLI's splits by their number of rows, and the row where SNLI ends and MultiNLI begins: it has no column for that.
ALLNLI = {942069: 549367, 19657: 9842, 19656: 9824}
SUFFIXES = (".parquet", ".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".gz")
CSV, JSONL = (".csv", ".tsv", ".txt"), (".jsonl", ".json", ".ndjson")
PREMISE, HYPOTHESIS, LABEL = ("premise", "sentence1"), ("hypothesis", "sentence2"), ("label", "gold_label")
# Name for messages, rows, and the class names of those columns whose integers have names.
Loaded = tuple[str, pa.Table, dict[str, list[str]]]


@dataclass(frozen=True)
class Pairs:
    """The pairs of one split. All sequences have the same length n; `label` holds class numbers."""

    name: str
    premise: list[str]
    hypothesis: list[str]
    label: np.ndarray
    row: np.ndarray
    source: list[str] | None
    label_names: tuple[str, ...]
    num_dropped: int = 0
    columns: tuple[str, ...] = ("premise", "hypothesis", "label")  # as the source calls them

    def __len__(self) -> int:
        return len(self.premise)


def load_splits(config: DataConfig) -> dict[Role, Pairs]:
    """The train split and what there is of dev and test, with one set of classes. Raises UserError."""
    train = load_pairs(config, "train", config.label_names)
    if train is None:
        raise UserError("no training data: give --train_file FILE, or a --dataset_name that has a train split")
    if len(train.label_names) < 2:
        raise UserError(f"{train.name}: all pairs have one label, {train.label_names[0]!r}; there is nothing to learn")
    splits: dict[Role, Pairs] = {"train": train}
    for role in ("dev", "test"):
        pairs = load_pairs(config, role, train.label_names)
        if pairs is not None:
            splits[role] = pairs
    return splits


def load_pairs(config: DataConfig, role: Role, label_names: Sequence[str] | None) -> Pairs | None:
    """One split, or None where the data set has none. `label_names` fixes the classes; None = from this split."""
    if config.dataset_name == "builtin" and not _has_files(config):
        rows = pa.Table.from_pylist(builtin.pairs(role))
        loaded: Loaded | None = (f"builtin {role}", rows, {"label": list(builtin.LABEL_NAMES)})
    else:
        loaded = _load_file(config, role) if _has_files(config) else _load_hub(config, role)
    if loaded is None:
        return None
    place, table, names = loaded
    limit = {"train": config.max_train_samples, "dev": config.max_eval_samples, "test": config.max_test_samples}[role]
    if role != "train" and not _has_files(config) and _all_unlabelled(table, config.label_column):
        return None  # many test splits on the hub come without their labels
    return _check(table, place, config, label_names, names, limit)


def _all_unlabelled(table: pa.Table, column: str | None) -> bool:
    name = next((name for name in (column, *LABEL) if name in table.column_names), None)
    return name is not None and pc.all(pc.equal(table[name].cast(pa.string()), "-1")).as_py() is True


def split_name(config: DataConfig, role: Role) -> str:
    """`AllNLI-dev`, `snli-test`, ...: as reports, file names and metrics call a split."""
    files = {"train": config.train_file, "dev": config.validation_file, "test": config.test_file}
    name = Path((config.dataset_name or files[role] or "data").rstrip("/")).name
    while (stem := name.removesuffix(Path(name).suffix)) != name and Path(name).suffix in SUFFIXES:
        name = stem
    if name.endswith(role):
        return name
    return f"{'AllNLI' if name == 'all-nli' else name}-{role}"


def _has_files(config: DataConfig) -> bool:
    return any((config.train_file, config.validation_file, config.test_file))


def _load_file(config: DataConfig, role: Role) -> Loaded | None:
    file = {"train": config.train_file, "dev": config.validation_file, "test": config.test_file}[role]
    if file is None:
        return None
    path = Path(file)
    if path.is_dir():
        return _from_datasets(_open_saved(path), str(path), role)
    return file, read_table(path), {}


def read_table(path: Path) -> pa.Table:
    """A parquet, csv, tsv, txt or jsonl file, each also gzipped, by its name. Raises UserError naming the file."""
    kind = kind_of(path)
    with readable(path, kind):
        if kind == ".parquet":
            from pyarrow import parquet

            with pa.input_stream(path) as stream:  # which inflates a .gz
                return parquet.read_table(pa.BufferReader(stream.read()) if path.suffix == ".gz" else path)
        if kind in CSV:
            return _read_csv(path, tabs=kind != ".csv")
        return _read_jsonl(path)


def kind_of(path: Path) -> str:
    """The file's ending, without .gz. Raises UserError where nothing can be read from such a file."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        beginning = file.read(2)
    if beginning in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: text in UTF-16; save it as UTF-8")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind not in (".parquet", *CSV, *JSONL):
        raise UserError(f"{path}: unknown kind of file; use .parquet, .csv, .tsv, .txt or .jsonl, each also with .gz")
    return kind


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turns what a reader says of a damaged file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        # pyarrow counts the lines of a csv file from 1, the header among them.
        reason = re.sub(r"Row #(\d+)", lambda row: f"row {int(row[1]) - 2}", reason)
        raise UserError(f"{path}: cannot be read as {kind[1:]}: {reason}; mend the file or get it anew") from None


def open_csv(path: Path, tabs: bool) -> Any:
    """A reader of record batches, all columns text."""
    from pyarrow import csv

    # Tab-separated NLI files have stray quotes, which mean nothing there.
    parsing = csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
    )
    # Several threads do not know the row's number.
    one_thread = csv.ReadOptions(use_threads=False, block_size=LONGEST_ROW)
    with csv.open_csv(path, one_thread, parsing) as reader:
        header = reader.schema.names
    # A premise that says "1" or "null" is text, neither a number nor missing.
    as_text = csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
    return csv.open_csv(path, one_thread, parsing, as_text)


def _read_csv(path: Path, tabs: bool) -> pa.Table:
    with open_csv(path, tabs) as reader:
        return reader.read_all()


def _read_jsonl(path: Path) -> pa.Table:
    from pyarrow import json

    options = json.ReadOptions(block_size=LONGEST_ROW)
    with pa.input_stream(path) as stream:
        if stream.read(1) == b"[":
            raise ValueError("one JSON array; write one object a line")
    table = json.read_json(path, options)
    dates = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
    if dates:  # text that happens to look like dates is still text
        texts = json.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in dates]))
        table = json.read_json(path, options, texts)
    return table


def _open_saved(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a folder of datasets' save_to_disk: {error}") from None


def _load_hub(config: DataConfig, role: Role) -> Loaded | None:
    import datasets

    name = config.dataset_name
    if name is None:
        return None
    if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
        return _from_datasets(_open_saved(Path(name)), name, role)
    try:
        loaded = datasets.load_dataset(name, config.dataset_config_name, revision=config.dataset_revision)
    except Exception as error:  # the hub's client raises many kinds; none means anything to the user but this
        offline = "; HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise UserError(
            f"data set {name!r} could not be loaded from the hub{offline} ("
            f"{first_line(error)}). Without network, give --train_file, --validation_file and --test_file, "
            f"or a folder saved with save_to_disk as --dataset_name"
        ) from None
    return _from_datasets(loaded, name, role)


def _from_datasets(loaded: Any, place: str, role: Role) -> Loaded | None:
    """The role's split of a datasets.DatasetDict, or a datasets.Dataset itself."""
    if isinstance(loaded, dict):
        split = next((s for s in SPLITS[role] if s in loaded), None)
        if split is None:
            return None
        loaded, place = loaded[split], f"{place} {split}"
    names = {column: feature.names for column, feature in loaded.features.items() if hasattr(feature, "names")}
    return place, loaded.with_format("arrow")[:], names


def _check(
    table: pa.Table,
    place: str,
    config: DataConfig,
    label_names: Sequence[str] | None,
    class_names: dict[str, list[str]],
    limit: int | None,
) -> Pairs:
    texts = _text_columns(table, place, config.premise_column, config.hypothesis_column)
    premise, hypothesis = (table[name] for name in texts)
    label = _column(table, place, "label_column", config.label_column, LABEL)
    own_names = class_names.get(label, config.label_names)
    numbers, names = _class_numbers(table[label], place, label_names, own_names)
    kept = np.flatnonzero(numbers >= 0)[:limit]
    if len(kept) == 0:
        raise UserError(f"{place}: no pair with a label ({table.num_rows} rows)")
    column = next((table[name] for name in ("source", "genre") if name in table.column_names), None)
    source = None if column is None else [str(s) for s in column.take(kept).to_pylist()]
    if source is None and (border := ALLNLI.get(table.num_rows)) and Path(config.dataset_name or "").name == "all-nli":
        source = ["SNLI" if row < border else "MNLI" for row in kept.tolist()]
    return Pairs(
        name=place,
        premise=_text(premise, place, "premise", kept),
        hypothesis=_text(hypothesis, place, "hypothesis", kept),
        label=numbers[kept],
        row=kept,
        source=source,
        label_names=names,
        num_dropped=int((numbers[: kept[-1] + 1 if len(kept) == limit else None] < 0).sum()),
        columns=(*texts, label),
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


def _text(column: pa.ChunkedArray, place: str, field: str, rows: np.ndarray, start: int = 0) -> list[str]:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{place}: {field} must be text, found {column.type}")
    column = column.cast(pa.string()).take(rows)
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy()
    if blank.any():
        first = int(np.flatnonzero(blank)[0])
        what = "null" if column[first].as_py() is None else "empty"
        raise UserError(
            f"{place}, row {start + rows[first]}: {field} is {what} (of {int(blank.sum())} such rows the first)"
        )
    return column.to_pylist()


def _class_numbers(
    column: pa.ChunkedArray, place: str, label_names: Sequence[str] | None, own_names: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class number of each row, -1 where there is no consensus; and the classes' names."""
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise UserError(f"{place}, row {row}: label is null")
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return _from_integers(column, place, label_names, own_names)
    try:
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    except pa.ArrowException:
        raise UserError(f"{place}: label must be a class name or number, found {column.type}") from None
    seen = set(texts.unique().to_pylist()) - {NO_CONSENSUS}
    if "" in seen:
        raise UserError(f"{place}, row {texts.index('').as_py()}: label is empty")
    if seen and all(_is_fraction(text) for text in seen):
        raise UserError(f"{place}: labels such as {min(seen)} are scores, not classes; crossrank trains classifiers")
    if seen and all(re.fullmatch("-?[0-9]{1,18}", text) for text in seen):  # integers in a csv file
        integers = pc.replace_substring_regex(texts, "^-$", "-1").cast(pa.int64())
        return _from_integers(integers, place, label_names, own_names)
    names = tuple(label_names or (NLI if seen <= set(NLI) else _nli_order(sorted(seen))))
    encoded = pc.index_in(texts, pa.array(names, pa.string()))
    wrong = (encoded.is_null().to_numpy()) & (pc.not_equal(texts, NO_CONSENSUS).to_numpy())
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(f"{place}, row {row}: {unknown('label', texts[row].as_py(), names)}")
    return pc.fill_null(encoded, -1).to_numpy().astype(np.int64), names


def _nli_order(names: list[str]) -> list[str]:
    """`names` as entailment, neutral, contradiction if they are that in any case and order; else as they are."""
    return sorted(names, key=lambda n: NLI.index(n.lower())) if {n.lower() for n in names} == set(NLI) else names


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:
        return False


def _from_integers(
    column: pa.ChunkedArray, place: str, label_names: Sequence[str] | None, own_names: list[str] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    if not own_names and label_names:
        own_names = _nli_order(list(label_names))
    values = column.to_numpy()
    numbers = values.astype(np.int64)
    found = np.unique(numbers[numbers >= 0])
    if not (own_names or label_names) and len(found) and len(found) <= found[-1]:
        shown = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
        raise UserError(
            f"{place}, row {int(numbers.argmax())}: class numbers must run from 0 without gaps, found {shown}; "
            f"name all classes with --label_names"
        )
    names = tuple(own_names or label_names or (NLI if len(found) == 3 else [f"LABEL_{i}" for i in range(len(found))]))
    wrong = (numbers != values) | (numbers < -1) | (numbers >= len(names))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{place}, row {row}: label {values[row]} is outside the classes 0..{len(names) - 1} ({', '.join(names)})"
        )
    if own_names and label_names and list(label_names) != own_names:
        numbers = _renumber(numbers, own_names, list(label_names), place)
        names = tuple(label_names)
    return numbers, names


def _renumber(numbers: np.ndarray, own_names: list[str], label_names: list[str], place: str) -> np.ndarray:
    """The data set's own class numbers in the order of `label_names`."""
    missing = [name for name in own_names if name not in label_names]
    if missing:
        raise UserError(f"{place}: its classes {own_names} include {missing}, which are not among {label_names}")
    order = np.array([label_names.index(name) for name in own_names] + [-1])
    return order[numbers]


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
