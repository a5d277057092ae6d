"""Names match whatever their case, and what a label map says, or what is plain, is what is learned and scored."""

import pyarrow as pa
import pytest

from tests.data.test_sources import ROWS, write
from trainer.base.errors import UserError
from trainer.config import DataConfig
from trainer.data.load import load_scored, load_splits
from trainer.labels.classes import class_numbers, learned, scored
from trainer.labels.label_map import images, in_words, suggested
from trainer.labels.values import NLI, read_labels

TWO = ("entailment", "not_entailment")
JOINED = "neutral,contradiction=not_entailment"
WORDS = "neutral, contradiction as not_entailment"


def column(values):
    return read_labels(pa.chunked_array([pa.array(values)]), "data")


def score(values, classes=NLI, own_names=None, of_model=True, **fields):
    found = scored(column(values), DataConfig(**fields), own_names, classes, of_model)
    return found.label.tolist(), found.names, None if found.of_class is None else found.of_class.tolist()


def learn(values, **fields):
    found = learned(column(values), DataConfig(**fields), None)
    return found.label.tolist(), found.names


@pytest.mark.parametrize(
    ("values", "classes", "expected", "names"),
    [
        (["Entailment", "ENTAILMENT", "NEUTRAL", "Entailment"], None, [0, 0, 1, 0], ("Entailment", "NEUTRAL")),
        (["ENTAILMENT", "NEUTRAL ", "Contradiction"], NLI, [0, 1, 2], NLI),
        (["entailment", "neutral"], ("NEUTRAL", "Entailment"), [1, 0], ("NEUTRAL", "Entailment")),
        (["a", "A", "A"], ("A", "a"), [1, 0, 0], ("A", "a")),  # two classes of a model are two
        (["stra\u00dfe", "STRASSE", "x"], None, [0, 0, 1], ("stra\u00dfe", "x")),  # of equally many the first
        (["None", "no"], ("none", "no"), [0, 1], ("none", "no")),
    ],
)
def test_case_is_no_class(values, classes, expected, names):
    found, known = class_numbers(column(values), classes)
    assert (found.tolist(), known) == (expected, names)


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        (["entailmnt"], NLI, "row 0: unknown label 'entailmnt'; did you mean 'entailment'"),
        (["yes no"], ("yes_no", "x"), "unknown label 'yes no'; did you mean 'yes_no'"),
        (["B", "b"], ("A", "a"), "unknown label 'B'"),
        (["Aa"], ("AA", "aa"), "unknown label 'Aa'"),  # it may be either
        (["yes", "not_entailment", "non entailment"] * 9, None, "did you mean"),
    ],
)
def test_other_near_misses_are_errors(values, classes, expected):
    with pytest.raises(UserError, match=expected):
        class_numbers(column(values), classes)


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        (["neutral", "entailment", "contradiction"], {"label_map": JOINED}, ([1, 0, 1], TWO)),
        (["NEUTRAL", "Entailment", "-"], {"label_map": JOINED}, ([1, 0, -1], ("Entailment", "not_entailment"))),
        ([2, 0, 1, -1], {"label_map": JOINED}, ([1, 0, 1, -1], TWO)),
        ([0, 1, 2], {"label_names": ["x", "y", "z"], "label_map": "z=x"}, ([0, 1, 0], ("x", "y"))),
        (["not_entailment", "entailment", "neutral"], {"label_map": JOINED}, ([1, 0, 1], TWO)),
        # Once: it swaps. Names that are numbers are names.
        (["a", "b"], {"label_map": "a=b,b=a"}, ([1, 0], ("a", "b"))),
        ([1, 5, 3], {"label_names": [*"12345"], "label_map": "1,2=low,4,5=high"}, ([0, 2, 1], ("low", "3", "high"))),
        (["True", "False"], {"label_map": "true=yes,false=no"}, ([1, 0], ("no", "yes"))),
        (["n/a", "entailment"], {"label_map": "n/a=neutral"}, ([1, 0], NLI[:2])),
    ],
)
def test_a_map_in_training(values, fields, expected):
    assert learn(values, **fields) == expected


NOT = [0, 1, 1]
RTE = ["entailment", "not_entailment"]


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        (RTE, {"label_map": JOINED}, ([0, 1], TWO, NOT)),
        ([*NLI], {"label_map": JOINED}, ([0, 1, 1], TWO, NOT)),
        ([0, 1], {"label_names": RTE, "label_map": JOINED}, ([0, 1], TWO, NOT)),
        (RTE, {"label_map": JOINED, "classes": ("Neutral", "Contradiction", "Entailment")},
         ([1, 0], ("not_entailment", "Entailment"), [0, 0, 1])),
        (["s", "r", "n"], {"label_map": "s=entailment,r=contradiction,n=neutral"}, ([0, 2, 1], NLI, None)),
        ([*NLI], {"label_map": "neutral=neutral"}, ([0, 1, 2], NLI, None)),
        # Nobody needs to say it.
        (RTE, {}, ([0, 1], TWO, NOT)),
        (["Non-Entailment", "ENTAILMENT"], {}, ([1, 0], ("entailment", "Non-Entailment"), NOT)),
        (["not entailment"], {}, ([1], ("entailment", "not entailment"), NOT)),
        ([1, 0], {"label_names": RTE}, ([1, 0], TWO, NOT)),
        ([1, 0], {"own_names": RTE}, ([1, 0], TWO, NOT)),
        ([*NLI], {"classes": TWO}, ([0, 1, 1], TWO, None)),
        # Of the sets that need it, and of these alone.
        ([*NLI], {"eval_label_map": JOINED}, ([0, 1, 2], NLI, None)),
        (RTE, {"eval_label_map": JOINED}, ([0, 1], TWO, NOT)),
        (RTE, {"eval_label_map": "supports=entailment"}, ([0, 1], TWO, NOT)),
        # Names of another set's numbers.
        ([*NLI], {"label_names": RTE}, ([0, 1, 2], NLI, None)),
    ],
)  # fmt: skip
def test_a_map_in_scoring(values, fields, expected):
    assert score(values, **fields) == expected


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        ([*NLI], {"label_map": JOINED}, ([0, 1, 1], TWO, None)),
        ([0, 1, 2], {"label_map": JOINED}, ([0, 1, 1], TWO, None)),  # as the training pairs' numbers
        (RTE, {"label_map": JOINED}, ([0, 1], TWO, None)),
        (["a", "b", "c"], {"label_map": "a=b", "eval_label_map": "c=not_entailment,b=entailment"},
         ([0, 0, 1], TWO, None)),
    ],
)  # fmt: skip
def test_both_maps_of_a_run(values, fields, expected):
    assert score(values, classes=TWO, of_model=False, **fields) == expected


@pytest.mark.parametrize(
    ("values", "fields", "expected"),
    [
        (RTE, {"label_map": "neutral=not_entailment"},
         r"data: contradiction is mapped to nothing, .*or to itself: contradiction=contradiction"),
        (RTE, {"label_map": "nuetral,contradiction=not_entailment"},
         r"label_map maps 'nuetral', .*data or the model \(entailment, .*; did you mean 'neutral'\?"),
        (RTE, {"label_map": "neutral,contradiction=nonentailment"},
         "row 1: label 'not_entailment' is none of entailment, nonentailment, which label_map makes of the model's "
         "entailment, neutral, contradiction; the labels here are entailment, not_entailment"),
        (RTE, {"eval_label_map": "neutral,contradiction=nonentailment"}, "which eval_label_map makes"),
        (RTE, {"label_map": "neutral,contradiction,entailment=x"}, "takes all classes .* as 'x'"),
        (["yes", "no"], {}, "row 0: unknown label 'yes'; valid: contradiction, entailment, neutral"),
        ([*RTE, "neutral"], {}, "row 1: unknown label 'not_entailment'"),
        ([*RTE, "non_entailment"], {}, "unknown label"),
        ([0, 1], {}, "the model has 3 classes .* with --label_names entailment,not_entailment$"),
        ([0, 1] * 20, {"of_model": False}, "the model has 3 classes .*; say names here, such as entailment and not_"),
        ([0, 1], {"label_map": JOINED}, "--label_names entailment,not_entailment$"),
    ],
)  # fmt: skip
def test_maps_that_are_refused(values, fields, expected):
    with pytest.raises(UserError, match=expected):
        score(values, **fields)


def file(path, labels):
    return str(write(path, [ROWS[0] | {"label": label} for label in labels]))


def test_the_maps_of_a_run(tmp_path, said):
    """The train split, its dev split and a test set that has two classes."""
    three, two = file(tmp_path / "snli.csv", [*NLI]), file(tmp_path / "rte.csv", RTE)
    files = {"train_file": three, "validation_file": three, "test_file": two}
    splits = load_splits(DataConfig(**files))
    assert [own.label_names for own in splits.values()] == [NLI, NLI, TWO]
    assert [own.mapped for own in splits.values()] == ["", "", WORDS]
    assert said.count(f"{two}: scored with {WORDS}") == 1
    splits = load_splits(DataConfig(**files, label_map=JOINED))
    assert [own.label_names for own in splits.values()] == [TWO] * 3
    assert [own.mapped for own in splits.values()] == [WORDS, WORDS, ""]
    assert f"{three}: taken with {WORDS}" in said
    splits = load_splits(DataConfig(**files, eval_label_map=JOINED))
    assert [own.label_names for own in splits.values()] == [NLI, NLI, TWO]
    assert f"{three}: eval_label_map is not needed: its labels are classes of the model" in said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"label_map": "nuetral=x"}, "label_map maps 'nuetral', which is no class of .*snli.csv .*mean 'neutral'"),
        (
            {"label_map": "entailment,neutral,contradiction=x"},
            "label_map takes entailment, neutral, contradiction as",
        ),
        ({"eval_label_map": "suports=entailment"}, "eval_label_map maps 'suports', which is no class of .*rte.csv or"),
    ],
)
def test_maps_that_a_run_refuses(tmp_path, fields, expected):
    files = {"train_file": file(tmp_path / "snli.csv", [*NLI]), "test_file": file(tmp_path / "rte.csv", RTE)}
    with pytest.raises(UserError, match=expected):
        load_splits(DataConfig(**files, **fields))


def test_a_map_may_be_of_one_of_several_sets(tmp_path):
    """What it names is looked for in all of them."""
    fever = {"validation_file": file(tmp_path / "fever.csv", ["SUPPORTS", "REFUTES"])}
    snli = {"test_file": file(tmp_path / "snli.csv", [*NLI])}
    sets = load_scored(DataConfig(**fever, **snli, label_map="supports=entailment,refutes=contradiction"), NLI, True)
    assert [own.label.tolist() for own in sets.values()] == [[0, 2], [0, 1, 2]]


def test_images_keep_the_order_of_their_first():
    assert images(("x", "y", "z"), {"z": "x", "x": "Y"})[0] == ("y", "x")
    assert images(("x", "y", "z"), {"z": "New", "x": "new"})[1].tolist() == [0, 1, 0]
    assert in_words({"a": "b", "c": "b", "d": "D"}, ["A", "c", "d", "e"]) == "A, c as b"


def test_one_map_for_sets_that_need_several(tmp_path, said):
    """SciTail by the map, RTE and HANS by what is plain, SICK as it is."""
    names = {"scitail": ["entails", "neutral"], "rte": RTE, "hans": ["entailment", "non-entailment"],
             "sick": [name.upper() for name in NLI], "snli": ["entailment", "neutral"]}  # fmt: skip
    files = [file(tmp_path / f"{name}.csv", labels * 12) for name, labels in names.items()]
    config = DataConfig(test_file=files, eval_label_map="entails=entailment,contradiction=neutral")
    found = {own.split: own.label_names for own in load_scored(config, NLI, of_model=True).values()}
    assert found == {"scitail-test": NLI[:2], "rte-test": TWO, "hans-test": ("entailment", "non-entailment"),
                     "sick-test": NLI, "snli-test": NLI[:2]}  # fmt: skip
    load_scored(DataConfig(test_file=files[-1]), NLI, of_model=True)
    assert "if it has two, as SciTail has, say --eval_label_map contradiction=neutral" in said[-1]


@pytest.mark.parametrize(("names", "expected"), [
    (("e", "n", "c"), "e=entailment,n=neutral,c=contradiction"), (RTE, "neutral=not_entailment,contradiction=not_ent"),
    (("SUPPORTS", "REFUTES", "odd"), "SUPPORTS=entailment,REFUTES=contradiction,odd=..."),
])  # fmt: skip
def test_what_is_suggested(names, expected):
    assert suggested(names, NLI).startswith(expected)
