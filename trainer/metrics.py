"""Classification scores through the `evaluate` package, without its hub.

`evaluate.load("f1")` fetches a script; these are the same metrics as local subclasses of `evaluate.Metric`. Called on
one rank only: the package locks files.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def classification_scores(labels: np.ndarray, logits: np.ndarray, num_labels: int) -> dict[str, Any]:
    """Scores of logits (n, num_labels) against labels (n,).

    Returns:
        loss (mean cross-entropy in nats), accuracy, f1_macro, f1_micro, f1_weighted in [0, 1], and confusion_matrix as
        rows of true classes. A class that neither occurs nor is predicted does not enter the averages.
    """
    predictions = logits.argmax(-1)
    scores = _metric().compute(predictions=predictions, references=labels, num_labels=num_labels)
    return {"loss": cross_entropy(labels, logits), **scores}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, (n, classes)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


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


def _metric() -> Any:
    # Importing evaluate takes seconds, so it waits until a metric is needed.
    import datasets
    import evaluate
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    class Classification(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            integer = datasets.Value("int64")
            return evaluate.MetricInfo(
                description="Accuracy, F1 and confusion matrix of a classifier.",
                citation="",
                inputs_description="predictions and references: class numbers",
                features=datasets.Features({"predictions": integer, "references": integer}),
            )

        def _compute(self, predictions: Any, references: Any, num_labels: int) -> dict[str, Any]:  # type: ignore[override]
            return {
                "accuracy": float(accuracy_score(references, predictions)),
                **{
                    f"f1_{a}": float(f1_score(references, predictions, average=a, zero_division=0))
                    for a in ("macro", "micro", "weighted")
                },
                "confusion_matrix": confusion_matrix(references, predictions, labels=range(num_labels)).tolist(),
            }

    # It makes a folder, though it keeps nothing there.
    return Classification(keep_in_memory=True, cache_dir=os.environ.get("HF_METRICS_CACHE"))
