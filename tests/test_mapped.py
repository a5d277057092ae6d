"""A three-class model on sets of two classes: by evaluate, and in a run, on one rank and on two."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import crossrank
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support

from trainer import api
from trainer.data.builtin import LABEL_NAMES, pairs
from trainer.metrics import classification_scores, log_softmax, merged
from trainer.score import tables

TWO = ["entailment", "not_entailment"]
WORDS = "neutral, contradiction as not_entailment"


@pytest.fixture(scope="module")
def model(builtin_model, tmp_path_factory):
    """The tiny model, untrained, with a bias by which it says each class at times."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny = AutoModelForSequenceClassification.from_pretrained(builtin_model)
    with torch.no_grad():
        tiny.classifier.weight *= 20
    AutoTokenizer.from_pretrained(builtin_model).save_pretrained(folder)
    tiny.save_pretrained(folder)
    logits = np.log(api.predict(folder, [(row["premise"], row["hypothesis"]) for row in pairs("dev")[:60]]))
    with torch.no_grad():
        tiny.classifier.bias += torch.tensor([0.5, 0, 0]) - torch.from_numpy(np.median(logits, axis=0)).float()
    tiny.save_pretrained(folder)
    return folder


def write(path, name_of, rows=60):
    lines = [f"{r['premise']},{r['hypothesis']},{name_of(LABEL_NAMES[r['label']])}" for r in pairs("dev")[:rows]]
    path.write_text("\n".join(["premise,hypothesis,label", *lines]) + "\n")
    return str(path)


def two(name):
    return name if name == "entailment" else "not_entailment"


def test_logits_of_classes_taken_as_one():
    logits = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32) * 5
    of_class = np.array([1, 0, 1, 2])
    probabilities, own = np.exp(log_softmax(logits)), np.exp(log_softmax(merged(logits, of_class)))
    assert np.allclose(own, np.stack([probabilities[:, of_class == i].sum(1) for i in range(3)], 1), atol=1e-12)
    assert merged(logits, None) is logits


def test_scores_of_each_class_are_sklearns():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 50), rng.normal(size=(50, 4))
    each = classification_scores(labels, logits, 4, ["a", "b", "c", "d"])["by_class"]
    expected = precision_recall_fscore_support(labels, logits.argmax(1), labels=range(4), zero_division=0)
    assert list(each) == ["a", "b", "c", "d"]
    for number, own in enumerate(each.values()):
        assert list(own.values()) == [column[number] for column in expected]
    assert each["d"]["support"] == 0
    many = classification_scores(labels, rng.normal(size=(50, 200)), 200)
    assert [*many["by_class"]] == [str(number) for number in many["confusion_classes"]]


def test_three_classes_on_two_are_sums(model, tmp_path):
    """The scores of scikit-learn on summed probabilities, by a map, by names, by numbers with names."""
    rte, upper = write(tmp_path / "rte.csv", two), write(tmp_path / "upper.csv", lambda name: two(name).upper())
    numbers = write(tmp_path / "numbers.csv", lambda name: TWO.index(two(name)))
    scores = api.evaluate(model, test_file=rte, output_dir=str(tmp_path / "out"))["rte-test"]
    rows = pairs("dev")[:60]
    probabilities = api.predict(model, [(row["premise"], row["hypothesis"]) for row in rows])
    own = np.stack([probabilities[:, 0], probabilities[:, 1:].sum(1)], 1)
    labels = np.array([int(row["label"] != 0) for row in rows])
    assert len(np.unique(own.argmax(1))) == 2
    assert (own.argmax(1) != np.minimum(probabilities.argmax(1), 1)).any()  # which is not the same
    assert scores["loss"] == pytest.approx(log_loss(labels, own), abs=1e-6)
    for average in ("macro", "micro", "weighted"):
        assert scores[f"f1_{average}"] == pytest.approx(f1_score(labels, own.argmax(1), average=average))
    assert (scores["label_names"], scores["mapped"], len(scores["confusion_matrix"])) == (TWO, WORDS, 2)
    table = pq.read_table(tmp_path / "out" / "predictions" / "rte-test.parquet").to_pandas()
    assert np.allclose(table[["score_entailment", "score_not_entailment"]], own, atol=1e-6)
    assert table["label"].tolist() == labels.tolist()
    by_map = api.evaluate(model, test_file=rte, label_map={"neutral": "not_entailment", "contradiction": TWO[1]})
    assert by_map["rte-test"] == scores
    assert api.evaluate(model, test_file=numbers, label_names=TWO)["numbers-test"] == scores
    capital = api.evaluate(model, test_file=upper)["upper-test"]
    assert capital["label_names"] == ["entailment", "NOT_ENTAILMENT"]
    assert capital["loss"] == scores["loss"]


def test_a_table_of_all_sets(model, tmp_path):
    """One on stdout, the same from two ranks; of a set with many classes no line a class."""
    snli, rte = write(tmp_path / "snli.csv", str.upper), write(tmp_path / "rte.csv", two)
    options = ["evaluate", model, "--validation_file", snli, "--test_file", rte, "--output_dir"]
    one, other = crossrank(*options, tmp_path / "1"), crossrank(*options, tmp_path / "2", ranks=2)
    assert one.stdout == other.stdout
    assert (
        json.loads((tmp_path / "1" / "results.json").read_text())["metrics"]
        == json.loads((tmp_path / "2" / "results.json").read_text())["metrics"]
    )
    sets, classes = one.stdout.strip().split("\n\n")
    header, *rows = map(str.split, sets.splitlines())
    assert header == ["set", "pairs", "f1_macro", "f1_micro", "f1_weighted", "accuracy", "loss"]
    assert [row[:2] for row in rows] == [["snli-dev", "60"], ["rte-test", "60"]]
    assert [line.split()[-5] for line in classes.splitlines()[1:]] == [*LABEL_NAMES, *TWO]
    assert len({len(line) for line in classes.splitlines()}) == 1
    many = {"x": {"f1_macro": 0.5, "loss": 1, "by_class": dict.fromkeys("abcdefghijk"), "confusion_matrix": [[4]]}}
    assert tables(many).splitlines() == ["set  pairs  f1_macro    loss", "x        4    0.5000  1.0000"]


def test_a_run_says_what_is_mapped(tmp_path, said):
    """In its log, results, card and predictions; the best step is chosen by the mapped score; the same on two ranks."""
    three, rte = write(tmp_path / "snli.csv", str.upper), write(tmp_path / "rte.csv", two, rows=31)
    fields = {"model_name_or_path": "builtin", "train_file": three, "validation_file": rte, "test_file": three,
              "max_steps": 4, "eval_steps": 2, "train_batch_size": 8, "track_emissions": False}  # fmt: skip
    runs = [tmp_path / "1", tmp_path / "2"]
    one = api.train(output_dir=str(runs[0]), **fields)["metrics"]
    options = [f"--{name}={value}" for name, value in fields.items()]
    crossrank("train", *options, "--output_dir", runs[1], ranks=2)
    other = json.loads((runs[1] / "results.json").read_text())["metrics"]
    assert one["rte-dev"]["loss"] == pytest.approx(other["rte-dev"]["loss"], abs=1e-5)
    assert one["rte-dev"]["confusion_matrix"] == other["rte-dev"]["confusion_matrix"]
    words = "NEUTRAL, CONTRADICTION as not_entailment"
    assert f"{rte}: scored with {words}" in said
    assert (one["rte-dev"]["mapped"], one["rte-dev"]["label_names"]) == (words, ["ENTAILMENT", "not_entailment"])
    assert "mapped" not in one["snli-test"]
    assert json.loads((runs[0] / "about.json").read_text())["data"]["dev"]["mapped"] == words
    card = (runs[0] / "model" / "README.md").read_text()
    assert f"rows are true classes ({words}):" in card.replace("\\_", "_")
    columns = pq.read_schema(runs[0] / "predictions" / "rte-dev.parquet").names
    assert columns == ["index", "label", "score_ENTAILMENT", "score_not_entailment"]
    examples = json.loads((runs[0] / "results.json").read_text())["examples"]
    assert len(examples[0]["scores"]) == 3  # as the model itself gives them
