"""Whether one group of runs is better than another on the same pairs, or only luckier: a paired bootstrap.

Both are scored on the same resamples of the pairs, so what makes a resample easy or hard for both does not count
(Efron & Tibshirani 1993, chapter 16; for NLP Koehn 2004, Berg-Kirkpatrick et al. 2012). With d(b) the difference of F1
macro on resample b of n pairs, drawn with replacement: the 95 % interval is that of the 2.5 and 97.5 percentiles of
d(b), and the share of flips is that of d(b) whose sign is not that of the difference on the pairs as they are; a 0
counts as a flip. F1 of a group of several seeds is the mean over its runs on the same resample. It says how much the
difference depends on which pairs were drawn; how much it does on the seed is what the spread over seeds says.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from trainer.metrics import MOST_CELLS, RESAMPLES
from trainer.report.predictions import Predictions, read_predictions
from trainer.report.read import Run

ALL_PAIRS = 5  # groups: of more, each is compared with the first only


@dataclass(frozen=True)
class Difference:
    """Of F1 macro, `second` minus `first`, both names of groups; `num_pairs` is how many pairs both have scored."""

    split: str
    first: str
    second: str
    num_pairs: int
    value: float
    low: float
    high: float
    flips: float


def differences(groups: Sequence[tuple[str, list[Run]]]) -> tuple[list[Difference], list[str]]:
    """Of the groups, on every set that several have classified; and why others are left out, in words."""
    splits = dict.fromkeys(split for _, runs in groups for run in runs for split in run.results.get("metrics", {}))
    made, reasons = [], []
    for split in splits:
        found = {name: [own for run in runs if (own := classified(run, split))] for name, runs in groups}
        found = {name: own for name, own in found.items() if own}
        if len(found) < 2:
            continue
        joined = join([own for members in found.values() for own in members])
        if isinstance(joined, str):
            reasons.append(f"{split}: {joined}")
            continue
        made += [Difference(split, *names, len(joined[0]), *values)
                 for names, values in compared({name: len(own) for name, own in found.items()}, *joined)]  # fmt: skip
    return made, reasons


def classified(run: Run, split: str) -> Predictions | None:
    found = read_predictions(run.folder, split) if run.objective == "cross_entropy" else None
    return found if found and found.names and split in run.results.get("metrics", {}) else None


def join(runs: Sequence[Predictions]) -> tuple[np.ndarray, np.ndarray, int] | str:
    """Labels (n,) and predictions (runs, n) of the pairs that all have, by index, and the number of classes.

    In words why not, where they have other classes, other labels, or no pair in common.
    """
    first = runs[0]
    if any(own.names != first.names for own in runs):
        return "the runs have other classes, so their F1 is not compared"
    shared = first.index
    for own in runs[1:]:
        shared = np.intersect1d(shared, own.index)
    if not len(shared):
        return "the runs have scored no pair in common"
    labels, said = [], []
    for own in runs:
        order = np.argsort(own.index, kind="stable")
        rows = order[np.searchsorted(own.index, shared, sorter=order)]
        labels.append(own.label[rows])
        said.append(own.scores[rows].argmax(1))
    if wrong := int((np.array(labels) != labels[0]).any(0).sum()):
        return f"{wrong:,} of {len(shared):,} pairs have other labels in some runs, so they are not the same pairs"
    return labels[0], np.array(said), len(first.names)


def compared(
    sizes: dict[str, int], truth: np.ndarray, said: np.ndarray, num_classes: int
) -> list[tuple[tuple[str, str], tuple[float, float, float, float]]]:
    """Difference, interval and share of flips of pairs of groups, which have `sizes` of the runs in `said`.

    Pairs that all runs take for the same class are alike, so a resample is one multinomial draw of the cells (label,
    prediction of run 1, of run 2, ...) that occur, which all groups share.
    """
    cells, counts = np.unique(np.vstack([truth, said]), axis=1, return_counts=True)
    drawn = _scores(cells, resampled(counts), num_classes)
    actual = _scores(cells, [counts[None]], num_classes)
    ends = np.cumsum([0, *sizes.values()])
    of_group = [slice(*own) for own in pairwise(ends.tolist())]
    pairs = list(combinations(range(len(sizes)), 2))
    made = []
    for a, b in pairs if len(sizes) <= ALL_PAIRS else [pair for pair in pairs if pair[0] == 0]:
        value = float((actual[of_group[b]].mean(0) - actual[of_group[a]].mean(0))[0])
        spread = drawn[of_group[b]].mean(0) - drawn[of_group[a]].mean(0)
        low, high = np.quantile(spread, [0.025, 0.975])
        flips = float((np.sign(spread) != np.sign(value)).mean()) if value else 1.0
        names = list(sizes)
        made.append(((names[a], names[b]), (value, float(low), float(high), flips)))
    return made


def resampled(counts: np.ndarray) -> Iterator[np.ndarray]:
    """RESAMPLES draws (some, cells) of as many pairs as there are, some at a time, so that memory suffices."""
    random, total = np.random.default_rng(0), int(counts.sum())
    for some in np.array_split(np.arange(RESAMPLES), math.ceil(RESAMPLES * len(counts) / MOST_CELLS)):
        yield random.multinomial(total, counts / total, len(some))


def _scores(cells: np.ndarray, draws: Iterable[np.ndarray], num_classes: int) -> np.ndarray:
    """F1 macro (runs, resamples) of draws of `cells` (1 + runs, cells), the first row being the labels."""
    from scipy.sparse import csr_matrix

    truth, said = cells[0], cells[1:]
    num_runs, num_cells = said.shape
    # Row r * classes + c of a sum holds the cells that count for class c of run r.
    rows = said + np.arange(num_runs)[:, None] * num_classes
    columns = np.broadcast_to(np.arange(num_cells), said.shape)
    shape = (num_runs * num_classes, num_cells)
    ones = np.ones(said.size)
    predicted = csr_matrix((ones, (rows.ravel(), columns.ravel())), shape)
    right = csr_matrix(((said == truth).ravel().astype(float), (rows.ravel(), columns.ravel())), shape)
    true = csr_matrix((np.ones(num_cells), (truth, np.arange(num_cells))), (num_classes, num_cells))
    parts = []
    for some in draws:
        counts = some.T.astype(float)
        hits, taken = ((own @ counts).reshape(num_runs, num_classes, -1) for own in (right, predicted))
        both = taken + true @ counts
        # A class that neither occurs nor is predicted does not enter the mean.
        parts.append((2 * hits / np.maximum(both, 1)).sum(1) / (both > 0).sum(1))
    return np.concatenate(parts, axis=1)
