"""What `crossrank plan` says beside what a run then takes: seconds a step, and the peak of resident memory of a rank.

    python -m benchmarks.plan [--rounds 1] [--shapes minilm distilroberta deberta-v3-small] [--rates 1gbit 100mbit]

Each shape, unpadded and padded, is measured once by `plan --measure` on 1 and 2 ranks of one thread, and then run: on 1
and 2 ranks, unpadded also on 4 and (as root) between two hosts whose network is throttled. Measuring and running
alternate, so that what drifts on the machine meets both. Runs are of 60 steps, since memory still grows for as long,
most of all padded. About 25 minutes on two quiet cores. The goals are 10 % in time and 5 % in memory; the table is made
for docs/plan.md.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common, two_hosts

ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def options_of(chosen: Any, shape: str, unpad: bool, steps: int) -> list[str]:
    """Of crossrank train and plan."""
    model = common.model_folder(shape, chosen.tokenizer)
    fields = {
        "recipe": "allnli-100k", "model_name_or_path": model, "train_file": chosen.data / "train.parquet",
        "max_train_samples": 8000, "train_batch_size": chosen.batch, "bf16": str(chosen.bf16).lower(), "unpad": unpad,
        "max_steps": steps, "eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no",
        "track_emissions": "false", "write_report": "false", "logging_steps": 1000,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in fields.items()]


def worker(argv: list[str]) -> None:
    """One rank of a run; rank 0 prints the mean seconds of its steps after the first quarter, and the most memory."""
    from trainer.base.environment import set_libraries

    set_libraries()
    import numpy as np

    from trainer import ranks
    from trainer.cli import parse_train
    from trainer.train import prepare, settle_step

    with tempfile.TemporaryDirectory() as folder:
        config = parse_train([*argv, f"--output_dir={folder}/run"])
        world = ranks.start(600)
        trainer = prepare(config, world)
        settle_step(trainer)
        trainer.model.train()
        seconds = []
        for current in trainer.sampler.steps():
            world.barrier()
            started = time.perf_counter()
            trainer.take(current, 1e-5)
            trainer.preemption.check()
            seconds.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peaks = world.gather(np.array([peak]))
        del trainer
        ranks.stop()
    if peaks is not None:
        timed = seconds[len(seconds) // 4 :]
        print(json.dumps({"seconds": statistics.mean(timed), "peak": int(peaks.max())}), flush=True)


def planned(options: list[str], device: Path, ranks: int, rate: str | None, measure: bool = False) -> dict[str, Any]:
    """The plan, as JSON."""
    more = ["--json", "--measure" if measure else "--device", str(device)]
    more += ["--nodes", "2", "--link", rate.replace("mbit", "Mbit").replace("gbit", "Gbit")] if rate else [
        "--gpus_per_node", str(ranks)]  # fmt: skip
    command = [sys.executable, "-m", "crossrank", "plan", *options, *more]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=common.ROOT)
    if not result.stdout.startswith("{"):
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def environment() -> dict[str, str]:
    return os.environ | ENV | {"PYTHONPATH": str(common.ROOT)}


def between_hosts(options: list[str], rate: str) -> dict[str, Any]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29500", "--rdzv-id", "plan", "-m", "benchmarks.plan",
             "--worker", *options]  # fmt: skip
    with two_hosts.TwoHosts(rate) as hosts:
        results = hosts.run([start, start], environment())
    if any(result.returncode for result in results):
        sys.exit("\n".join(result.stdout for result in results))
    (line,) = (line for result in results for line in result.stdout.splitlines() if line.startswith("{"))
    measured: dict[str, Any] = json.loads(line)
    return measured


def row(name: str, plan: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted, measured, and by how much of the measured the plan is off."""
    seconds, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak"))
    made = {"name": name, "planned_seconds": plan["step"]["seconds"], "seconds": seconds,
            "planned_bytes": plan["memory"]["total"], "bytes": peak}  # fmt: skip
    return made | {
        "time_error": made["planned_seconds"] / seconds - 1,
        "memory_error": made["planned_bytes"] / peak - 1,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| | step planned | measured | off | memory planned | measured | off |", "|---|---|---|---|---|---|---|"]
    for own in rows:
        lines.append(
            f"| {own['name']} | {1e3 * own['planned_seconds']:.0f} ms | {1e3 * own['seconds']:.0f} ms | "
            f"{own['time_error']:+.0%} | {own['planned_bytes'] / 1e9:.2f} GB | {own['bytes'] / 1e9:.2f} GB | "
            f"{own['memory_error']:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__)
    parser.set_defaults(rounds=1, batch=16)
    parser.add_argument("--shapes", nargs="+", default=["minilm", "distilroberta", "deberta-v3-small"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument(
        "--rates", nargs="*", default=["1gbit", "100mbit"], help="as tc writes them; of the first shape"
    )
    parser.add_argument("--steps", type=int, default=60, help="of a run; the first quarter is not timed")
    chosen = parser.parse_args()
    cases: dict[str, tuple[str, bool, int, str | None]] = {
        f"{shape}, {'unpadded' if unpad else 'padded'}, {ranks} rank(s)": (shape, unpad, ranks, None)
        for shape in chosen.shapes for unpad in (True, False) for ranks in (chosen.ranks if unpad else chosen.ranks[:2])
    }  # fmt: skip
    if reason := two_hosts.missing():
        print(f"no throttled links: {reason}")
    else:
        for rate in chosen.rates:
            cases[f"{chosen.shapes[0]}, two hosts, {rate}"] = (chosen.shapes[0], True, 2, rate)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    plans: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(chosen.rounds):
            measured: set[Path] = set()
            for name, (shape, unpad, ranks, rate) in cases.items():
                device = Path(folder) / f"{shape}-{unpad}.yaml"
                options = options_of(chosen, shape, unpad, chosen.steps)
                if device not in measured:
                    planned(options, device, 2, None, measure=True)
                    measured.add(device)
                plans[name] = planned(options, device, ranks, rate)
                runs[name].append(
                    between_hosts(options, rate) if rate else
                    common.run_json("benchmarks.plan", "--worker", *options, ranks=ranks, env=ENV)
                )  # fmt: skip
                print(
                    f"round {number + 1}, {markdown([row(name, plans[name], runs[name])]).splitlines()[-1]}", flush=True
                )
    rows = [row(name, plans[name], own) for name, own in runs.items()]
    print(markdown(rows))
    for key, goal in (("time_error", 0.1), ("memory_error", 0.05)):
        errors = [abs(own[key]) for own in rows]
        print(f"{key}: median {statistics.median(errors):.1%}, largest {max(errors):.1%}; goal {goal:.0%}")
    parts = {name: {part: plan[part] for part in ("memory", "step")} for name, plan in plans.items()}
    common.save("plan", chosen, {"rows": rows, "runs": runs, "plans": parts})


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
