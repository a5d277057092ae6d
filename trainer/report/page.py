"""report.html of a run: what came out first, then why, and last how to have it again. A pure function of the folder.

Unlike the model card, which is the hub's, it is for whoever made the run. It is one file: charts are SVG in it, nothing
is fetched, and nothing runs.
"""

from functools import partial
from typing import Any

from markupsafe import Markup

from trainer.config import TITLES
from trainer.metrics import fixed
from trainer.report import markdown, svg
from trainer.report.facts import command, ends, fields, loss_note, padding, versions, warnings
from trainer.report.markdown import Table, plain
from trainer.report.plots import best_evaluation, best_metric, panels, smoothed
from trainer.report.read import Run
from trainer.report.sets import overview, parts, threshold_note
from trainer.report.svg import Series

LONGEST = 300  # characters of a text


def page(run: Run) -> str:
    errors = run.results.get("errors") or {}
    kind = "The largest errors" if run.objective == "mse" else "The most confident errors"
    return markdown.page(
        "page.html.j2",
        name=run.name,
        when=when(run),
        warnings=warnings(run),
        headline=headline(run),
        facts=facts(run),
        overview=overview(run),
        curves=curves(run),
        sets=parts(run),
        errors=errors,
        errors_title=kind,
        no_errors=partial(no_errors, run),
        shown=partial(plain, longest=LONGEST),
        word=word,
        data=data(run),
        usage=usage(run),
        changed=Table(["Field", "Value", "Default"], fields(run, changed_only=True)),
        hyperparameters=Table(["Field", "Value"], [row[:2] for row in fields(run, changed_only=False)]),
        machine=machine(run),
        command=command(run),
    )


def when(run: Run) -> str:
    date = run.results.get("finished_at") or run.about.get("started_at")
    kind = "" if run.results else "started "
    model = f"{run.about['model']['base']} on {run.about['dataset']['name']}"
    return f"{kind}{plain(date)[:16].replace('T', ' ')} UTC, {model}" if date else model


def headline(run: Run) -> dict[str, str] | None:
    """The main score of the first test set, with its interval."""
    if (split := run.headline()) is None:
        return None
    main, scores = next(iter(run.scores)), run.results["metrics"][split]
    between = run.intervals[split]
    spread = f"95 % interval {ends(between)}" if between else ""
    if scores[main] is None:
        spread = "Not defined where all pairs have the same label, or the same score."
    role = {"dev": "Dev"}.get(run.role(split), "Test")
    return {"value": fixed(scores[main]), "title": f"{role} {run.scores[main].replace('Macro', 'macro')}",
            "split": split, "spread": spread}  # fmt: skip


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{int(hours)} h {int(minutes % 60):02d} min"
    return f"{int(minutes)} min {int(seconds % 60):02d} s" if minutes >= 1 else f"{seconds:.3g} s"


def facts(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and detail of what a reader wants to know first."""
    about, train, energy = run.about, run.results.get("train"), run.results.get("energy")
    made = [("Training pairs", f"{about['data']['train']['size']:,}", f"{about['global_batch_size']:,} a step")]
    if train:
        scored = run.results.get("eval", {}).get("seconds") or 0.0
        made += [("Steps", f"{train['steps']:,}", f"{train['epochs']:.3g} epochs" if "epochs" in train else ""),
                 ("Wall time", duration(train["seconds"] + scored), f"{duration(scored)} of it to evaluate"),
                 ("Speed", f"{train['samples_per_second']:,.0f} pairs/s",
                  f"{train['tokens_per_second']:,.0f} tokens/s")]  # fmt: skip
    machine = about["hardware"]
    made.append(("Ranks", f"{about['world_size']}", f"{about['backend']}, {machine['gpu'] or 'CPU'}"))
    made.append(("Energy", *used(energy)))
    model = about["model"]
    return [*made, ("Base model", model["base"], f"{model['num_parameters']:,} parameters")]


def used(energy: dict[str, Any] | None) -> tuple[str, str]:
    if not energy:
        return "-", "not measured"
    kwh = energy["kwh"]
    return f"{kwh:.3g} kWh" if kwh >= 0.01 else f"{kwh * 1000:.3g} Wh", f"{energy['co2_kg'] * 1000:.3g} g CO2"


def curves(run: Run) -> list[dict[str, Any]]:
    """Both losses on one axis, with the best evaluation marked; then the smaller ones."""
    training, validation, *others = panels([run])
    train, dev = sorted(training.of(run).items()), sorted(validation.of(run).items())
    loss = [Series("training", train), Series("validation", dev, colour=1, dots=True)]
    if len(train) > 20:
        steps, values = zip(*train, strict=True)
        level = list(zip(steps, smoothed(values).tolist(), strict=True))
        loss = [Series("training", train, faint=True), Series("training, smoothed", level), loss[1]]
    # That the model is of, or so far would be.
    best = run.results["train"].get("best_step") if run.results else best_evaluation(run)
    metric = best_metric(run)
    by = "" if metric in [panel.name for panel in (validation, *others)] else f" by {TITLES[metric]}"
    mark = (best, f"best{by}: step {best:,}") if best is not None else None
    made = [{"title": "Loss", "chart": svg.lines(loss, "Loss over steps", 300, mark=mark), "names": svg.legend(loss),
             "note": loss_note(run)}]  # fmt: skip
    for panel in others:
        evaluated = panel.kind == "eval"
        own = Series(panel.title, sorted(panel.of(run).items()), colour=int(evaluated), dots=evaluated)
        marked = (best, "") if best is not None and evaluated else None
        chart = svg.lines([own], f"{panel.title} over steps", from_zero=panel.from_zero, mark=marked)
        names = [(plain(run.about["data"].get("dev", {}).get("name"), 40), 1)] if evaluated else []
        made.append({"title": panel.title, "chart": chart, "names": names, "note": ""})
    return [curve for curve in made if curve["chart"] is not None]


def no_errors(run: Run, split: str) -> str:
    """Why a set has none."""
    scores = run.results["metrics"].get(split, {})
    undefined = "f1_threshold" in scores and scores["f1_threshold"] is None
    return threshold_note(None) if undefined else "Every pair is right."


def word(value: Any) -> str:
    """A class, or a score."""
    return f"{value:.4g}" if isinstance(value, float) else plain(value, 60)


def data(run: Run) -> dict[str, Any]:
    about = run.about
    longest = about["model"]["max_length"]
    rows = [
        [own.get("name", role), role, f"{own['size']:,}", f"{own.get('dropped', 0):,}", f"{own.get('cut', 0):,}",
         balance(run, role, own)]
        for role, own in about["data"].items()
    ]  # fmt: skip
    notes = [f"Padding: {padding(run)}."]
    notes += [f"{own.get('name', role)}: classes were mapped: {own['mapped']}." for role, own in about["data"].items()
              if own.get("mapped")]  # fmt: skip
    lengths = about["data"]["train"].get("lengths") or []
    place = about["dataset"]["name"]
    if about["dataset"]["revision"]:
        place += f" at revision {about['dataset']['revision']}"
    return {
        "place": f"{place}{', from local files' if about['dataset']['from_files'] else ''}.",
        "splits": Table(["Set", "Role", "Pairs", "Dropped, no consensus", f"Cut to {longest} tokens", "Labels"], rows),
        "notes": notes,
        "lengths": svg.histogram(lengths, "Tokens of the training pairs", "Tokens") if any(lengths) else None,
    }


def balance(run: Run, role: str, split: dict[str, Any]) -> str:
    """Shares of the classes, the first ones of many, or of the labels 0 and 1; none of targets."""
    counts = split.get("labels") or []
    binary = run.objective == "binary_cross_entropy"
    learned = (run.config["label_names"] or ["0", "1"]) if binary else run.about["model"]["label_names"]
    names = run.results.get("metrics", {}).get(split.get("name"), {}).get("label_names") or learned
    if len(counts) != len(names):
        return ""
    shown = [f"{plain(name, 30)} {count / max(1, sum(counts)):.0%}" for name, count in zip(names, counts, strict=True)]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def usage(run: Run) -> str:
    where = run.config["hub_model_id"] or f"{run.name}/model"
    classes = run.objective == "cross_entropy"
    scores = "one row a pair, one column a class" if classes else "one score a pair"
    text = f"""from sentence_transformers import CrossEncoder

model = CrossEncoder({plain(where)!r})
scores = model.predict([(premise, hypothesis)]{", apply_softmax=True" if classes else ""})  # {scores}"""
    names = [plain(name, 40) for name in run.about["model"]["label_names"][:20]]
    return text + (f"\n# columns: {', '.join(names)}" if classes else "")


def machine(run: Run) -> list[tuple[str, Any]]:
    about, energy = run.about, run.results.get("energy")
    parts, git = about["hardware"], about["git"]
    made = [("Processor", parts["cpu"]), ("Memory", f"{parts['ram_gb']:.0f} GB"),
            ("GPU", f"{parts['gpus']} x {parts['gpu']}" if parts["gpu"] else "none"),
            ("Ranks", f"{about['world_size']}, backend {about['backend']}"),
            ("Form of a step", about.get("step_form", "plain"))]  # fmt: skip
    if exact := about.get("exact"):
        made.append(("Bit for bit", f"the same on any number of ranks that divides {exact['exact_shards']}"))
    if run.results:
        made.append(("Interruptions", f"{run.results['train']['interruptions']}"))
    if energy:
        source = "estimated from the processor's load" if energy["estimated"] else "measured"
        place = energy["country_iso_code"] or "average of the world"
        made.append(("Energy", f"{energy['kwh']:.3g} kWh {source} by codecarbon, {energy['co2_kg']:.3g} kg CO2 "
                     f"({place}); {energy['kwh_per_1000_pairs']:.3g} kWh for 1,000 training pairs"))  # fmt: skip
        if missing := energy["unmeasured_stretches"]:
            made.append(("Not measured", f"{missing} of the nodes' stretches, so these sums are too low"))
    made += versions(run)
    code = f"{git['commit']}{' with changes that were not committed' if git['dirty'] else ''}" if git else "installed"
    made.append(("Code", Markup("<code>%s</code>") % plain(code)))
    if digest := run.results.get("model_sha256"):
        made.append(("SHA-256 of the weights", Markup("<code>%s</code>") % plain(digest)))
    return made
