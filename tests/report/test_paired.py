"""The paired bootstrap: against a resampling pair by pair, and what it refuses to compare."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainer.report import paired
from trainer.report.predictions import Predictions

N = 300


def drawn(seed: int, right: float, truth: np.ndarray) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.where(random.random(len(truth)) < right, truth, random.integers(0, 3, len(truth)))


def predictions(said: np.ndarray, truth: np.ndarray, index: np.ndarray | None = None) -> Predictions:
    scores = np.full((len(said), 3), 0.1)
    scores[np.arange(len(said)), said] = 0.8
    return Predictions(np.arange(len(said)) if index is None else index, truth, scores, ("a", "b", "c"))


def f1_of(truth: np.ndarray, said: np.ndarray) -> float:
    """F1 macro of three classes; scikit-learn's takes a millisecond."""
    counts = np.bincount(truth * 3 + said, minlength=9).reshape(3, 3)
    return float((2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))).mean())


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, N)


@pytest.mark.parametrize("sizes", [{"A": 1, "B": 1}, {"A": 2, "B": 3}])
def test_it_is_a_resampling_of_pairs(sizes, truth):
    said = np.array([drawn(i, 0.6 if i < sizes["A"] else 0.66, truth) for i in range(sum(sizes.values()))])
    [(names, (value, low, high, flips))] = paired.compared(sizes, truth, said, 3)

    def difference(rows: np.ndarray) -> float:
        f1 = [f1_of(truth[rows], own[rows]) for own in said]
        return float(np.mean(f1[sizes["A"] :]) - np.mean(f1[: sizes["A"]]))

    assert f1_of(truth, said[0]) == pytest.approx(f1_score(truth, said[0], average="macro"))
    random = np.random.default_rng(1)
    expected = np.array([difference(random.integers(0, N, N)) for _ in range(3000)])
    assert names == ("A", "B")
    assert value == pytest.approx(difference(np.arange(N)))
    assert (low, high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=0.006)
    assert flips == pytest.approx((np.sign(expected) != np.sign(value)).mean(), abs=0.02)
    assert paired.compared(sizes, truth, said, 3)[0][1] == (value, low, high, flips)  # of one seed


def test_the_same_runs_do_not_differ(truth):
    said = drawn(1, 0.6, truth)
    [(_, values)] = paired.compared({"A": 1, "B": 1}, truth, np.array([said, said]), 3)
    assert values == (0.0, 0.0, 0.0, 1.0)


def test_pairs_are_joined_by_their_rows(truth):
    said, order = drawn(1, 0.7, truth), np.random.default_rng(2).permutation(N)[:250]
    labels, both, classes = paired.join([predictions(said, truth), predictions(said[order], truth[order], index=order)])
    assert (labels == truth[np.sort(order)]).all()
    assert (both[0] == both[1]).all()
    assert classes == 3


def test_what_is_not_the_same_is_not_compared(truth):
    said = drawn(1, 0.7, truth)
    first = predictions(said, truth)
    changed = truth.copy()
    changed[:7] = (changed[:7] + 1) % 3
    assert "7 of 300 pairs have other labels" in paired.join([first, predictions(said, changed)])
    assert "no pair in common" in paired.join([first, predictions(said, truth, index=np.arange(N) + N)])
    assert "other classes" in paired.join([first, Predictions(first.index, truth, first.scores, ("x", "b", "c"))])


def test_many_groups_stand_beside_the_first(truth):
    said = np.array([drawn(i, 0.6, truth) for i in range(6)])
    names = [own for own, _ in paired.compared(dict.fromkeys("ABCDEF", 1), truth, said, 3)]
    assert names == [("A", other) for other in "BCDEF"]
    assert len(paired.compared(dict.fromkeys("ABCDE", 1), truth, said[:5], 3)) == 10
