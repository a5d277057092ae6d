"""Scores of a model with one output: against labels 0 and 1, or against numbers.

Of labels the thresholds are found as sentence_transformers' CrossEncoderClassificationEvaluator finds them: halfway
between two scores, the highest threshold of those that are equally good. What is not defined, as the area under the
curve of pairs that all have one label, is None.
"""

from typing import Any

import numpy as np

from trainer.metrics import activated


def binary_scores(labels: np.ndarray, logits: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Scores of logits (n, 1) against labels (n,) that are 0 or 1, called by `names`.

    Returns:
        loss: mean binary cross-entropy in nats, without pos_weight.
        average_precision, auc: as scikit-learn defines them.
        f1, precision, recall, f1_threshold: of the probability from which on 1 is said that gives the highest F1.
        accuracy, accuracy_threshold: the same, of the highest accuracy.
        confusion_matrix: at f1_threshold; rows are true labels, which label_names names.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, wide = activated(logits, "binary_cross_entropy")[:, 0], logits[:, 0].astype(np.float64)
    positive, both = bool(labels.any()), 0 < labels.sum() < len(labels)
    best = best_f1(labels, scores) if positive else dict.fromkeys(("f1", "precision", "recall", "f1_threshold"))
    said = scores >= best["f1_threshold"] if positive else np.zeros(len(labels), bool)
    return {
        "loss": float(np.mean(np.logaddexp(0, wide) - labels * wide)),
        "average_precision": float(average_precision_score(labels, scores)) if positive else None,
        **best,
        **best_accuracy(labels, scores),
        "auc": float(roc_auc_score(labels, scores)) if both else None,
        "num_samples": len(labels),
        "confusion_matrix": np.bincount(2 * labels + said, minlength=4).reshape(2, 2).tolist(),
        "label_names": list(names),
    }


def best_f1(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """The threshold of `scores` (n,) with the highest F1 of label 1, which occurs, and what it gives."""
    ordered, count, hits = _cuts(labels, scores)
    precision, recall = hits / count, hits / labels.sum()
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    best = int(f1.argmax())
    threshold = _between(ordered, int(count[best]))
    return {"f1": float(f1[best]), "precision": float(precision[best]), "recall": float(recall[best]),
            "f1_threshold": threshold}  # fmt: skip


def best_accuracy(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """The threshold of `scores` (n,) with the highest accuracy, which may be above all of them."""
    ordered, count, hits = _cuts(labels, scores)
    negatives = len(labels) - int(labels.sum())
    right = np.append(negatives, hits + negatives - (count - hits))
    best = int(right.argmax())
    threshold = float(np.nextafter(ordered[0], np.inf)) if best == 0 else _between(ordered, int(count[best - 1]))
    return {"accuracy": float(right[best] / len(labels)), "accuracy_threshold": threshold}


def _cuts(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`scores` (n,) descending; of each distinct one how many are not below it, and how many of those have label 1."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    return ordered, last + 1, np.cumsum(labels[order])[last]


def _between(ordered: np.ndarray, count: int) -> float:
    """A threshold that the first `count` of descending scores reach, and no other."""
    if count == len(ordered):
        return float(ordered[-1])
    middle = (ordered[count - 1] + ordered[count]) / 2
    return float(ordered[count - 1] if middle == ordered[count] else middle)


def number_scores(targets: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Scores of logits (n, 1) against targets (n,): loss (mean squared error), spearman and pearson.

    A correlation with what is the same for all pairs is None.
    """
    from scipy.stats import pearsonr, spearmanr

    scores, targets = activated(logits, "mse")[:, 0], targets.astype(np.float64)
    vary = len(np.unique(scores)) > 1 and len(np.unique(targets)) > 1
    return {
        "loss": float(np.mean((scores - targets) ** 2)),
        "spearman": float(spearmanr(targets, scores).statistic) if vary else None,
        "pearson": float(pearsonr(targets, scores).statistic) if vary else None,
        "num_samples": len(targets),
    }
