"""Every source and layout, and every kind of bad row with an error that names its place."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.made_pairs import premises_of, sources_of, texts_of
from trainer.config import DataConfig, UserError
from trainer.data.load import load_pairs, load_splits, split_name
from trainer.labels.values import NLI

ROWS = [
    {"premise": 'A "man", sitting.', "hypothesis": "A man sits.", "label": 0},
    {"premise": "1", "hypothesis": "null", "label": 2},
    {"premise": "Zwei Hunde.", "hypothesis": "Ein Hund.", "label": 1},
]


def csv_text(rows, separator, quote):
    def cell(value):
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if quote and ('"' in text or separator in text) else text

    return "\n".join(separator.join(map(cell, r)) for r in [rows[0].keys(), *(r.values() for r in rows)]) + "\n"


def write(path, rows):
    name = path.name.removesuffix(".gz")
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        return path
    if name.endswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = csv_text(rows, "," if name.endswith("csv") else "\t", quote=name.endswith("csv"))
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def load(path, classes=None, of_model=False, **fields):
    (pairs,) = load_pairs(DataConfig(train_file=str(path), **fields), "train", classes, of_model)
    return pairs


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "a.parquet.gz", "a.csv.gz", "a.tsv.gz", "a.jsonl.gz"]
)
def test_file_formats(tmp_path, name):
    pairs = load(write(tmp_path / name, ROWS))
    assert premises_of(pairs) == [row["premise"] for row in ROWS]
    assert [own for _, own in texts_of(pairs)] == [row["hypothesis"] for row in ROWS]
    assert pairs.label.tolist() == [0, 2, 1]
    assert pairs.label_names == NLI


SNLI = "gold_label\tsentence1_binary_parse\tsentence1\tsentence2\tcaptionID\n"


def test_snli_text_layout(tmp_path):
    (tmp_path / "snli_1.0_dev.txt").write_text(
        SNLI + 'neutral\t( A )\tA "quote.\tB\tc1\n-\t( A )\tA\tB\tc2\ncontradiction\t( A )\tA\tB\tc3\n'
    )
    pairs = load(tmp_path / "snli_1.0_dev.txt")
    assert (pairs.num_dropped, pairs.row.tolist()) == (1, [0, 2])
    assert [pairs.label_names[i] for i in pairs.label] == ["neutral", "contradiction"]
    assert premises_of(pairs)[0] == 'A "quote.'


def test_multinli_jsonl_layout(tmp_path):
    row = {"annotator_labels": ["neutral"], "genre": "fiction", "sentence1": "A", "sentence2": "B", "pairID": "1n"}
    rows = [row | {"gold_label": label} for label in ("neutral", "-", "entailment")]
    pairs = load(write(tmp_path / "multinli_1.0_dev_matched.jsonl", rows))
    assert sources_of(pairs) == ["fiction", "fiction"]
    assert (pairs.label.tolist(), pairs.num_dropped) == ([1, 0], 1)


def test_integer_no_consensus_is_dropped_in_every_format(tmp_path):
    rows = [*ROWS, ROWS[0] | {"label": -1}]
    for name in ("a.parquet", "a.csv"):
        assert load(write(tmp_path / name, rows)).num_dropped == 1


def test_other_classes_and_columns(tmp_path):
    rows = [{"q": "a", "p": "b", "y": y} for y in ("yes", "no", "maybe", "no")]
    pairs = load(write(tmp_path / "a.csv", rows), premise_column="q", hypothesis_column="p", label_column="y")
    assert pairs.label_names == ("maybe", "no", "yes")
    assert pairs.label.tolist() == [2, 1, 0, 1]


def test_first_samples_are_used(tmp_path):
    rows = [ROWS[0] | {"label": -1}, *ROWS]
    pairs = load(write(tmp_path / "a.parquet", rows), max_train_samples=2)
    assert (pairs.row.tolist(), pairs.num_dropped) == ([1, 2], 1)
    assert f"the first 2 of {len(ROWS)} pairs (1 more dropped" in pairs.describe()


def test_save_to_disk_and_class_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["contradiction", "neutral", "entailment"]
    features = datasets.Features(
        premise=datasets.Value("string"), hypothesis=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    split = datasets.Dataset.from_list(ROWS, features=features)
    datasets.DatasetDict(train=split, validation=split.select([1])).save_to_disk(str(tmp_path / "saved"))
    splits = load_splits(DataConfig(dataset_name=str(tmp_path / "saved")))
    assert set(splits) == {"train", "dev"}
    assert splits["train"].label_names == tuple(names)
    # A model with the classes in another order gets the same meaning.
    (ours,) = load_pairs(DataConfig(dataset_name=str(tmp_path / "saved")), "train", NLI)
    assert [NLI[i] for i in ours.label] == [names[row["label"]] for row in ROWS]
    split.save_to_disk(str(tmp_path / "one"))
    assert len(load(tmp_path / "one")) == 3


def test_real_files(allnli):
    pairs = load(allnli / "train_first3000_hub_order.parquet")
    assert len(pairs) == 3000
    lengths = [len(text) for text in premises_of(pairs)[:1000]]
    assert (min(lengths), round(np.mean(lengths), 2), max(lengths)) == (23, 69.54, 227)


@pytest.mark.parametrize(
    "names", [("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), ("contradiction", "entailment", "neutral")]
)
def test_numbers_mean_the_usual_nli_classes(tmp_path, names):
    """A model may have the classes in its own order: a file's 0 is still entailment."""
    pairs = load(write(tmp_path / "a.parquet", ROWS), names)
    assert [pairs.label_names[i].lower() for i in pairs.label] == [NLI[row["label"]] for row in ROWS]
    swapped = load(write(tmp_path / "a.parquet", ROWS), ("a", "b", "c"), of_model=True)
    assert swapped.label.tolist() == [row["label"] for row in ROWS]


def test_nli_names_in_any_case(tmp_path):
    rows = [ROWS[0] | {"label": name} for name in ("Neutral", "Contradiction", "Entailment")]
    assert load(write(tmp_path / "a.csv", rows)).label_names == ("Entailment", "Neutral", "Contradiction")


def test_long_rows(tmp_path):
    rows = [ROWS[0] | {"premise": "word " * 600_000}, *ROWS]
    for name in ("a.csv", "a.jsonl"):
        assert len(premises_of(load(write(tmp_path / name, rows)))[0]) == 3_000_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"premise": "a"}]', "one object a line"),
        ("premise,hypothesis,label\na,b,0\n".encode("utf-16"), "UTF-16"),
        ("premise,hypothesis,label\na,b,0\n".encode("utf-16-le"), "UTF-16"),
        (gzip.compress("premise,hypothesis,label\na,b,0\n".encode("utf-16-be"), mtime=0), "UTF-16"),
        (b'premise,hypothesis,label\na,b,0\n\n"say \\"hi\\" to me",b,1\n', 'row 1: text follows a closing quote.*""'),
        (b'premise,hypothesis,label\n"Hello," he said,b,0\n', "row 0: text follows a closing quote"),
        (b'"premise"\t"hypothesis"\t"label"\n"a"\t"b\\"c"\t"0"\n', "row 0: text follows a closing quote"),
        (b"premise,hypothesis,label\na,b,--1\n", "unknown label|nothing to learn"),
    ],
)
def test_odd_files(tmp_path, content, expected):
    endings = {b"[": "json", b"\x1f": "csv.gz", b'"': "tsv"}
    path = tmp_path / f"a.{endings.get(content[:1], 'csv')}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_splits(DataConfig(train_file=str(path)))


def test_split_names():
    assert split_name("all-nli", "dev") == "AllNLI-dev"
    assert split_name("snli_1.0_test", "test") == "snli_1.0_test"
    assert split_name("builtin", "dev") == "builtin-dev"


BAD = [
    ([ROWS[0], ROWS[0] | {"label": 3}], {"label_names": ["a", "b", "c"]}, ["row 1", "label 3", "0..2"]),
    ([ROWS[0], ROWS[0] | {"label": -2}], {}, ["row 1", "label -2"]),
    ([ROWS[0], ROWS[0] | {"premise": " "}], {}, ["row 1", "premise is empty"]),
    ([ROWS[0], ROWS[0] | {"hypothesis": None}], {}, ["row 1", "hypothesis is null"]),
    ([ROWS[0], ROWS[0] | {"label": None}], {}, ["row 1", "label is null"]),
    ([ROWS[0] | {"label": -1}], {}, ["no pair with a label", "1 rows"]),
    ([{"text": "a", "label": 0}], {}, ["no column 'premise' or 'sentence1' or", "text, label", "--premise_column"]),
    ([ROWS[0] | {"premise": 5}], {}, ["premise must be text"]),
    (
        [ROWS[0] | {"label": "x"}, ROWS[0] | {"label": "entailmnt"}],
        {"label_names": list(NLI)},
        ["row 0", "unknown label"],
    ),
    ([ROWS[0] | {"label": "a"}, ROWS[0] | {"label": " "}], {}, ["row 1", "label is empty"]),
    ([ROWS[0] | {"label": "0.5"}, ROWS[0] | {"label": "1.5"}], {}, ["scores, not classes"]),
    ([ROWS[0], ROWS[0] | {"label": 10**12}], {}, ["row 1", "without gaps"]),
    ([ROWS[0] | {"label": [1]}], {}, ["class name or number"]),
]


@pytest.mark.parametrize(("rows", "fields", "expected"), BAD)
def test_bad_rows(tmp_path, rows, fields, expected):
    path = write(tmp_path / "bad.parquet", rows)
    with pytest.raises(UserError) as caught:
        load(path, **fields)
    for part in [str(path), *expected]:
        assert part in str(caught.value)


def test_rows_of_a_limited_split_keep_their_numbers(tmp_path):
    rows = [ROWS[0] | {"label": -1}, ROWS[0], ROWS[0] | {"premise": ""}]
    with pytest.raises(UserError, match="row 2: premise is empty"):
        load(write(tmp_path / "a.parquet", rows))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv.gz", "a.jsonl.gz", "a.jsonl"])
def test_truncated_files(tmp_path, name):
    path = write(tmp_path / name, ROWS * 200)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"cannot be read|row 599: not a JSON object"):
        load(path)


def test_ragged_csv_names_the_row(tmp_path):
    (tmp_path / "a.csv").write_text("premise,hypothesis,label\na,b,0\na,b,c,0\n")
    with pytest.raises(UserError, match=r"a\.csv: cannot be read as csv.*row 1: Expected 3 columns, got 4"):
        load(tmp_path / "a.csv")


def test_text_in_another_encoding_names_the_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"premise,hypothesis,label\na,b,0\na\xff,b,0\n")
    with pytest.raises(UserError, match=r"row 1: CSV conversion error to string: invalid UTF8"):
        load(tmp_path / "a.csv")


def test_one_column_twice(tmp_path):
    (tmp_path / "a.csv").write_text("premise,hypothesis,label\na,b,0\n")
    with pytest.raises(UserError, match="premise and hypothesis are both column 'premise'"):
        load(tmp_path / "a.csv", hypothesis_column="premise")


def test_text_that_looks_like_dates_is_text(tmp_path):
    rows = [{"premise": "2024-01-01", "hypothesis": "2024-01-02", "label": "a"}]
    assert premises_of(load(write(tmp_path / "a.jsonl", rows))) == ["2024-01-01"]


def test_names_belong_to_the_label_column(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        genre=datasets.ClassLabel(names=["fiction", "travel"]), premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]),
    )  # fmt: skip
    rows = [{"genre": 0, "premise": "a", "hypothesis": "b", "label": 1}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved").label_names == ("no", "yes")


def test_two_columns_of_one_name(tmp_path):
    (tmp_path / "a.csv").write_text("premise,hypothesis,hypothesis,label\na,b,c,0\n")
    with pytest.raises(UserError, match="two columns are called 'hypothesis'"):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("labels", "fields", "expected"),
    [
        ([0, 0], {}, "2 pairs, all with label 'LABEL_0'"),
        (["entailment"] * 4, {}, "4 pairs, all with label 'entailment'"),
        (["entailment"] * 4, {"label_names": list(NLI)}, "4 pairs, all with label 'entailment'"),
        ([0, 0, 1, 2], {"max_train_samples": 2}, "the first 2 of 4 pairs, all with label 'entailment'.*shuffle them"),
    ],
)
def test_one_class_is_nothing_to_learn(tmp_path, labels, fields, expected):
    path = write(tmp_path / "a.csv", [ROWS[0] | {"label": label} for label in labels])
    with pytest.raises(UserError, match=f"{expected}.*"):
        load_splits(DataConfig(train_file=str(path), **fields))


def test_classes_are_those_that_occur(tmp_path, said):
    """No head for a class that no pair has; one that is asked for is mentioned."""
    path = write(tmp_path / "a.csv", [ROWS[0] | {"label": label} for label in ("entailment", "contradiction")])
    assert load(path).label_names == ("entailment", "contradiction")
    assert not said
    assert load(path, label_names=list(NLI)).label_names == NLI
    assert said == [f"{path}: no pair has the label neutral"]


def test_dictionary_encoded_text(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    table = table.set_column(0, "premise", table["premise"].dictionary_encode())
    pq.write_table(table, tmp_path / "a.parquet")
    assert premises_of(load(tmp_path / "a.parquet")) == [row["premise"] for row in ROWS]


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.parquet")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(UserError, match="unknown kind of file"):
        load(tmp_path / "a.xlsx")


def test_dev_with_a_class_that_train_lacks(tmp_path):
    train = write(tmp_path / "train.csv", [{"premise": "a", "hypothesis": "b", "label": y} for y in ("x", "y")])
    dev = write(tmp_path / "dev.csv", [{"premise": "a", "hypothesis": "b", "label": y} for y in ("x", "z")])
    with pytest.raises(UserError, match=r"dev\.csv, row 1: unknown label 'z'"):
        load_splits(DataConfig(train_file=str(train), validation_file=str(dev)))


def test_hub_without_network():
    with pytest.raises(UserError, match=r"could not be loaded from the hub.*--train_file"):
        load_splits(DataConfig(dataset_name="sentence-transformers/all-nli", dataset_config_name="pair-class"))


TEXTS = ['He said "hi" to me', '"Hello" she said', "plain", 'a 5" pipe', '"lone', '"whole"', '""x""', '"', "a\\b", "\\"]


@pytest.mark.parametrize("quoting", ["minimal", "all", "none"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "tsv.gz"])
def test_quotes_mean_what_the_writer_means(tmp_path, kind, quoting, monkeypatch):
    """Python's csv module and pandas quote a text with a quote in it; NLI corpora do not. Blocks end anywhere."""
    import csv
    import io

    from trainer.rows import quotes
    from trainer.rows.tables import read_table

    if kind == "csv" and quoting == "none":
        pytest.skip("a csv file has no such form")
    rows = [["premise", "hypothesis", "label"], *([text, f"{text} b", "0"] for text in TEXTS)]
    text, separator = io.StringIO(), "," if kind == "csv" else "\t"
    if quoting == "none":
        text.write("".join("\t".join(row) + "\n" for row in rows))
    else:
        csv.writer(text, delimiter=separator, quoting=getattr(csv, f"QUOTE_{quoting.upper()}")).writerows(rows)
    data = text.getvalue().encode()
    (tmp_path / f"a.{kind}").write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert read_table(tmp_path / f"a.{kind}").to_pylist() == [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    if quoting != "none":
        blocks = io.BytesIO(data)
        blocks.read = lambda size: io.BytesIO.read(blocks, 3)
        assert not quotes._doubtful(blocks, separator)


def test_a_column_of_objects_is_no_text(tmp_path):
    """Also where an object looks like what crossrank itself keeps in one."""
    kind = pa.struct([("json", pa.large_string())])
    column = pa.array([{"json": "no JSON"}] * 2, kind)
    texts = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 1]}
    for name in texts:
        pq.write_table(pa.table(texts | {name: column}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=rf"row 0: {name} must be .*found struct<json"):
            load(tmp_path / "a.parquet")


def test_an_accent_is_a_part_of_its_letter(tmp_path):
    rows = [ROWS[0] | {"label": label} for label in ("caf\u00e9", "cafe\u0301", "no")]
    assert load(write(tmp_path / "a.csv", rows)).label.tolist() == [0, 0, 1]
    assert load(write(tmp_path / "a.csv", rows), label_names=["no", "cafe\u0301"]).label.tolist() == [1, 1, 0]
