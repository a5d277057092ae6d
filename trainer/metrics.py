"""Classification scores through the `evaluate` package, without its hub.

`evaluate.load("f1")` fetches a script; these are the same metrics as local subclasses of `evaluate.Metric`. Called on
one rank only: the package locks files.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.options import SCORES, Objective


def classification_scores(
    labels: np.ndarray, logits: np.ndarray, num_labels: int, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Scores of logits (n, num_labels) against labels (n,); `names` are those of the classes.

    Returns:
        loss (mean cross-entropy in nats), accuracy, f1_macro, f1_micro, f1_weighted in [0, 1], and confusion_matrix as
        rows of true classes. A class that neither occurs nor is predicted does not enter the averages. Of more than
        MOST_CLASSES the matrix holds those with the most pairs, which confusion_classes then names by their numbers,
        and all others as its last row and column. by_class holds precision, recall, f1 and support (true pairs) of the
        matrix's classes, by their names, or by their numbers as text.
    """
    predictions = logits.argmax(-1)
    scores = _metric().compute(predictions=predictions, references=labels)
    confusion = _confusion(labels, predictions, num_labels)
    kept = confusion.get("confusion_classes", range(num_labels))
    each = _scores_by_class(labels, predictions, kept, names or [*map(str, range(num_labels))])
    return {"loss": cross_entropy(labels, logits), **scores, **confusion, "by_class": each}


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


def _scores_by_class(
    labels: np.ndarray, predictions: np.ndarray, kept: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(labels, predictions, labels=[*kept], zero_division=0)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {
        names[number]: dict(zip(("precision", "recall", "f1", "support"), row, strict=True))
        for number, row in zip(kept, rows, strict=True)
    }


def merged(logits: np.ndarray, of_class: np.ndarray | None) -> np.ndarray:
    """Logits (n, classes) as those of the classes `of_class` (classes,) that each is taken as; None = its own.

    By logsumexp, so that probabilities add up; in float64.
    """
    if of_class is None:
        return logits
    parts = [logits[:, of_class == number].astype(np.float64) for number in range(of_class.max() + 1)]
    return np.stack([np.logaddexp.reduce(part, axis=-1) for part in parts], axis=-1)


def score_names(scores: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of options.SCORES that are among `scores`, of whichever objective; () where they are of none."""
    return next((names for names in SCORES.values() if names[0] in scores), ())


def num_pairs(scores: Mapping[str, Any]) -> int:
    """How many were scored."""
    return int(scores["num_samples"] if "num_samples" in scores else sum(map(sum, scores["confusion_matrix"])))


def fixed(value: float | None) -> str:
    """A score as text; None is one that is not defined, or not there."""
    return "-" if value is None else f"{value:.4f}"


def score_line(scores: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """The scores that a person wants to see, or those of these `names`, in a line."""
    names = (*score_names(scores), "loss") if names is None else names
    return ", ".join(f"{name} {fixed(scores[name])}" for name in names)


def goodness(scores: dict[str, Any], name: str) -> float:
    """Of a score, or of the loss: more is better, and what is not defined is worse than anything that is."""
    value = scores[name]
    if value is None:
        return -sys.float_info.max  # JSON has no infinity
    return float(-value if name == "loss" else value)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, (n, classes)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def activated(logits: np.ndarray, objective: Objective) -> np.ndarray:
    """What the model says, in float64: probabilities (n, classes), or of one output its score (n, 1).

    The score is what CrossEncoder.predict gives of the same folder: of binary cross-entropy a probability, of mean
    squared error the output as it is.
    """
    if objective == "cross_entropy":
        return np.exp(log_softmax(logits))
    wide = logits.astype(np.float64)
    # Of a number far below 0, exp(-x) would be beyond float64.
    return wide if objective == "mse" else np.exp(-np.logaddexp(0, -wide))


def cross_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean over samples, in float64, so that it does not depend on who computed which logits."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


MOST_SOURCES = 50  # a column of more values than that says something else


def scores_by_source(
    names: Sequence[str], codes: np.ndarray, scored: Callable[[np.ndarray], dict[str, Any]]
) -> dict[str, Any]:
    """What `scored` says of the rows of each source, and their number; empty where there are too many sources.

    `codes` (n,) are the places of the rows' sources in `names`.
    """
    if len(names) > MOST_SOURCES:
        return {}
    found = {name: np.flatnonzero(codes == code) for code, name in sorted(enumerate(names), key=lambda own: own[1])}
    return {name: {"num_samples": len(rows), **scored(rows)} for name, rows in found.items()}


def resampled(counts: np.ndarray, resamples: int = RESAMPLES, beside: int = 0) -> Iterator[np.ndarray]:
    """Draws (some, cells) of as many pairs as there are, of `counts` (cells,): `resamples` of them in all.

    Some at a time, so that memory suffices for them and `beside` numbers more of each.
    """
    random, total = np.random.default_rng(0), int(counts.sum())
    for some in np.array_split(np.arange(resamples), math.ceil(resamples * (len(counts) + beside) / MOST_CELLS)):
        yield random.multinomial(total, counts / total, len(some))


def interval(confusion_matrix: list[list[int]]) -> tuple[float, float]:
    """The 95 % bootstrap percentile interval of F1 macro (Efron 1979).

    Drawing n pairs with replacement and counting them by true and predicted class is one multinomial draw of the
    matrix's cells, so the predictions themselves are not needed.
    """
    matrix = np.array(confusion_matrix)
    truth, said = np.nonzero(matrix)  # of many classes nearly all cells are empty
    f1 = []
    for draws in resampled(matrix[truth, said], beside=len(matrix)):
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
