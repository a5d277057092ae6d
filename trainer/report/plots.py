"""Pictures of a run, each as PNG and SVG: training curves, confusion and reliability, token lengths.

Drawn with matplotlib's own objects, not with pyplot: no window system, no state shared with the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.report.predictions import BINS, Predictions, calibration, read_predictions
from trainer.report.read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b6fb8", "#d1495b", "#2a9d6f", "#e08e2b", "#7a5ea8", "#5b6770")  # told apart by the colour-blind, too
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": "#e3e6ea",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a class name is a dollar
    "svg.hashsalt": "crossrank",  # the same run, the same file
}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, path: Path) -> None:
    """`path`.png and `path`.svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(f"{path}.png", dpi=130, metadata={"Software": None})
    drawn.savefig(f"{path}.svg", metadata={"Date": None})


def draw(run: Run, folder: Path) -> list[str]:
    """Draws what there is data for, and returns the pictures' names without endings."""
    names = []
    if run.of("train"):
        with figure(12, 6.4) as drawn:
            draw_training(drawn, [("", [run])])
            save(drawn, folder / "training")
        names.append("training")
    for split, scores in run.results.get("metrics", {}).items():
        name = "scores-" + re.sub(r"[^\w-]+", "-", split)
        with figure(12, 4.8) as drawn:
            draw_split(drawn, run, split, scores)
            save(drawn, folder / name)
        names.append(name)
    with figure(12, 3.8) as drawn:
        draw_lengths(drawn, run.about["data"]["train"]["lengths"], run.about["padding"], run.config["unpad"])
        save(drawn, folder / "lengths")
    return [*names, "lengths"]


def draw_split(drawn: Figure, run: Run, split: str, scores: dict[str, Any]) -> None:
    """Confusion and reliability of a set; of scores that are no classes, predicted over true ones."""
    found = read_predictions(run.folder, split)
    if "confusion_matrix" not in scores:
        draw_scatter(drawn.subplots(), found, split)
        return
    left, right = drawn.subplots(1, 2)
    draw_confusion(left, scores["confusion_matrix"], run.classes(scores), split)
    draw_reliability(right, found, split)


@dataclass(frozen=True)
class Panel:
    """One curve over steps: `name` in the events of `kind`, which are train or eval."""

    title: str
    kind: str
    name: str
    from_zero: bool = False

    def of(self, run: Run) -> dict[int, float]:
        dev = run.about["data"].get("dev", {}).get("name")
        return points(run, self.kind, dev if self.kind == "eval" else None, self.name)

    def over(self, runs: list[Run]) -> tuple[list[int], list[float], list[float]]:
        """The steps that all of them have, their mean there, and its standard deviation; empty for one run."""
        series = [self.of(run) for run in runs]
        steps = sorted(set.intersection(*(set(own) for own in series))) if series else []
        values = np.array([[own[step] for step in steps] for own in series])  # (runs, steps)
        return steps, values.mean(0).tolist(), values.std(0, ddof=1).tolist() if len(runs) > 1 else []


def panels(runs: list[Run]) -> list[Panel]:
    """Of runs of one objective; the main score's is that of the first."""
    main, title = next(iter(runs[0].scores.items()))
    return [
        Panel("Training loss", "train", "loss"),
        Panel("Validation loss", "eval", "loss"),
        Panel(title, "eval", main),
        Panel("Learning rate", "train", "learning_rate", from_zero=True),
        Panel("Gradient norm", "train", "grad_norm", from_zero=True),
        Panel("Training pairs a second", "train", "samples_per_second", from_zero=True),
    ]


def best_metric(run: Run) -> str:
    """By which the best evaluation is found."""
    return str(run.config["metric_for_best_model"] or next(iter(run.scores)))


def best_evaluation(run: Run) -> int | None:
    """Its step; the first one of several."""
    name = best_metric(run)
    found = Panel(name, "eval", name).of(run)
    sign = -1 if name == "loss" else 1
    return max(found, key=lambda step: sign * found[step], default=None)


def draw_training(drawn: Figure, groups: list[tuple[str, list[Run]]]) -> None:
    """Six panels over steps. Several runs of a group are a mean with a band of one standard deviation."""
    axes = drawn.subplots(2, 3).ravel()
    devs = {runs[0].about["data"].get("dev", {}).get("name") for _, runs in groups}
    dev = devs.pop() if len(devs) == 1 else None
    for axis, panel in zip(axes, panels([run for _, runs in groups for run in runs]), strict=True):
        evaluated = panel.kind == "eval"
        axis.set_title(f"{panel.title} ({short(dev)})" if evaluated and dev else panel.title, loc="left")
        axis.set_xlabel("Step")
        for colour, (label, runs) in zip(cycle(len(groups)), groups, strict=True):
            curve(axis, panel, runs, colour, label)
        if panel.from_zero:
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}")
        if not evaluated:
            axis.margins(x=0.01)

    if len(groups) > 1:
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(groups)))


def cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def points(run: Run, kind: str, split: str | None, name: str) -> dict[int, float]:
    """Step and value; a step that was skipped has none."""
    found: dict[int, float] = {}
    for event in run.of(kind, split):
        if event.get(name) is not None:
            found.setdefault(event["step"], event[name])
    return found


def curve(axis: Axes, panel: Panel, runs: list[Run], colour: str, label: str) -> None:
    steps, values, deviation = panel.over(runs)
    if not steps:
        return
    marker = "o" if panel.kind == "eval" or len(steps) == 1 else ""
    mean = np.array(values)
    if deviation:
        axis.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    if panel.name == "loss" and panel.kind == "train" and len(steps) > 20:
        axis.plot(steps, mean, color=colour, alpha=0.3, linewidth=1)
        mean = smoothed(values)
    axis.plot(steps, mean, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """A curve of many points, over about ten of them."""
    return smooth(values, past=min(0.95, 1 - 10 / len(values)))


def smooth(values: Sequence[float], past: float) -> np.ndarray:
    """An exponential moving average that is not drawn to 0 at its beginning (Kingma & Ba 2015, section 3)."""
    weights = np.cumsum(past ** np.arange(len(values)))
    total, made = 0.0, []
    for value, weight in zip(values, weights, strict=True):
        total = past * total + value
        made.append(total / weight)
    return np.array(made)


def draw_confusion(panel: Axes, matrix: list[list[int]], names: list[str], split: str) -> None:
    """Counts, coloured by their share of the true class."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    panel.grid(visible=False)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    panel.set_title(f"Confusion matrix, {short(split)}", loc="left")
    panel.set_xlabel("Predicted")
    panel.set_ylabel("True")
    shown = [short(name, 16) for name in names]
    panel.set_xticks(
        range(len(names)), shown, rotation=45 if len(names) > 5 else 0, ha="right" if len(names) > 5 else "center"
    )
    panel.set_yticks(range(len(names)), shown)
    for row, column in np.ndindex(counts.shape) if len(names) <= 12 else ():
        colour = "white" if shares[row, column] > 0.5 else "#1f2328"
        text = f"{counts[row, column]:,}\n{shares[row, column]:.1%}"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)


def draw_scatter(panel: Axes, found: Predictions | None, split: str) -> None:
    panel.set_title(f"Scores, {short(split)}", loc="left")
    panel.set_xlabel("True")
    panel.set_ylabel("Predicted")
    if found is not None:
        panel.scatter(found.label, found.scores, 8, color=COLOURS[0], alpha=0.3, linewidths=0)


def draw_reliability(panel: Axes, found: Predictions | None, split: str) -> None:
    """Accuracy over confidence, and the expected calibration error."""
    panel.set_title(f"Reliability, {short(split)}", loc="left")
    panel.set_xlabel("Probability of the predicted class")
    panel.set_ylabel("Share that is right")
    panel.set(xlim=(0, 1), ylim=(0, 1))
    panel.plot([0, 1], [0, 1], color="#8a939c", linestyle="--", linewidth=1, label="perfect")
    if found is None or not len(found.label):
        panel.text(0.5, 0.5, "no predictions", ha="center")
        return
    bins, error = calibration(*found.confidences())
    shares = np.zeros(BINS)
    shares[[own.number for own in bins]] = [own.count / len(found.label) for own in bins]
    panel.bar((np.arange(BINS) + 0.5) / BINS, shares, 0.9 / BINS, color="#c9d1d9", label="share of the pairs")
    panel.plot([own.confidence for own in bins], [own.accuracy for own in bins], color=COLOURS[0], marker="o",
               linewidth=1.8, label=f"accuracy (ECE {error:.3f})")  # fmt: skip
    panel.legend(loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")


def draw_lengths(drawn: Figure, lengths: list[int], padding: dict[str, int], unpad: bool) -> None:
    """How long the pairs are, and what padding would add to their tokens."""
    left, right = drawn.subplots(1, 2, width_ratios=(3, 1))
    counts = np.array(lengths)
    numbers = np.arange(len(counts))
    mean = float((numbers * counts).sum() / counts.sum())
    width = max(1, len(counts) // 100)
    left.bar(*binned(counts, width), width * 0.9, color=COLOURS[0])
    left.axvline(mean, color=COLOURS[1], linewidth=1.5)
    left.annotate(
        f"mean {mean:.1f}", (mean, left.get_ylim()[1]), xytext=(5, -12), textcoords="offset points", color=COLOURS[1]
    )
    left.set_title("Tokens of a training pair", loc="left")
    left.set(xlabel="Tokens", ylabel="Pairs", xlim=(np.flatnonzero(counts)[0] - width, len(counts) + width))
    saved = padding["padding"] / max(1, sum(padding.values()))
    below = 0
    for name, colour, label in (("tokens", COLOURS[0], "tokens"), ("padding", "#c9d1d9", f"padding, {saved:.0%}")):
        right.bar([0], [padding[name]], 0.5, bottom=[below], color=colour)
        right.text(0.32, below + padding[name] / 2, f"{label}\n{padding[name]:,}", va="center")
        below += padding[name]
    right.set_title("Padding saved in an epoch" if unpad else "Padding in an epoch", loc="left")
    right.set(xlim=(-0.4, 1.4), xticks=[], yticks=[])
    right.spines[["left", "bottom"]].set_visible(False)
    right.grid(visible=False)


def binned(counts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    padded = np.append(counts, np.zeros(-len(counts) % width, counts.dtype))
    starts = np.arange(0, len(padded), width)
    return starts + (width - 1) / 2, np.add.reduceat(padded, starts)


def short(text: str | None, longest: int = 28) -> str:
    """For a title or a tick: one line of printable characters."""
    plain = "".join(c if c.isprintable() else " " for c in text or "")
    return plain if len(plain) <= longest else plain[:longest] + "..."
