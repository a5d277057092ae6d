"""Scores of one output are those of scikit-learn, scipy and sentence_transformers, and None where there are none."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, roc_auc_score

from trainer.metrics import activated, goodness, score_line, score_names
from trainer.score_metrics import best_accuracy, best_f1, binary_scores, number_scores

RANDOM = np.random.default_rng(0)


def drawn(size: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    logits = RANDOM.normal(size=(size, 1)).astype(np.float32)
    return RANDOM.integers(0, 2, size), np.round(logits, 1) if ties else logits


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [2, 3, 40])
def test_of_labels(size, ties):
    for _ in range(5):
        labels, logits = drawn(size, ties)
        labels[:2] = 0, 1
        scores, found = activated(logits, "binary_cross_entropy")[:, 0], binary_scores(labels, logits, ("0", "1"))
        assert found["average_precision"] == average_precision_score(labels, scores)
        assert found["auc"] == roc_auc_score(labels, scores)
        said = scores >= found["f1_threshold"]
        assert found["f1"] == pytest.approx(f1_score(labels, said), abs=1e-12)
        assert found["f1"] >= max(f1_score(labels, scores >= score) for score in scores) - 1e-12
        assert found["confusion_matrix"] == confusion_matrix(labels, said, labels=[0, 1]).tolist()
        assert found["accuracy"] == np.mean((scores >= found["accuracy_threshold"]) == labels)
        wide = torch.from_numpy(logits[:, 0]).double(), torch.from_numpy(labels).double()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(*wide)
        assert found["loss"] == pytest.approx(float(loss), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_are_those_of_sentence_transformers(ties):
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    theirs = evaluation.BinaryClassificationEvaluator
    for size in (1, 2, 5, 100):
        for _ in range(20):
            labels, logits = drawn(size, ties)
            scores = activated(logits, "binary_cross_entropy")[:, 0]
            accuracy = theirs.find_best_acc_and_threshold(scores, labels, True)
            assert tuple(best_accuracy(labels, scores).values()) == pytest.approx(accuracy, abs=1e-12)
            if labels.any():
                f1 = theirs.find_best_f1_and_threshold(scores, labels, True)
                assert tuple(best_f1(labels, scores).values()) == pytest.approx(f1, abs=1e-12)


def test_neighbours_are_told_apart():
    """Halfway between a number and the next one there is none."""
    low, high = 0.5, np.nextafter(0.5, 1)
    assert best_f1(np.array([1, 0]), np.array([high, low]))["f1_threshold"] == high
    assert best_accuracy(np.array([0, 1]), np.array([high, low]))["accuracy"] == 0.5


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_has_no_area(label):
    logits = drawn(5, False)[1]
    found = binary_scores(np.full(5, label), logits, ("0", "1"))
    assert found["auc"] is None
    assert (found["accuracy"], found["confusion_matrix"][label][label]) == (1.0, 5)
    assert (found["average_precision"], found["f1"], found["recall"]) == ((1.0,) * 3 if label else (None,) * 3)
    assert "auc -" in score_line(json.loads(json.dumps(found)))


def test_of_numbers():
    targets, logits = RANDOM.normal(size=60).astype(np.float32), RANDOM.normal(size=(60, 1)).astype(np.float32)
    found = number_scores(targets, logits)
    assert found["pearson"] == pytest.approx(pearsonr(targets.astype(float), logits[:, 0].astype(float))[0])
    assert found["spearman"] == pytest.approx(spearmanr(targets, logits[:, 0])[0])
    assert found["loss"] == pytest.approx(((targets - logits[:, 0]) ** 2).mean(), rel=1e-6)


@pytest.mark.parametrize(("targets", "logits"), [([1, 2], [3, 3]), ([1, 1], [2, 3]), ([1], [1])])
def test_what_never_changes_has_no_correlation(targets, logits):
    found = number_scores(np.array(targets, np.float32), np.array(logits, np.float32)[:, None])
    assert (found["spearman"], found["pearson"]) == (None, None)
    assert np.isfinite(found["loss"])


def test_no_score_is_the_worst_one():
    scores = {"spearman": None, "pearson": -1.0, "loss": 1e30}
    ranked = sorted(scores, key=lambda name: goodness(scores, name))
    assert ranked == ["spearman", "loss", "pearson"]
    assert json.loads(json.dumps(goodness(scores, "spearman"), allow_nan=False)) < -1e300
    assert score_names(scores) == ("spearman", "pearson")
    assert score_names({"loss": 1.0}) == ()


def test_scores_of_far_logits():
    """No warning, and no number that is none."""
    logits = np.array([[-1e4], [-50], [0], [50], [1e4]], np.float32)
    with np.errstate(all="raise", under="ignore"):
        found = activated(logits, "binary_cross_entropy")
    assert found.shape == (5, 1)
    assert np.allclose(found[:, 0], [0, 1.9287498e-22, 0.5, 1, 1], rtol=1e-6)
    assert (activated(logits, "mse") == logits).all()
