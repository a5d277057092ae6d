"""Several runs beside each other: `crossrank report RUN RUN ...`. Those that differ only in their seed are a group."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trainer.base.errors import UserError, named
from trainer.base.fields import rule
from trainer.base.files import write_text
from trainer.config import Config
from trainer.report import markdown
from trainer.report.bits import compared
from trainer.report.card import hyperparameters, rounded
from trainer.report.kept import is_ours, write_card
from trainer.report.markdown import escape, table
from trainer.report.plots import draw_training, figure, save, short
from trainer.report.read import SCORES, Run
from trainer.report.sweeps import titles

LEGEND = 60  # characters of a group's name
Group = tuple[str, list[Run]]
# What the runs of a group differ in, and what their batch came to by another way.
OF_A_GROUP = {"seed", "data_seed", "train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}


def write_comparison(runs: list[Run], folder: Path, lacking: str | None = None) -> Path:
    """Writes report.html, README.md and their pictures into `folder`; `lacking`: what is not there to be compared.

    Raises UserError where it can't be written.
    """
    groups = grouped(runs)
    made = [name for name in ("README.md", "report.html", "plots") if (folder / name).exists()]
    if made and not is_ours(folder / "README.md"):
        raise UserError(f"{folder} holds {made[0]}, which is not as crossrank has written it, and is kept; move it, or "
                        "choose another --output_dir")  # fmt: skip
    try:
        with figure(12, 6.4) as drawn:
            draw_training(drawn, groups)
            save(drawn, folder / "plots" / "training")
        text = markdown.render("compare.md.j2", groups=groups, scores=score_table(groups), runs=run_table(groups),
                               bits=bit_table(runs, groups), lacking=lacking)  # fmt: skip
        write_card(folder, text)
        write_text(folder / "report.html", markdown.to_html("Runs compared", text, folder))
    except OSError as error:
        raise UserError(f"cannot write the report into {folder}: {named(error)}") from None
    return folder / "report.html"


def bit_table(runs: list[Run], groups: list[Group]) -> Markup:
    """Each run but the first, beside another one: the first of its group and seeds, or else the first of all."""
    names = dict(zip((run.folder for run in runs), titles(runs), strict=True))
    rows = [
        [escape(names[run.folder]), escape(names[other.folder]), escape(compared(run, other))]
        for run, other in beside(runs, groups)
    ]
    return table(["Folder", "Beside", "Bits"], rows)


def beside(runs: list[Run], groups: list[Group]) -> list[tuple[Run, Run]]:
    """The runs but the first, each with the one that it is compared with."""
    pairs = []
    for number, run in enumerate(runs[1:], 1):
        (own,) = (members for _, members in groups if any(run is member for member in members))
        near = [other for other in runs[:number] if any(other is member for member in own)]
        alike = [other for other in near if seeds(other) == seeds(run)]
        pairs.append((run, (alike or runs)[0]))
    return pairs


def seeds(run: Run) -> tuple[int, int]:
    """Of weights and dropout, and of the data's order."""
    seed, of_data = run.config["seed"], run.config["data_seed"]
    return seed, seed if of_data is None else of_data


def grouped(runs: list[Run]) -> list[Group]:
    """Runs of one config but for the seed and what does not change a run; named by what the groups differ in."""
    upkeep = {own.name for own in dataclasses.fields(Config) if rule(own).kind in ("upkeep", "local")} | OF_A_GROUP
    kept = [{k: v for k, v in settings(run, run.config).items() if k not in upkeep} for run in runs]
    differing = [name for name in kept[0] if any(own[name] != kept[0][name] for own in kept)]
    groups: dict[str, list[Run]] = {}
    for run, own in zip(runs, kept, strict=True):
        groups.setdefault(str([own[field] for field in differing]), []).append(run)
    names: list[str] = []
    for first, *_ in groups.values():
        own = settings(first, hyperparameters(first, False))
        values = [short(str(own[field])) for field in differing]
        name = ", ".join(f"{field} {value}" for field, value in zip(differing, values, strict=True))
        if len(name) > LEGEND:  # of each word its first letter
            initials = ["".join(word[0] for word in field.split("_")) for field in differing]
            name = ", ".join(f"{field} {value}" for field, value in zip(initials, values, strict=True))
        name = name if 0 < len(name) <= LEGEND else short(first.config["run_name"] or first.folder.name)
        names.append(f"{name} ({len(names) + 1})" if name in names else name)
    return list(zip(names, groups.values(), strict=True))


def settings(run: Run, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of the run, and what its batch came to."""
    return {**fields, "global_batch_size": run.about["global_batch_size"]}


def score_table(groups: list[Group]) -> Markup:
    """Mean and standard deviation over the runs of a group that are finished."""
    splits = list(dict.fromkeys(s for _, runs in groups for run in runs for s in run.results.get("metrics", {})))
    rows = []
    for name, runs in groups:
        finished = [run.results for run in runs if run.results]
        speed = [results["train"]["samples_per_second"] for results in finished]
        cells = [
            spread([results["metrics"][split][metric] for results in finished if split in results["metrics"]])
            for split in splits
            for metric in SCORES
        ]
        rows.append([escape(name), str(len(finished)), *cells, f"{statistics.mean(speed):,.0f}" if speed else "-"])
    names = [f"{escape(split)} {metric}" for split in splits for metric in SCORES]
    return table(["Runs", "Finished", *names, "Pairs a second"], rows)


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return rounded(values[0] if values else None)
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def run_table(groups: list[Group]) -> Markup:
    runs = [run for _, members in groups for run in members]
    names = dict(zip((run.folder for run in runs), titles(runs), strict=True))
    rows: list[list[Any]] = [
        [escape(names[run.folder]), escape(name), str(run.config["seed"]), str(run.about["world_size"]),
         escape(run.about["backend"]), "yes" if run.results else "no"]
        for name, members in groups
        for run in members
    ]  # fmt: skip
    return table(["Folder", "Group", "Seed", "Ranks", "Backend", "Finished"], rows)
