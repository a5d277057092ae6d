"""Sentence pairs from any source, checked row by row, as plain arrays.

Sources: local files, `save_to_disk` folders, the hub, and the embedded data set. A row without a consensus label
(SNLI's `-`, the hub's -1) is dropped and counted; any other bad row is an error that names its place. Rows count from
0, header excluded, and a pair keeps the row it had in its source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.base.environment import offline
from trainer.base.errors import UserError, first_line
from trainer.config import DataConfig
from trainer.data import builtin
from trainer.data.labels import class_numbers
from trainer.data.tables import SUFFIXES, read_table

Role = Literal["train", "dev", "test"]
SPLITS: dict[Role, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("validation", "dev", "validation_matched"),
    "test": ("test", "validation_mismatched"),
}
# AllNLI's splits by their number of rows, and the row where SNLI ends and MultiNLI begins: it has no column for that.
ALLNLI = {942069: 549367, 19657: 9842, 19656: 9824}
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
    if config.dataset_name == "builtin" and not config.has_files:
        rows = pa.Table.from_pylist(builtin.pairs(role))
        loaded: Loaded | None = (f"builtin {role}", rows, {"label": list(builtin.LABEL_NAMES)})
    else:
        loaded = _load_file(config, role) if config.has_files else _load_hub(config, role)
    if loaded is None:
        return None
    place, table, names = loaded
    limit = {"train": config.max_train_samples, "dev": config.max_eval_samples, "test": config.max_test_samples}[role]
    if role != "train" and not config.has_files and _all_unlabelled(table, config.label_column):
        return None  # many test splits on the hub come without their labels
    return _check(table, place, config, label_names, names, limit)


def _all_unlabelled(table: pa.Table, column: str | None) -> bool:
    name = next((name for name in (column, *LABEL) if name in table.column_names), None)
    return name is not None and pc.all(pc.equal(table[name].cast(pa.string()), "-1")).as_py() is True


def split_name(config: DataConfig, role: Role) -> str:
    """`AllNLI-dev`, `snli-test`, ...: as reports, file names and metrics call a split."""
    name = Path((config.dataset_name or config.file(role) or "data").rstrip("/")).name
    while (stem := name.removesuffix(Path(name).suffix)) != name and Path(name).suffix in SUFFIXES:
        name = stem
    if name.endswith(role):
        return name
    return f"{'AllNLI' if name == 'all-nli' else name}-{role}"


def _load_file(config: DataConfig, role: Role) -> Loaded | None:
    file = config.file(role)
    if file is None:
        return None
    path = Path(file)
    if path.is_dir():
        return _from_datasets(_open_saved(path), str(path), role)
    return file, read_table(path), {}


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
        forbidden = "; HF_HUB_OFFLINE is set" if offline() else ""
        raise UserError(
            f"data set {name!r} could not be loaded from the hub{forbidden} ("
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
    numbers, names = class_numbers(table[label], place, label_names, own_names)
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
