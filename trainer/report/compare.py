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
from trainer.metrics import RESAMPLES, fixed
from trainer.report import markdown, svg
from trainer.report.bits import compared
from trainer.report.facts import hyperparameters
from trainer.report.kept import is_ours, write_card
from trainer.report.markdown import Table
from trainer.report.paired import ALL_PAIRS, Difference, differences
from trainer.report.plots import draw_training, figure, panels, save, short
from trainer.report.read import Run
from trainer.report.svg import Series
from trainer.report.sweeps import titles

LEGEND = 60  # characters of a group's name
Group = tuple[str, list[Run]]
# What the runs of a group differ in, and what their batch came to by another way.
OF_A_GROUP = {"seed", "data_seed", "train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}

DIFFERENCES = Markup(
    "By how much a group's F1 macro is above that of another on the same pairs, and how that spreads over %s resamples "
    "of the pairs, on which both are scored%s. Of a group of several seeds each resample draws the seeds, too, with "
    "replacement: the same ones in groups that have the same seeds. Sign flips is the share of resamples in which the "
    "other group is ahead. None of it says how much depends on the seed where a group has but one, and few seeds say "
    "it roughly: see the spread in the scores above."
)


def write_comparison(runs: list[Run], folder: Path, lacking: str | None = None) -> Path:
    """Writes report.html, README.md and their pictures into `folder`; `lacking`: what is not there to be compared.

    Raises UserError where it can't be written.
    """
    groups = grouped(runs)
    made = [name for name in ("README.md", "report.html", "plots") if (folder / name).exists()]
    if made and not is_ours(folder / "README.md"):
        raise UserError(f"{folder} holds {made[0]}, which is not as crossrank has written it, and is kept; move it, or "
                        "choose another --output_dir")  # fmt: skip
    tables = compared_tables(runs, groups)
    try:
        with figure(12, 6.4) as drawn:
            draw_training(drawn, groups)
            save(drawn, folder / "plots" / "training")
        write_card(folder, markdown.render("compare.md.j2", groups=groups, lacking=lacking, **tables))
        write_text(folder / "report.html", markdown.page("compare.html.j2", groups=groups, curves=curves(groups),
                                                         lacking=lacking, **tables))  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot write the report into {folder}: {named(error)}") from None
    return folder / "report.html"


def compared_tables(runs: list[Run], groups: list[Group]) -> dict[str, Any]:
    """What both pages show."""
    found, reasons = differences(groups)
    return {
        "fields": field_table(runs, groups),
        "scores": score_tables(groups),
        "differences": difference_table(found),
        "reasons": reasons,
        "differences_note": DIFFERENCES
        % (f"{RESAMPLES:,}", "; each beside the first group" * (len(groups) > ALL_PAIRS)),
        "runs": run_table(groups),
        "bits": bit_table(runs),
    }


def bit_table(runs: list[Run]) -> Table:
    names = dict(zip((run.folder for run in runs), titles(runs), strict=True))
    rows = [[names[run.folder], names[other.folder], compared(run, other)] for run, other in beside(runs)]
    return Table(["Folder", "Beside", "Bits"], rows)


def beside(runs: list[Run]) -> list[tuple[Run, Run]]:
    """Runs that can be the same to the last bit, each with the first such run before it; two runs always are a pair.

    They have the same seed, and the same fields but for those that only say by which method a run is computed.
    """
    if len(runs) == 2:
        return [(runs[1], runs[0])]
    what = [(run.seeds, of_group(run, ("upkeep", "local", "method"))) for run in runs]
    first = [what.index(own) for own in what]
    return [(run, runs[place]) for number, (run, place) in enumerate(zip(runs, first, strict=True)) if place < number]


def of_group(run: Run, other_kinds: tuple[str, ...] = ("upkeep", "local")) -> dict[str, Any]:
    """What the runs of a group have in common: every field but those of `other_kinds` and of its seed."""
    others = {own.name for own in dataclasses.fields(Config) if rule(own).kind in other_kinds} | OF_A_GROUP
    return {name: value for name, value in settings(run, run.config).items() if name not in others}


def differing(runs: list[Run]) -> list[str]:
    """The fields in which groups of `runs` differ."""
    kept = [of_group(run) for run in runs]
    return [name for name in kept[0] if any(own[name] != kept[0][name] for own in kept)]


def grouped(runs: list[Run]) -> list[Group]:
    """Runs of one config but for the seed and what does not change a run; named by what the groups differ in."""
    fields = differing(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str([of_group(run)[field] for field in fields]), []).append(run)
    names: list[str] = []
    for first, *_ in groups.values():
        own = settings(first, hyperparameters(first, False))
        values = [short(str(own[field])) for field in fields]
        name = ", ".join(f"{field} {value}" for field, value in zip(fields, values, strict=True))
        if len(name) > LEGEND:  # of each word its first letter
            initials = ["".join(word[0] for word in field.split("_")) for field in fields]
            name = ", ".join(f"{field} {value}" for field, value in zip(initials, values, strict=True))
        name = name if 0 < len(name) <= LEGEND else short(first.config["run_name"] or first.folder.name)
        names.append(f"{name} ({len(names) + 1})" if name in names else name)
    return list(zip(names, groups.values(), strict=True))


def settings(run: Run, fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` of the run, and what its batch came to."""
    return {**fields, "global_batch_size": run.about["global_batch_size"]}


def field_table(runs: list[Run], groups: list[Group]) -> Table:
    """The fields in which the groups differ, a column a group."""
    shown = [settings(members[0], hyperparameters(members[0], False)) for _, members in groups]
    rows = [[name, *("-" if own[name] in (None, "") else str(own[name]) for own in shown)] for name in differing(runs)]
    return Table(["Field", *(name for name, _ in groups)], rows)


def score_tables(groups: list[Group]) -> dict[str, Table]:
    """By their objectives, which share no scores."""
    of_objective: dict[str, list[Group]] = {}
    for group in groups:
        of_objective.setdefault(group[1][0].objective, []).append(group)
    return {objective: score_table(own) for objective, own in of_objective.items()}


def score_table(groups: list[Group]) -> Table:
    """A row a group and set: mean and standard deviation over the group's runs that are finished, of one objective."""
    runs = [run for _, members in groups for run in members]
    scores = runs[0].scores
    splits = dict.fromkeys(split for run in runs for split in run.results.get("metrics", {}))
    rows = []
    for split in splits:
        for name, members in groups:
            found = [own for run in members if (own := run.results.get("metrics", {}).get(split))]
            if found:
                cells = [spread([own.get(score) for own in found]) for score in (*scores, "loss")]
                rows.append([name, split, str(len(found)), *cells])
    return Table(["Group", "Set", "Runs", *scores.values(), "Loss"], rows)


def spread(values: list[float | None]) -> str:
    """Of the runs' values that are defined; where some are not, how many are."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        text = fixed(known[0] if known else None)
    else:
        text = f"{fixed(statistics.mean(known))} ± {fixed(statistics.stdev(known))}"
    return f"{text} ({len(known)} of {len(values)})" if 0 < len(known) < len(values) else text


def difference_table(found: list[Difference]) -> Table:
    rows = [
        [own.split, own.second, own.first, f"{own.num_pairs:,}", f"{own.value:+.4f}" if own.value else "equal",
         f"{own.low:+.4f} to {own.high:+.4f}", f"{own.flips:.1%}" if own.value else "-"]
        for own in found
    ]  # fmt: skip
    return Table(["Set", "Group", "Compared with", "Pairs", "F1 Macro", "95 % interval", "Sign flips"], rows)


def run_table(groups: list[Group]) -> Table:
    runs = [run for _, members in groups for run in members]
    names = dict(zip((run.folder for run in runs), titles(runs), strict=True))
    rows = [
        [names[run.folder], name, str(run.config["seed"]), str(run.about["world_size"]), str(run.about["backend"]),
         "yes" if run.results else "no",
         f"{run.results['train']['samples_per_second']:,.0f}" if run.results else "-"]
        for name, members in groups
        for run in members
    ]  # fmt: skip
    return Table(["Folder", "Group", "Seed", "Ranks", "Backend", "Finished", "Pairs a second"], rows)


def curves(groups: list[Group]) -> list[dict[str, Any]]:
    """Each of the panels, all groups on one axis: the mean of a group's runs, with a band of a standard deviation."""
    made = []
    for panel in panels([run for _, runs in groups for run in runs]):
        series = [
            Series(name, list(zip(steps, mean, strict=True)), i % svg.PALETTE, panel.kind == "eval", spread=deviation)
            for i, (name, runs) in enumerate(groups)
            for steps, mean, deviation in [panel.over(runs)]
        ]
        chart = svg.lines(series, f"{panel.title} over steps", height=220, from_zero=panel.from_zero)
        if chart is not None:
            made.append({"title": panel.title, "chart": chart})
    return made
