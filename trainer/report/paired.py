"""Whether one group of runs is better than another on the same pairs, or only luckier: a paired bootstrap.

Both are scored on the same resamples of the pairs, so what makes a resample easy or hard for both does not count
(Efron & Tibshirani 1993, chapter 16; for NLP Koehn 2004, Berg-Kirkpatrick et al. 2012). With d(b) the difference of F1
macro on resample b of n pairs, drawn with replacement: the 95 % interval is that of the 2.5 and 97.5 percentiles of
d(b), and the share of flips is that of d(b) whose sign is opposite to that of the difference on the pairs as they are;
a tie is no flip.

F1 of a group is the mean over its seeds; runs of one seed are first taken as one, by their mean. Of a group of several
seeds each resample draws the seeds, too, as many with replacement, before it draws the pairs: the same ones in groups
that have the same seeds, and independently otherwise. So the interval holds both, though few seeds say little: of k of
them the variance over seeds is too small by (k - 1) / k. Of a group of one seed it says how much the difference depends
on which pairs were drawn, and not how much it does on the seed.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from trainer.metrics import RESAMPLES, resampled
from trainer.report.predictions import Predictions, read_predictions
from trainer.report.read import Run

EXACT = 12  # digits: what differs only behind them is equal
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
        found = {name: [(run, own) for run in runs if (own := classified(run, split))] for name, runs in groups}
        members = {name: own for name, own in found.items() if own}
        if len(members) < 2:
            continue
        joined = join([own for pairs in members.values() for _, own in pairs])
        if isinstance(joined, str):
            reasons.append(f"{split}: {joined}")
            continue
        seeds = {name: [run.seeds for run, _ in pairs] for name, pairs in members.items()}
        made += [Difference(split, *names, len(joined[0]), *values)
                 for names, values in compared(seeds, *joined)]  # fmt: skip
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
    seeds: Mapping[str, Sequence[Hashable]], truth: np.ndarray, said: np.ndarray, num_classes: int
) -> list[tuple[tuple[str, str], tuple[float, float, float, float]]]:
    """Difference, interval and share of flips of pairs of groups; `seeds` has that of each run in `said`, by group.

    Pairs that all runs take for the same class are alike, so a resample is one multinomial draw of the cells (label,
    prediction of run 1, of run 2, ...) that occur, which all groups share.
    """
    cells, counts = np.unique(np.vstack([truth, said]), axis=1, return_counts=True)
    drawn = _scores(cells, resampled(counts), num_classes)
    actual = _scores(cells, [counts[None]], num_classes)
    ends = np.cumsum([0, *map(len, seeds.values())])
    of_group = [slice(*own) for own in pairwise(ends.tolist())]
    weights = run_weights([*seeds.values()])
    means = [(own[1] * drawn[rows]).sum(0) for own, rows in zip(weights, of_group, strict=True)]
    values = [float((own[0][:, 0] * actual[rows, 0]).sum()) for own, rows in zip(weights, of_group, strict=True)]
    pairs, names, made = list(combinations(range(len(seeds)), 2)), list(seeds), []
    for a, b in pairs if len(seeds) <= ALL_PAIRS else [pair for pair in pairs if pair[0] == 0]:
        # Means of the same scores in another order differ in their last bits.
        value, spread = round(values[b] - values[a], EXACT), np.round(means[b] - means[a], EXACT)
        low, high = np.quantile(spread, [0.025, 0.975])
        flips = float((spread * value < 0).mean())
        made.append(((names[a], names[b]), (value, float(low), float(high), flips)))
    return made


def run_weights(groups: Sequence[Sequence[Hashable]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each group, by the seeds of its runs: their weights (runs, 1), and those (runs, RESAMPLES) in each resample.

    Each sums to 1 over the runs. Groups that have the same seeds have the same draws of them.
    """
    numbers: dict[frozenset[Hashable], int] = {}
    made = []
    for runs in groups:
        own = sorted(set(runs), key=str)
        random = np.random.default_rng([1, numbers.setdefault(frozenset(own), len(numbers))])
        drawn = random.multinomial(len(own), np.full(len(own), 1 / len(own)), RESAMPLES).T / len(own)
        place = np.array([own.index(seed) for seed in runs])
        share = 1 / np.bincount(place)[place][:, None]
        made.append((share / len(own), share * drawn[place]))
    return made


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
