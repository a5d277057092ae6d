"""What predictions/SET.parquet says pair by pair, and how far its probabilities can be believed."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BINS = 10
FEW = 10  # pairs: a bin with fewer says nothing


@dataclass(frozen=True)
class Predictions:
    """Of n pairs.

    Attributes:
        index: (n,) rows in the data's source.
        label: (n,) class numbers, or targets where there is one score.
        scores: (n, classes) probabilities, or (n,).
        names: classes; empty where there is one score.
    """

    index: np.ndarray
    label: np.ndarray
    scores: np.ndarray
    names: tuple[str, ...]

    def confidences(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) probability of the predicted class, and whether it is the true one; of a score: it, and the label."""
        if self.scores.ndim == 1:
            return self.scores, self.label
        return self.scores.max(1), self.scores.argmax(1) == self.label


def read_predictions(folder: Path, split: str) -> Predictions | None:
    """Those of a set in a run's folder; None where the file is not there, or can't be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(folder / "predictions" / f"{split}.parquet")
        names = [name for name in table.column_names if name.startswith("score_")]
        columns = [table[name].to_numpy() for name in names or ["score"]]
        scores = np.stack(columns, axis=1) if names else columns[0]
        index, label = table["index"].to_numpy(), table["label"].to_numpy()
        return Predictions(index, label, scores, tuple(name.removeprefix("score_") for name in names))
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


@dataclass(frozen=True)
class Bin:
    """Pairs whose probability lies in one tenth: their number, mean probability, share that is right, its interval."""

    number: int
    count: int
    confidence: float
    accuracy: float
    low: float
    high: float


def calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[list[Bin], float]:
    """The bins that hold pairs, and the expected calibration error (Guo et al. 2017), both over BINS equal bins."""
    place = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    hits, sums = np.bincount(place, right, BINS), np.bincount(place, confidence, BINS)
    bins = [
        Bin(i, int(counts[i]), sums[i] / counts[i], hits[i] / counts[i], *wilson(hits[i], counts[i]))
        for i in np.flatnonzero(counts).tolist()
    ]
    error = sum(abs(own.accuracy - own.confidence) * own.count for own in bins) / max(1, len(confidence))
    return bins, float(error)


def wilson(hits: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share, hits of count (Wilson 1927): inside [0, 1], and of use for few pairs, too."""
    z = 1.959964
    share, scale = hits / count, 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    centre = (share + z * z / (2 * count)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
