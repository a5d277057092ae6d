"""The paired bootstrap: against a resampling pair by pair, and what it refuses to compare."""

import re

import numpy as np
import pytest
from sklearn.metrics import f1_score

from trainer.report import paired
from trainer.report.compare import difference_table
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


@pytest.mark.parametrize("seeds", [
    {"A": [0], "B": [0]}, {"A": [0, 1], "B": [2, 3, 4]}, {"A": [0, 1, 2], "B": [2, 1, 0]}, {"A": [7], "B": [7, 7, 8]},
])  # fmt: skip
def test_it_is_a_resampling_of_pairs_and_seeds(seeds, truth):
    """Against one that draws seed by seed and pair by pair."""
    first, runs = len(seeds["A"]), [*seeds["A"], *seeds["B"]]
    said = np.array([drawn(i, 0.6 if i < first else 0.7, truth) for i in range(len(runs))])
    [(names, (value, low, high, flips))] = paired.compared(seeds, truth, said, 3)

    def difference(rows: np.ndarray, taken: dict[str, list[int]]) -> float:
        f1, means = np.array([f1_of(truth[rows], own[rows]) for own in said]), []
        for name, own in (("A", f1[:first]), ("B", f1[first:])):
            of_seed = {seed: own[np.array(seeds[name]) == seed].mean() for seed in seeds[name]}
            means.append(np.mean([of_seed[seed] for seed in taken[name]]))
        return float(means[1] - means[0])

    assert f1_of(truth, said[0]) == pytest.approx(f1_score(truth, said[0], average="macro"))
    random = np.random.default_rng(1)
    distinct = {name: sorted(set(own)) for name, own in seeds.items()}
    expected = []
    for _ in range(3000):
        taken = {name: random.choice(own, len(own)) for name, own in distinct.items()}
        taken |= {"B": taken["A"]} if distinct["A"] == distinct["B"] else {}
        expected.append(difference(random.integers(0, N, N), taken))
    assert names == ("A", "B")
    assert value == pytest.approx(difference(np.arange(N), distinct))
    assert (low, high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=0.008)
    assert flips == pytest.approx((np.sign(expected) == -np.sign(value)).mean(), abs=0.02)
    assert paired.compared(seeds, truth, said, 3)[0][1] == (value, low, high, flips)  # of one seed


def test_the_same_runs_do_not_differ(truth):
    """A tie is no flip; in another order, too, whose mean differs in its last bit."""
    said = np.array([drawn(i, 0.6, truth) for i in range(3)])
    for order in ([0, 1, 2], [2, 0, 1]):
        seeds = {"A": [0, 1, 2], "B": order}
        [(_, values)] = paired.compared(seeds, truth, np.concatenate([said, said[order]]), 3)
        assert values == (0.0, 0.0, 0.0, 0.0)
    text = difference_table([paired.Difference("dev", "A", "B", N, *values)]).markdown()
    assert re.search(r"equal +\| \+0.0000 to \+0.0000 +\| - ", text)


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
    names = [own for own, _ in paired.compared({name: [0] for name in "ABCDEF"}, truth, said, 3)]
    assert names == [("A", other) for other in "BCDEF"]
    assert len(paired.compared({name: [0] for name in "ABCDE"}, truth, said[:5], 3)) == 10
