"""The model card: a pure function of what the run folder says, rendered from card.md.j2.

Metadata go through huggingface_hub's classes, every word of others through `markdown`'s escapes.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from trainer.metrics import fixed, num_pairs
from trainer.report import markdown
from trainer.report.facts import (
    command,
    ends,
    from_scratch,
    hyperparameters,
    loss_note,
    padding,
    versions,
    warnings,
)
from trainer.report.intervals import draws_of
from trainer.report.markdown import code, escape, table
from trainer.report.plots import best_evaluation
from trainer.report.read import Run

MOST_LINES = 200  # of the training logs
# As sentence-transformers calls them.
LOSSES = {"cross_entropy": "CrossEntropyLoss", "binary_cross_entropy": "BinaryCrossEntropyLoss", "mse": "MSELoss"}
HUBS = ("f1_macro", "f1_micro", "f1_weighted")  # of the scores of classes, those that their cards have
EVALUATORS = {"cross_entropy": "Classification", "binary_cross_entropy": "Classification", "mse": "Correlation"}


def title(run: Run) -> str:
    return f"CrossEncoder based on {run.about['model']['base']}"


def card(run: Run, plots: list[str]) -> str:
    """The model card; `plots` names the pictures beside it. A pure function of the run."""
    about, results = run.about, run.results
    examples = results.get("examples") or []
    printed = np.array([e["scores"] for e in examples], np.float32)
    printed = printed if run.objective == "cross_entropy" else printed.reshape(-1)
    logs, note = training_logs(run)
    return markdown.render(
        "card.md.j2",
        metadata=Markup(metadata(run).to_yaml()),  # noqa: S704
        title=title(run),
        finished=bool(results),
        warnings=warnings(run),
        verb="trained from scratch with the architecture of" if from_scratch(run) else "finetuned from",
        base=hub_link(about["model"]["base"], about["model"]["hub_id"]),
        link=hub_link(about["dataset"]["name"], about["dataset"]["hub_id"], "datasets/"),
        dataset_place=dataset_place(about["dataset"]),
        about=about,
        config=run.config,
        results={"metrics": {}, **results},
        energy=results.get("energy"),
        hub_model_id=run.config["hub_model_id"],
        examples=examples,
        printed=str(printed.round(4)).split("\n"),
        shape=printed.shape,
        statistics=statistics,
        samples=samples,
        scores=partial(scores, run),
        details=partial(details, run),
        confusion=partial(confusion, run),
        sources=partial(sources, run),
        score=run.objective != "cross_entropy",
        loss=LOSSES[run.objective],
        evaluator=EVALUATORS[run.objective],
        resamples=draws_of(run.objective),
        main=next(iter(run.scores.values())).replace("Macro", "macro"),
        changed=hyperparameters(run, changed_only=True),
        hyperparameters=hyperparameters(run, changed_only=False),
        logs=logs,
        logs_note=note,
        padding=padding(run),
        commit=commit(about["git"]),
        command=command(run),
        plots=plots,
        split_plots=[name for name in plots if name not in ("training", "lengths")],
        versions=versions(run),
    )


def metadata(run: Run) -> ModelCardData:
    """What the hub reads. Nothing that would have to be guessed: neither language nor licence of unknown data."""
    about, energy = run.about, run.results.get("energy")
    data, machine = about["dataset"], about["hardware"]
    emissions = None
    if energy:
        emissions = {
            "emissions": energy["co2_kg"] * 1000,  # the hub counts grams
            "energy_consumed": energy["kwh"],
            "source": "codecarbon",
            "training_type": "training from scratch" if from_scratch(run) else "fine-tuning",
            "on_cloud": machine["on_cloud"],
            "cpu_model": machine["cpu"],
            "ram_total_size": machine["ram_gb"],
            "hours_used": round(energy["hours"], 3),
            **({"hardware_used": f"{machine['gpus']} x {machine['gpu']}"} if machine["gpu"] else {}),
        }
    made = {
        "language": [data["language"]] if data["language"] else None,
        "tags": ["sentence-transformers", "cross-encoder", "generated_from_trainer", "crossrank",
                 f"dataset_size:{about['data']['train']['size']}", f"loss:{LOSSES[run.objective]}"],
        "base_model": about["model"]["hub_id"],
        "datasets": data.get("hub_ids", [data["hub_id"]] if data["hub_id"] else []) or None,
        "pipeline_tag": "text-classification",
        "library_name": "sentence-transformers",
        "metrics": list(of_the_hub(run)) if run.results.get("metrics", True) else None,
        "co2_eq_emissions": emissions,
        "model_name": title(run),
        "eval_results": eval_results(run) or None,
    }  # fmt: skip
    return ModelCardData(**{name: value for name, value in made.items() if value is not None})


def of_the_hub(run: Run) -> dict[str, str]:
    """Names and titles of the scores that stand where sentence-transformers' cards have theirs."""
    return {name: title for name, title in run.scores.items() if run.objective != "cross_entropy" or name in HUBS}


def eval_results(run: Run) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=f"cross-encoder-{EVALUATORS[run.objective].lower()}",
            task_name=f"Cross Encoder {EVALUATORS[run.objective]}",
            dataset_name=split.replace("-", " "),
            dataset_type=split,
            metric_type=name,
            metric_name=shown,
            metric_value=values[name],
        )
        for split, values in run.results.get("metrics", {}).items()
        for name, shown in of_the_hub(run).items()
        if values[name] is not None
    ]


def hub_link(name: str, hub_id: str | None, kind: str = "") -> Markup:
    return Markup(f"[{escape(name)}](https://huggingface.co/{kind}{hub_id})" if hub_id else escape(name))  # noqa: S704


def dataset_place(data: dict[str, Any]) -> Markup:
    """The data set and its very revision."""
    link = hub_link(data["name"], data["hub_id"], "datasets/")
    if not (data["hub_id"] and data["revision"]):
        return link
    revision = escape(data["revision"])
    return link + Markup(f" at [{revision[:7]}](https://huggingface.co/datasets/{data['hub_id']}/tree/{revision})")  # noqa: S704


def statistics(split: dict[str, Any]) -> Markup:
    def listed(lines: list[str]) -> str:
        return f"<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"

    details = [
        listed([f"{n}: ~{share:.2%}" for n, share in column["shares"].items()][:20])
        if "shares" in column
        else listed(
            [
                f"{n}: {round(column[n], 2)}{' characters' if column['type'] == 'string' else ''}"
                for n in ("min", "mean", "max")
            ]
        )
        for column in split["statistics"]
    ]
    header = ["", *map(escape, split["columns"])]
    return table(header, [["type", *(c["type"] for c in split["statistics"])], ["details", *details]])


def samples(split: dict[str, Any]) -> Markup:
    return table([escape(c) for c in split["columns"]], [[code(cell) for cell in row] for row in split["samples"]])


def bold(cells: list[str]) -> list[str]:
    return [cell if cell == "-" else f"**{cell}**" for cell in cells]


def scores(run: Run) -> Markup:
    """Metrics down, splits across; the first one is what training looks at."""
    metrics = run.results["metrics"]
    rows = [[name, *(fixed(split[name]) for split in metrics.values())] for name in of_the_hub(run)]
    return table(["Metric", *map(escape, metrics)], [bold(rows[0]), *rows[1:]])


def details(run: Run) -> Markup:
    """A line a split and number format: pairs, F1 macro with its interval, loss."""
    rows = []
    for name, split in run.results["metrics"].items():
        own = "bf16" if run.config["bf16"] else "fp32"
        rows.append([escape(name), own, f"{num_pairs(split):,}", *(fixed(split[m]) for m in run.scores),
                     ends(run.intervals[name]), fixed(split["loss"])])  # fmt: skip
        if "fp32" in split:
            rows.append([escape(name), "fp32", f"{num_pairs(split):,}",
                         *(fixed(split["fp32"][m]) for m in run.scores), "",
                         fixed(split["fp32"]["loss"])])  # fmt: skip
    return table(["Split", "Precision", "Pairs", *run.scores, f"95 % of {next(iter(run.scores))}", "Loss"], rows)


def confusion(run: Run, split: dict[str, Any]) -> Markup:
    if "confusion_matrix" not in split:
        return Markup("Scores have no confusion matrix.")
    names = [escape(name, 30) for name in run.classes(split)]
    if kept := split.get("confusion_classes"):
        text = f"More than {len(kept)} classes; the matrix of those with the most pairs is in results.json."
        return Markup(text)  # noqa: S704
    if len(names) > 20:
        return Markup("More than twenty classes; the matrix is in results.json.")
    rows = [[name, *(f"{n:,}" for n in row)] for name, row in zip(names, split["confusion_matrix"], strict=True)]
    return table(["", *names], rows)


def sources(run: Run, split: dict[str, Any]) -> Markup:
    rows = [
        [escape(name, 60), f"{own['num_samples']:,}", *(fixed(own.get(m)) for m in run.scores)]
        for name, own in split["by_source"].items()
    ]
    return table(["Source", "Pairs", *run.scores], rows)


def commit(git: dict[str, Any] | None) -> Markup:
    if git is None:
        return Markup("an installed copy, not a checkout")
    return code(git["commit"]) + (" with changes that were not committed" if git["dirty"] else "")


def training_logs(run: Run) -> tuple[Markup | None, str]:
    """The table of log lines and evaluations by step, and what to know of it; None where there are none."""
    splits = list(dict.fromkeys(event["split"] for event in run.of("eval")))
    steps: dict[int, dict[str, Any]] = {}
    for event in run.events:
        at = steps.setdefault(event["step"], {"Epoch": f"{event['epoch']:.4f}"})
        # The final evaluation may be of weights that have been evaluated before: the first one counts.
        at.setdefault("train" if event["event"] == "train" else f"eval {event['split']}", event)
    if not steps:
        return None, ""
    dev, main = run.about["data"].get("dev", {}).get("name"), next(iter(run.scores))
    rows = [[at["Epoch"], str(step), *_cells(at, splits, dev, main)] for step, at in sorted(steps.items())]
    kept = list(thinned(rows))
    step = best_evaluation(run)
    best = next((row for row in kept if row[1] == str(step)), None)
    rows = [bold(row) if row is best else row for row in kept]
    note = "The training loss is the mean since the line before." + (" The best evaluation is bold." if best else "")
    if len(kept) < len(steps):
        note += f" {len(steps) - len(kept):,} lines are left out; metrics.jsonl has them."
    note = f"{note} {loss_note(run)}".strip()
    header = ["Epoch", "Step", "Training Loss", "Validation Loss", *(f"{escape(s)}_{main}" for s in splits)]
    return table(header, rows, "c" * len(header)), note


def _cells(at: dict[str, Any], splits: list[str], dev: str | None, main: str) -> list[str]:
    scores = [fixed(at.get(f"eval {split}", {}).get(main)) for split in splits]
    return [fixed(at.get("train", {}).get("loss")), fixed(at.get(f"eval {dev}", {}).get("loss")), *scores]


def thinned(rows: list[list[str]]) -> Iterator[list[str]]:
    """Every evaluation, and so many of the others that the table can be read."""
    every = math.ceil(len(rows) / MOST_LINES)
    for number, row in enumerate(rows):
        if number % every == 0 or any(cell != "-" for cell in row[3:]):
            yield row
