"""How far a main score depends on which pairs were drawn: the 95 % bootstrap percentile intervals (Efron 1979).

Of F1 macro from the confusion matrix, of average precision and Spearman from the scores of the pairs. A resample is a
multinomial draw of how often each pair is in it, so the pairs are sorted once: all else are sums over sorted pairs.
"""

from typing import Any

import numpy as np

from trainer.metrics import RESAMPLES, interval, num_pairs, resampled
from trainer.report.predictions import Predictions

DRAWS = 500  # of the pairs themselves, which are more than a matrix's cells


def interval_of(scores: dict[str, Any], found: Predictions | None = None) -> tuple[float, float] | None:
    """That of the main score among `scores`; None where there is none.

    That is so where the score is not defined, where the matrix does not have all classes, and of a model with one score
    where the predictions are not there.
    """
    if "f1_macro" in scores:
        whole = "confusion_classes" not in scores and num_pairs(scores) > 0
        return interval(scores["confusion_matrix"]) if whole else None
    measure = next((name for name in MEASURES if scores.get(name) is not None), None)
    if measure is None or found is None or found.names or len(found.label) != num_pairs(scores):
        return None
    return interval_of_pairs(measure, found.label, found.scores)


def draws_of(objective: str) -> int:
    """How many resamples an interval is of."""
    return RESAMPLES if objective == "cross_entropy" else DRAWS


def interval_of_pairs(measure: str, labels: np.ndarray, scores: np.ndarray) -> tuple[float, float] | None:
    """Of average_precision of `scores` (n,) of `labels` (n,) 0 and 1, or of their spearman.

    A resample in which it is not defined does not count; None where that is so in all.
    """
    # Sorted by scores, then by labels; pairs that are alike are one.
    cells, counts = np.unique(np.stack([scores, labels]).astype(np.float64), axis=1, return_counts=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.concatenate([MEASURES[measure](some, *cells) for some in resampled(counts, DRAWS)])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return None
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def average_precisions(draws: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(draws,) of draws (draws, cells) of cells in ascending order of their scores, as scikit-learn defines it."""
    starts = np.flatnonzero(np.diff(scores, prepend=-np.inf))
    both = np.add.reduceat(draws, starts, axis=1)[:, ::-1]
    hits = np.add.reduceat(draws * (labels > 0), starts, axis=1)[:, ::-1]
    # Before the first pair that was drawn there is no hit either.
    precision = hits.cumsum(1) / np.maximum(both.cumsum(1), 1)
    return (hits * precision).sum(1) / hits.sum(1)


def spearmans(draws: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(draws,) of draws (draws, cells): Pearson's correlation of the ranks, of which ties have the mean."""
    (left, spread), (right, other) = (_ranks(draws, own) for own in (scores, labels))
    return np.einsum("dc,dc,dc->d", draws, left, right, dtype=np.float64) / np.sqrt(spread * other)


def _ranks(draws: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks (draws, cells) of `values` (cells,), from their mean on, and their sums of squares (draws,)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.diff(ordered, prepend=-np.inf) != 0
    counts = np.add.reduceat(draws[:, order], np.flatnonzero(first), axis=1)
    total = draws[0].sum()
    ranks = counts.cumsum(1) - (counts - 1) / 2 - (total + 1) / 2
    place = np.empty(len(values), np.int64)
    place[order] = first.cumsum() - 1
    return ranks[:, place], np.einsum("dg,dg,dg->d", counts, ranks, ranks, dtype=np.float64)


MEASURES = {"average_precision": average_precisions, "spearman": spearmans}
