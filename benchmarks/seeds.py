"""The full reference run by crossrank and by sentence-transformers, over several seeds: F1, loss curves, a table.

    python -m benchmarks.seeds [--seeds 42 43 44] [--trainers crossrank] [--model minilm]

One result file a run, from which table and plot are made. A run whose file is there is not repeated, so it can be
interrupted, or shared out among processes; on two cores with MiniLM each run takes a quarter of an hour. On the way
sentence-transformers evaluates in fp32, crossrank in the run's own numbers; the final scores are in the same ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks import common
from trainer.report.markdown import table

TRAINERS = ("crossrank", "sentence_transformers")
COLOURS = dict(zip(TRAINERS, ("#4878a8", "#c8823c"), strict=True))


def summary(runs: dict[str, dict[int, Any]]) -> str:
    """A Markdown table: a row a run, and one with the means of each trainer."""
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    last = max(set.intersection(*(set(dict(run["losses"])) for run in every)))
    scores = [(split, name) for split, of_split in every[0]["scores"].items() for name in of_split]
    rows = []
    for trainer, by_seed in runs.items():
        values = {
            f"{trainer}, seed {seed}": [*(run["scores"][s][n] for s, n in scores), dict(run["losses"])[last]]
            for seed, run in by_seed.items()
        }
        values[f"{trainer}, mean"] = [statistics.mean(column) for column in zip(*values.values(), strict=True)]
        rows += [[name, *(f"{value:.4f}" for value in row)] for name, row in values.items()]
    return table(["", *map(" ".join, scores), f"loss at step {last:,}"], rows)


def plot(runs: dict[str, dict[int, Any]], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for trainer, by_seed in runs.items():
        for number, run in enumerate(by_seed.values()):
            look = {"color": COLOURS[trainer], "alpha": 0.8, "label": trainer if number == 0 else None}
            left.plot(*zip(*run["losses"], strict=True), **look)
            right.plot(*zip(*run["dev_f1_macro"], strict=True), marker="o", **look)
    left.set(xlabel="step", ylabel="training loss, mean of 100 steps")
    right.set(xlabel="step", ylabel="dev F1 macro")
    left.legend()
    figure.savefig(path, dpi=120)
    print(f"written to {path}")


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(model="minilm")
    options.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    options.add_argument("--trainers", choices=TRAINERS, nargs="+", default=list(TRAINERS))
    chosen = options.parse_args()
    model = common.model_folder(chosen.model, chosen.tokenizer)
    name = f"{chosen.model.split('/')[-1]}-{'bf16' if chosen.bf16 else 'fp32'}"
    for seed in chosen.seeds:
        for trainer in chosen.trainers:
            own = f"recipe-{name}-{trainer}-{seed}"
            if (chosen.results / f"{own}.json").exists():
                continue
            settings = ["--model", model, "--data", chosen.data, "--batch", chosen.batch, "--bf16", chosen.bf16]
            result = common.run_json("benchmarks.contenders", f"{trainer}_recipe", *settings, "--seed", seed)
            stated = vars(chosen) | {"name": None, "seeds": [seed], "trainers": [trainer]}
            common.save(own, argparse.Namespace(**stated), result)
    runs: dict[str, dict[int, Any]] = {trainer: {} for trainer in TRAINERS}
    for seed in chosen.seeds:
        files = {trainer: chosen.results / f"recipe-{name}-{trainer}-{seed}.json" for trainer in TRAINERS}
        if not all(file.exists() for file in files.values()):
            continue  # a mean is over the same seeds for both
        for trainer, file in files.items():
            runs[trainer][seed] = json.loads(file.read_text())
            if runs[trainer][seed]["settings"]["batch"] != chosen.batch:
                sys.exit(f"{file} is of another batch size; choose another folder for --results")
    if not runs["crossrank"]:
        return
    print(summary(runs))
    plot(runs, chosen.results / f"recipe-{name}.png")


if __name__ == "__main__":
    main()
