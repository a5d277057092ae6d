"""Intervals of models with one score: against scikit-learn's and scipy's scores of the pairs drawn one by one."""

import warnings

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from trainer.report.intervals import MEASURES, interval_of, interval_of_pairs
from trainer.report.predictions import Predictions

N = 120


def measured(measure: str, labels: np.ndarray, scores: np.ndarray) -> float:
    if measure == "spearman":
        return float(spearmanr(labels, scores).statistic)
    return float(average_precision_score(labels, scores))


def pairs(measure: str, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of a model that is right more often than not."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 2 if measure == "average_precision" else 6, N).astype(float)
    scores = labels / labels.max() + random.normal(0, 0.7, N)
    return labels, scores.round(1) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
def test_a_draw_has_the_score_of_its_pairs(measure, ties):
    labels, scores = pairs(measure, ties)
    order = np.argsort(scores, kind="stable")
    labels, scores = labels[order], scores[order]
    draws = np.random.default_rng(4).multinomial(N, np.full(N, 1 / N), 20)
    expected = [measured(measure, np.repeat(labels, own), np.repeat(scores, own)) for own in draws]
    assert MEASURES[measure](draws, scores, labels) == pytest.approx(expected)


@pytest.mark.parametrize("measure", MEASURES)
def test_it_is_a_resampling_of_pairs(measure):
    labels, scores = pairs(measure, True)
    random = np.random.default_rng(5)
    drawn = [measured(measure, labels[rows], scores[rows]) for rows in (random.integers(0, N, N) for _ in range(1000))]
    low, high = interval_of_pairs(measure, labels, scores)
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.03)
    assert (low, high) == interval_of_pairs(measure, labels, scores)  # of one seed


def test_what_has_none():
    """A score that is not defined, no predictions, or those of other pairs."""
    labels, scores = pairs("spearman", True)
    found = Predictions(np.arange(N), labels, scores, ())
    own = {"spearman": 0.5, "num_samples": N}
    assert interval_of(own, found) is not None
    assert interval_of(own) is None
    assert interval_of(own | {"num_samples": N - 1}, found) is None
    assert interval_of(own | {"spearman": None}, found) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert interval_of_pairs("spearman", np.ones(N), scores) is None
        assert interval_of_pairs("average_precision", np.zeros(N), scores) is None
