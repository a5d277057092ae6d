"""Classification scores through the `evaluate` package, without its hub.

`evaluate.load("f1")` fetches a script; these are the same metrics as local subclasses of `evaluate.Metric`. Called on
one rank only: the package locks files.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.config import SCORES


def classification_scores(labels: np.ndarray, logits: np.ndarray, num_labels: int) -> dict[str, Any]:
    """Scores of logits (n, num_labels) against labels (n,).

    Returns:
        loss (mean cross-entropy in nats), accuracy, f1_macro, f1_micro, f1_weighted in [0, 1], and confusion_matrix as
        rows of true classes. A class that neither occurs nor is predicted does not enter the averages. Of more than
        MOST_CLASSES the matrix holds those with the most pairs, which confusion_classes then names by their numbers,
        and all others as its last row and column.
    """
    predictions = logits.argmax(-1)
    scores = _metric().compute(predictions=predictions, references=labels)
    return {"loss": cross_entropy(labels, logits), **scores, **_confusion(labels, predictions, num_labels)}


RESAMPLES = 2000
MOST_CELLS = 1 << 22  # of all resamples that are drawn at once
MOST_CLASSES = 50  # in a matrix: 1,500 would be 29 MB of JSON a split


def _confusion(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> dict[str, Any]:
    pairs = np.bincount(labels, minlength=num_labels) + np.bincount(predictions, minlength=num_labels)
    kept = np.sort(np.argsort(-pairs, kind="stable")[:MOST_CLASSES])
    size = len(kept) + (num_labels > len(kept))
    place = np.full(num_labels, size - 1)
    place[kept] = np.arange(len(kept))
    matrix = np.bincount(place[labels] * size + place[predictions], minlength=size * size).reshape(size, size)
    cut = {"confusion_classes": kept.tolist()} if num_labels > len(kept) else {}
    return {"confusion_matrix": matrix.tolist(), **cut}


def listed(scores: dict[str, Any]) -> str:
    """The scores that a person wants to see, in a line."""
    return ", ".join(f"{name} {scores[name]:.4f}" for name in (*SCORES["cross_entropy"], "loss"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, (n, classes)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def activated(logits: np.ndarray, objective: str) -> np.ndarray:
    """What a user is shown of logits (n, classes) or (n, 1), in float64: probabilities, or scores."""
    if objective == "cross_entropy":
        return np.exp(log_softmax(logits))
    scores = logits.astype(np.float64)
    return np.exp(-np.logaddexp(0, -scores)) if objective == "binary_cross_entropy" else scores


def cross_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean over samples, in float64, so that it does not depend on who computed which logits."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


MOST_SOURCES = 50  # a column of more values than that says something else


def scores_by_source(labels: np.ndarray, logits: np.ndarray, sources: Sequence[str], num_labels: int) -> dict[str, Any]:
    """classification_scores of each source, and its number of samples; empty where there are too many."""
    names = np.asarray(sources)
    if len(set(sources)) > MOST_SOURCES:
        return {}
    return {
        str(name): {
            "num_samples": int((names == name).sum()),
            **classification_scores(labels[names == name], logits[names == name], num_labels),
        }
        for name in np.unique(names)
    }


def interval(confusion_matrix: list[list[int]]) -> tuple[float, float]:
    """The 95 % bootstrap percentile interval of F1 macro (Efron 1979).

    Drawing n pairs with replacement and counting them by true and predicted class is one multinomial draw of the
    matrix's cells, so the predictions themselves are not needed.
    """
    matrix = np.array(confusion_matrix)
    truth, said = np.nonzero(matrix)  # of many classes nearly all cells are empty
    share = matrix[truth, said] / matrix.sum()
    random, f1 = np.random.default_rng(0), []
    for some in np.array_split(np.arange(RESAMPLES), math.ceil(RESAMPLES * (len(share) + len(matrix)) / MOST_CELLS)):
        draws = random.multinomial(int(matrix.sum()), share, len(some))
        hits = _by_class(np.where(truth == said, draws, 0), truth, len(matrix))
        both = _by_class(draws, truth, len(matrix)) + _by_class(draws, said, len(matrix))
        there = both > 0  # a class that neither occurs nor is predicted does not enter the mean
        f1.append((2 * hits / np.maximum(both, 1)).sum(1) / there.sum(1))
    low, high = np.quantile(np.concatenate(f1), [0.025, 0.975])
    return float(low), float(high)


def _by_class(draws: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Sums (resamples, classes) of `draws` (resamples, cells), whose cells belong to `classes`."""
    order = np.argsort(classes, kind="stable")
    there, starts = np.unique(classes[order], return_index=True)
    sums = np.zeros((len(draws), num_classes), draws.dtype)
    sums[:, there] = np.add.reduceat(draws[:, order], starts, axis=1)
    return sums


def _metric() -> Any:
    # Importing evaluate takes seconds, so it waits until a metric is needed.
    import datasets
    import evaluate
    from sklearn.metrics import accuracy_score, f1_score

    class Classification(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            integer = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Accuracy and F1 of a classifier.",
                citation="",
                inputs_description="predictions and references: class numbers",
                features=datasets.Features({"predictions": integer, "references": integer}),
            )

        def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:  # type: ignore[override]
            return {
                "accuracy": float(accuracy_score(references, predictions)),
                **{
                    f"f1_{a}": float(f1_score(references, predictions, average=a, zero_division=0))
                    for a in ("macro", "micro", "weighted")
                },
            }

    # It makes a folder, though it keeps nothing there.
    return Classification(keep_in_memory=True, cache_dir=os.environ.get("HF_METRICS_CACHE"))
