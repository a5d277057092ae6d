"""What a report says of the sets that a run was scored on: one row a set, and each by itself in detail."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from trainer.metrics import fixed, num_pairs
from trainer.report import svg
from trainer.report.facts import ends
from trainer.report.intervals import interval_of
from trainer.report.markdown import Table, plain
from trainer.report.predictions import FEW, Predictions, calibration, read_predictions
from trainer.report.read import Run

MOST_CLASSES = 50  # in a table of classes
MOST_DOTS = 400


@dataclass
class Part:
    """A set in detail, as page.html.j2 takes it."""

    name: str
    summary: str
    open: bool
    mapped: str = ""
    matrix: Markup | None = None
    reliability: Markup | None = None
    reliability_title: str = "Calibration"
    classes: Table | None = None
    sources: Table | None = None
    notes: list[str] = field(default_factory=list)


def overview(run: Run) -> Table:
    """A row a set: pairs, scores, the main one's interval as numbers and as a picture; with bf16 also without it."""
    main, *others = run.scores
    metrics = run.results.get("metrics", {})
    exact = any("fp32" in own for own in metrics.values())
    header, spreads = _spreads(list(metrics.values()), main, list(run.intervals.values()))
    rows = [
        [split, f"{num_pairs(own):,}", Markup("<b>%s</b>") % fixed(own[main]), *spread,
         *(fixed(own[name]) for name in others), fixed(own.get("loss")),
         *([fixed(own.get("fp32", {}).get(main))] if exact else [])]
        for (split, own), spread in zip(metrics.items(), spreads, strict=True)
    ]  # fmt: skip
    return Table(["Set", "Pairs", run.scores[main], *header, *(run.scores[name] for name in others), "Loss",
                  *([f"{run.scores[main]} in fp32"] if exact else [])], rows)  # fmt: skip


def _spreads(
    scores: list[dict[str, Any]], main: str, intervals: list[tuple[float, float] | None]
) -> tuple[list[str], list[list[Any]]]:
    """Columns, and cells for each: the interval of its main score as numbers, and as a picture, all of one scale.

    There is no column where no score has an interval.
    """
    both = [end for own in intervals if own for end in own]
    if not both:
        return [], [[] for _ in scores]
    gap = max(0.02, (max(both) - min(both)) * 0.1)
    scale = max(0.0, min(both) - gap), min(1.0, max(both) + gap)
    return ["95 % interval", ""], [
        [ends(own), svg.whisker(values[main], own, scale) if own else ""]
        for values, own in zip(scores, intervals, strict=True)
    ]


def parts(run: Run) -> list[Part]:
    """The headline's set first, then the others as they were scored; of many only the first two are open."""
    metrics, first = run.results.get("metrics", {}), run.headline()
    order = sorted(metrics, key=lambda split: split != first)
    return [part(run, split, metrics[split], number < 2 or len(order) <= 3) for number, split in enumerate(order)]


def part(run: Run, split: str, scores: dict[str, Any], opened: bool) -> Part:
    main = next(iter(run.scores))
    summary = f"{run.scores[main]} {fixed(scores[main])}, {num_pairs(scores):,} pairs"
    made = Part(split, summary, opened, mapped=scores.get("mapped") or "")
    if "confusion_matrix" in scores:
        add_confusion(made, run.classes(scores), scores)
    add_calibration(made, run, read_predictions(run.folder, split))
    if sources := scores.get("by_source"):
        made.sources = source_table(run, sources)
    return made


def add_confusion(made: Part, names: list[str], scores: dict[str, Any]) -> None:
    matrix = scores["confusion_matrix"]
    made.matrix = svg.matrix(matrix, names, f"Confusion matrix of {made.name}")
    made.classes = class_table(names, scores)
    made.notes.append("Rows are the true classes, columns the predicted ones; shades are shares of a row.")
    if "confusion_classes" in scores:
        made.notes.append(f"The matrix has the {len(matrix) - 1} classes with the most pairs, and all others as one.")
    if "f1_threshold" in scores:
        made.notes += threshold_notes(scores)
    if "confusion_classes" in scores or len(names) > MOST_CLASSES:
        made.notes.append(f"By class: the {len(made.classes.rows)} with the most pairs.")


def threshold_note(threshold: float | None) -> str:
    if threshold is None:
        return "No pair has label 1, so there is no threshold from which on 1 would be predicted."
    return f"1 is predicted where the score is {threshold:.4g} or more: where F1 is highest."


def threshold_notes(scores: dict[str, Any]) -> list[str]:
    """Which number is at which threshold; runs of earlier versions have not said that of accuracy."""
    made, chosen = [threshold_note(scores["f1_threshold"])], []
    if scores["f1_threshold"] is not None:
        chosen.append(f"F1, precision, recall and the matrix are at {scores['f1_threshold']:.4g} (f1_threshold)")
    if scores.get("accuracy_threshold") is not None:
        chosen.append(f"accuracy is at {scores['accuracy_threshold']:.4g} (accuracy_threshold), where it is highest")
    if chosen:
        text = "; ".join(chosen)
        those = "Both thresholds were" if len(chosen) > 1 else "The threshold was"
        made.append(f"{text[0].upper()}{text[1:]}. {those} chosen on these very pairs, so on others of the same kind "
                    "the same threshold gives a little less.")  # fmt: skip
    return made


def by_class(names: list[str], scores: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of each class; runs of earlier versions have only the matrix."""
    if "by_class" in scores:
        return scores["by_class"]
    counts = np.array(scores["confusion_matrix"])
    hits, said, there = counts.diagonal(), counts.sum(0), counts.sum(1)
    return {
        name: {"precision": hit / max(1, p), "recall": hit / max(1, t), "f1": 2 * hit / max(1, p + t), "support": t}
        for name, hit, p, t in zip(names, hits.tolist(), said.tolist(), there.tolist(), strict=True)
    }


def class_table(names: list[str], scores: dict[str, Any]) -> Table:
    found = list(by_class(names, scores).items())
    most = sorted(range(len(found)), key=lambda i: -found[i][1]["support"])[:MOST_CLASSES]
    meter = Markup('%s<span class="meter" style="--v:%s"></span>')
    rows = [
        [plain(name, 60), f"{own['support']:,}", f"{own['precision']:.3f}", f"{own['recall']:.3f}",
         meter % (f"{own['f1']:.3f}", svg.percent(own["f1"]))]
        for name, own in (found[i] for i in sorted(most))
    ]  # fmt: skip
    return Table(["Class", "Pairs", "Precision", "Recall", "F1"], rows)


def source_table(run: Run, sources: dict[str, Any]) -> Table:
    main, title = next(iter(run.scores.items()))
    header, spreads = _spreads(list(sources.values()), main, [interval_of(own) for own in sources.values()])
    rows = [
        [plain(name, 60), f"{own['num_samples']:,}", Markup("<b>%s</b>") % fixed(own.get(main)), *spread]
        for (name, own), spread in zip(sources.items(), spreads, strict=True)
    ]
    return Table(["Source", "Pairs", title, *header], rows)


def add_calibration(made: Part, run: Run, found: Predictions | None) -> None:
    if found is None or not len(found.label):
        made.notes.append(f"predictions/{made.name}.parquet cannot be read, so there is no calibration.")
        return
    if run.objective == "mse":
        shown = svg.thin(list(zip(found.label.tolist(), found.scores.tolist(), strict=True)), MOST_DOTS)
        made.reliability_title = "Predicted over true score"
        made.reliability = svg.scatter(shown, f"Predicted over true scores of {made.name}", "True score")
        if len(shown) < len(found.label):
            made.notes.append(f"{len(shown):,} of {len(found.label):,} pairs are drawn.")
        return
    bins, error = calibration(*found.confidences())
    of_score = run.objective == "binary_cross_entropy"
    made.reliability_title = f"Calibration (ECE {error:.3f})"
    axis = "Predicted score" if of_score else "Probability of the predicted class"
    made.reliability = svg.reliability(bins, f"Calibration of {made.name}", axis)
    share = "share with label 1" if of_score else "share that is right"
    made.notes.append(f"Calibration: a dot is the {share} among the pairs of one tenth, with its 95 % "
                      f"interval (Wilson), a bar their share; those of fewer than {FEW} are hollow.")  # fmt: skip
