"""report.html of a run: its sections for every kind of model, what its charts say, and the errors that it shows."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import crossrank
from pyarrow import parquet
from run_folders import DEMO, EVIL, Elements, edited

from trainer.data import builtin
from trainer.report import svg
from trainer.report.page import page
from trainer.report.predictions import calibration, wilson
from trainer.report.read import read_run
from trainer.report.sets import by_class
from trainer.report.write import write_report

SECTIONS = ["scores", "training", "results", "errors", "data", "usage", "hyperparameters", "machine", "reproduction"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    crossrank("train", *DEMO, "--track_emissions", "false", "--write_report", "false", "--output_dir", folder)
    return folder


def shown(folder: Path) -> str:
    return page(read_run(folder))


def with_classes(demo: Path, target: Path, n: int) -> Path:
    """The run as one of n classes, in whose test set most pairs are right."""
    names = [f"class {i}" for i in range(n)]
    matrix = np.full((n, n), 1) + np.eye(n, dtype=int) * 30
    label, said = np.repeat(np.indices((n, n)).reshape(2, -1), matrix.ravel(), axis=1)
    scores = np.full((len(label), n), 0.3 / n)
    scores[np.arange(len(label)), said] += 0.7
    edited(demo, target, "about.json", lambda about: about["model"].update(label_names=names))

    def change(results):
        for own in results["metrics"].values():
            for name in ("by_source", "by_class"):
                own.pop(name)
            own |= {"confusion_matrix": matrix.tolist(), "label_names": names}

    edited(demo, target, "results.json", change)
    columns = {"index": np.arange(len(label)), "label": label}
    columns |= {f"score_{name}": scores[:, i] for i, name in enumerate(names)}
    for split in ("dev", "test"):
        parquet.write_table(pa.table(columns), target / "predictions" / f"builtin-{split}.parquet")
    return target


@pytest.mark.parametrize("n", [2, 3, 20])
def test_the_sections_of_a_classifier(n, demo, tmp_path):
    text = shown(with_classes(demo, tmp_path / "run", n))
    found = Elements(text)
    assert found.ids == SECTIONS
    assert found.classes.count("matrix") == 2  # once a set
    assert found.classes.count("hit") == 2 * n
    assert found.classes.count("count") == (2 * n * n if n <= 12 else 0)
    assert text.count("rotate(-90") == (2 * n if n == 20 else 0)
    assert text.count(">class 1<") >= 2 * 3  # a row, a column, a line of the table by class
    recall = 31 / (31 + n - 1)
    assert f"<td>{recall:.3f}</td>" in text
    assert "All of them" in text


def test_what_comes_first(demo):
    run = read_run(demo)
    scores = run.results["metrics"]["builtin-test"]
    text = shown(demo)
    head = text[: text.index('id="scores"')]
    assert f"<b>{scores['f1_macro']:.4f}</b>" in head
    assert "Test F1 macro on builtin-test" in head
    assert re.search(r"95 % interval 0\.\d{4} to 0\.\d{4}", head)
    assert run.results["finished_at"][:10] in head
    for fact in ("Training pairs", "Wall time", "Ranks", "Energy", "Base model"):
        assert f"<dt>{fact}</dt>" in head
    assert "<dd>640<" in head
    best = run.results["train"]["best_step"]
    assert f">best: step {best}<" in text
    assert text.index("crossrank train") > text.index('id="reproduction"')


def test_the_page_needs_nothing_else(demo):
    text = shown(demo)
    found = Elements(text)
    assert not {"script", "img", "link", "iframe", "use", "image"} & found.found
    assert not found.addresses
    assert "url(" not in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert len(found.ids) == len(set(found.ids))
    assert text == shown(demo)


def binary(results):
    for own in results["metrics"].values():
        own |= {"average_precision": 0.8312, "f1": 0.7, "auc": 0.9, "f1_threshold": 0.25, "num_samples": 101,
                "accuracy_threshold": 0.5,
                "confusion_matrix": [[60, 11], [10, 20]], "label_names": ["0", "1"]}  # fmt: skip
        for name in ("f1_macro", "f1_micro", "f1_weighted", "by_source", "by_class"):
            own.pop(name, None)
    results["errors"] = {"builtin-test": [{"row": 3, "source": None, "premise": "a", "hypothesis": "b", "label": "0",
                                           "predicted": "1", "probability": 0.9}]}  # fmt: skip


def mse(results):
    for split in results["metrics"]:
        results["metrics"][split] = {"loss": 0.1, "spearman": 0.8123, "pearson": 0.8, "num_samples": 101}
    results["errors"] = {"builtin-test": [{"row": 3, "source": None, "premise": "a", "hypothesis": "b", "label": 4.5,
                                           "predicted": 1.25, "probability": None}]}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "change", "value", "title"),
    [("binary_cross_entropy", binary, "0.8312", "Test Average Precision"), ("mse", mse, "0.8123", "Test Spearman")],
)
def test_one_score(objective, change, value, title, demo, tmp_path):
    """Card, pictures and page: the objective's main score, and what stands in for classes."""
    folder = edited(demo, tmp_path / "run", "results.json", change)
    edited(demo, folder, "about.json",
           lambda about: about["model"].update(objective=objective, label_names=["score"]))  # fmt: skip
    edited(demo, folder, "results.json", lambda results: results.update(
        examples=[own | {"scores": own["scores"][:1]} for own in results["examples"]]))  # fmt: skip
    label = np.arange(101) % 2 if change is binary else np.linspace(0, 5, 101)
    for split in ("dev", "test"):
        columns = {"index": np.arange(101), "label": label, "score": label / label.max() * 0.8}
        columns["score"][80:] = 0.9 - columns["score"][80:]
        parquet.write_table(pa.table(columns), folder / "predictions" / f"builtin-{split}.parquet")
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = [own | dict.fromkeys(("average_precision", "f1", "auc", "spearman", "pearson"), 0.5) for own in events]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in events))
    card = write_report(folder).read_text()
    text = (folder / "report.html").read_text()
    found = Elements(text)
    assert found.ids == SECTIONS
    assert f"<b>{value}</b>" in text
    assert f"{title} on builtin-test" in text
    between = re.search(r"95 % interval (-?0\.\d{4} to 0\.\d{4})<", text)[1]
    assert text.count(between) == 5  # of two sets as text and as a picture; both have the same predictions
    assert card.count(f"| {between} ") == 2
    assert "(500 resamples of the pairs)" in card
    assert found.classes.count("matrix") == (2 if change is binary else 0)
    assert "Predicted over true score" in text or "1 is predicted where the score is 0.25 or more" in text
    assert ("accuracy is at 0.5 (accuracy_threshold)" in text) == (change is binary)
    assert ("the matrix are at 0.25 (f1_threshold)" in text) == (change is binary)
    assert text.count("Both thresholds were chosen on these very pairs") == (2 if change is binary else 0)
    assert value in card
    assert "f1_macro" not in card
    assert ("BinaryCrossEntropyLoss" if change is binary else "MSELoss") in card
    assert (">1</b> 90.0%" if change is binary else ">1.25</b>") in text


def test_the_best_step_says_by_which_score(demo, tmp_path):
    """Where that is no curve; it stands among the scores of every set."""
    folder = shutil.copytree(demo, tmp_path / "run")
    best = read_run(demo).results["train"]["best_step"]
    config = (folder / "config.yaml").read_text()
    assert config.count("metric_for_best_model: null") == 1
    (folder / "config.yaml").write_text(config.replace("best_model: null", "best_model: accuracy"))
    text = shown(folder)
    assert f">best by Accuracy: step {best}<" in text
    accuracy = read_run(demo).results["metrics"]["builtin-test"]["accuracy"]
    assert ">Accuracy</th>" in text
    assert f"<td>{accuracy:.4f}</td>" in text
    card = write_report(folder).read_text()
    assert "name: Accuracy" not in card  # on the hub, as in sentence-transformers' cards
    assert "name: F1 Weighted" in card


def test_the_losses_are_told_apart(demo, tmp_path):
    """Where the training loss is weighted or smoothed; the page and the card say so."""
    folder = shutil.copytree(demo, tmp_path / "run")
    assert "the validation loss is not" not in shown(folder)
    config = (folder / "config.yaml").read_text()
    for old, new in (("class_weights: null", "class_weights: [2.0, 1.0, 1.0]"),
                     ("smoothing_factor: 0.0", "smoothing_factor: 0.1")):  # fmt: skip
        assert config.count(old) == 1, old
        config = config.replace(old, new)
    (folder / "config.yaml").write_text(config)
    expected = "is weighted (class_weights) and smoothed (label_smoothing_factor), the validation loss is not"
    assert expected in write_report(folder).read_text()
    assert (folder / "report.html").read_text().count(expected) == 1


def test_sets_of_many_classes_show_some(demo, tmp_path):
    def change(results):
        results["metrics"]["builtin-test"] |= {"confusion_classes": [0, 2], "confusion_matrix": [[9, 1, 2]] * 3}
        results["metrics"]["builtin-test"]["by_class"].popitem()

    text = shown(edited(demo, tmp_path / "run", "results.json", change))
    assert "The matrix has the 2 classes with the most pairs" in text
    assert "By class: the 2 with the most pairs." in text


def test_a_mapped_set_has_its_own_classes(demo, tmp_path):
    def change(results):
        own = results["metrics"]["builtin-test"]
        own |= {"confusion_matrix": [[30, 4], [7, 60]], "label_names": ["entailment", "not_entailment"],
                "mapped": "neutral, contradiction as not_entailment"}  # fmt: skip
        own.pop("by_class", None)

    folder = edited(demo, tmp_path / "run", "results.json", change)
    assert "| not_entailment | 7" in re.sub(" +", " ", write_report(folder).read_text())
    text = (folder / "report.html").read_text()
    assert "Classes were mapped: neutral, contradiction as not_entailment." in text
    assert text.count(">not_entailment<") == 3


def test_many_sets_and_sources(demo, tmp_path):
    def change(results):
        first = results["metrics"]["builtin-test"]
        first["by_source"] |= {"a <source>": first["by_source"]["place"]}
        for i in range(2, 9):
            results["metrics"][f"set {i}"] = first
            results["errors"][f"set {i}"] = results["errors"]["builtin-test"]

    text = shown(edited(demo, tmp_path / "run", "results.json", change))
    assert text.count('<details class="set"') == 9
    assert text.count('<details class="set" open') == 2
    assert text.index("<summary>builtin-test<span>") < text.index("<summary>builtin-dev<span>")
    assert "a &lt;source&gt;" in text
    assert "no calibration" in text  # of sets without predictions


def test_what_is_unfinished_or_old(demo, tmp_path):
    def of_an_earlier_version(results):
        for name in ("errors", "finished_at"):
            del results[name]
        for own in results["metrics"].values():
            for name in ("by_class", "label_names"):
                own.pop(name, None)

    old = edited(demo, tmp_path / "old", "results.json", of_an_earlier_version)
    edited(demo, old, "about.json", lambda about: about.pop("started_at"))
    assert Elements(shown(old)).ids == [name for name in SECTIONS if name != "errors"]
    (old / "results.json").unlink()
    with (old / "metrics.jsonl").open("a") as file:
        file.write("{\n")
    text = shown(old)
    assert "Unfinished run. It stands at step 24" in text
    assert "1 damaged line of metrics.jsonl is left out." in text
    assert Elements(text).ids == ["training", "data", "usage", "hyperparameters", "machine", "reproduction"]


def test_the_errors_are_those_of_the_predictions(demo):
    """The ten wrong predictions of the highest probability, of the test set only."""
    errors = json.loads((demo / "results.json").read_text())["errors"]
    assert list(errors) == ["builtin-test"]
    table = parquet.read_table(demo / "predictions" / "builtin-test.parquet").to_pylist()
    wrong = []
    for row in table:
        scores = [row[f"score_{name}"] for name in builtin.LABEL_NAMES]
        said = int(np.argmax(scores))
        if said != row["label"]:
            wrong.append((max(scores), row["index"], said))
    wrong.sort(key=lambda own: (-own[0], own[1]))
    rows = builtin.pairs("test")
    assert [(own["row"], own["probability"]) for own in errors["builtin-test"]] == [
        (index, pytest.approx(sure)) for sure, index, _ in wrong[:10]
    ]
    for own, (_, index, said) in zip(errors["builtin-test"], wrong, strict=False):
        assert own["premise"] == rows[index]["premise"]
        assert own["hypothesis"] == rows[index]["hypothesis"]
        assert own["source"] == rows[index]["source"]
        assert own["label"] == builtin.LABEL_NAMES[rows[index]["label"]]
        assert own["predicted"] == builtin.LABEL_NAMES[said]
    text = shown(demo)
    assert text.count("true: ") == len(errors["builtin-test"])


def test_bins_of_few_pairs_are_hollow():
    confidence = np.concatenate([np.full(9, 0.45), np.full(10, 0.55), np.full(81, 0.95)])
    right = np.arange(100) % 3 > 0
    bins, error = calibration(confidence, right)
    assert [(own.number, own.count) for own in bins] == [(4, 9), (5, 10), (9, 81)]
    assert error == pytest.approx(sum(abs(right[confidence == c].mean() - c) * (confidence == c).sum()
                                      for c in (0.45, 0.55, 0.95)) / 100)  # fmt: skip
    found = Elements(svg.reliability(bins, "Calibration", "Probability"))
    assert found.classes.count("dot") == 3
    assert found.classes.count("hollow") == 1
    assert found.classes.count("whisker") == 3


def test_wilson():
    """Against the closed form's known values, e.g. 0 of 10 and 8 of 10."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_by_class_of_a_matrix():
    from sklearn.metrics import precision_recall_fscore_support

    matrix = [[5, 2, 0], [1, 7, 0], [3, 0, 0]]
    label, said = np.repeat(np.indices((3, 3)).reshape(2, -1), np.ravel(matrix), axis=1)
    found = by_class(["a", "b", "c"], {"confusion_matrix": matrix})
    for i, values in enumerate(zip(*precision_recall_fscore_support(label, said, zero_division=0), strict=True)):
        assert tuple(found["abc"[i]].values()) == pytest.approx(values)


def test_hostile_errors_are_only_text(demo, tmp_path):
    def change(results):
        results["errors"] = {text: [{"row": 1, "source": text, "premise": text, "hypothesis": text, "label": text,
                                     "predicted": text, "probability": 0.5}] for text in EVIL}  # fmt: skip
        results["metrics"] |= {text[:99]: results["metrics"]["builtin-test"] | {"mapped": text} for text in EVIL}

    text = shown(edited(demo, tmp_path / "run", "results.json", change))
    assert not {"script", "img", "a"} & Elements(text).found
    assert "&lt;script&gt;alert(1)" in text
    assert not {"\u202e", "\x07", "\r"} & set(text)


def test_text_in_charts_is_only_text():
    evil = '<b>"&\u202e</b>'
    text = svg.matrix([[1, 2], [3, 4]], [evil, "$x$"], evil)
    text += svg.lines([svg.Series(evil, [(1, 2.0), (2, 3.0)], dots=True)], evil, mark=(1, evil))
    assert not {"b"} & Elements(text).found
    assert "\u202e" not in text
    assert "&lt;b&gt;" in text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.5, 12), (0.0001, 0.00017), (7, 7), (0, 123456)])
def test_ticks_hold_what_is_between_them(low, high):
    made = svg.ticks(low, high)
    assert made[0] <= low <= high <= made[-1]
    assert 2 <= len(made) <= 12
    assert np.allclose(np.diff(made), made[1] - made[0])


def test_long_curves_are_thinned():
    text = svg.lines([svg.Series("loss", [(i, i % 7) for i in range(100_000)])], "Loss")
    assert len(text) < 20_000


def test_the_same_run_gives_the_same_page(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "again")
    assert shown(tmp_path / "again") == shown(demo)
