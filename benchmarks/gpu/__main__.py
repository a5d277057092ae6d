"""Everything that there is to measure on a GPU, within ten minutes, without network.

    python -m benchmarks.gpu.pack FOLDER                                 # on a machine with network
    python -m benchmarks.gpu --pack FOLDER --out OUT [--only NAME ...]   # on the one with the GPU

Each stage is a process of its own; one that fails or finds no time left is noted in OUT/summary.json; the others run.
OUT gets summary.json, and results.tar.gz with every JSON file, log and plot. --rehearsal: tiny sizes, on any machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.gpu import pack, predict

RTX_3090_GIB = 24


def stages(shared: Path, minilm: Path, out: Path, tiny: bool) -> dict[str, list[object]]:
    """What is run, most important first: name to `python -m` arguments."""
    sizes: list[object] = ["--results", out]
    model = common.model_folder("distilroberta", shared / "tokenizers" / "roberta-base")
    few = ["max_train_samples=128", "max_eval_samples=32", "max_test_samples=32"] if tiny else []

    enough = [] if tiny else ["max_steps=200"]  # to see the peak of memory

    def recipe(trainer: str, encoder: Path, *more: object) -> list[object]:
        start = ["benchmarks.contenders", f"{trainer}_recipe", "--model", encoder, "--data", shared / "data" / "allnli"]
        return [*start, "--more", "country_iso_code=FRA", *few, *more]

    steps = ["--steps", 4, "--window", 1, "--batch", 8, "--rounds", 1] if tiny else ["--steps", 150, "--window", 50]
    pairs = ["--pairs", 64, "--rounds", 1] if tiny else ["--pairs", 19_656]
    short = ["--steps", 2, "--batch", 8] if tiny else ["--steps", 30]
    batches = [4, 8] if tiny else [16, 64, 256, 1024, 4096]
    shapes = ["distilroberta"] if tiny else ["distilroberta", "roberta-large", "deberta-v3-large"]
    return {
        "tests": ["pytest", "-m", "gpu", "-p", "no:cacheprovider", common.ROOT / "tests" / "gpu"],
        "recipe": recipe("crossrank", model),
        "recipe-sentence_transformers": recipe("sentence_transformers", model),
        "training": ["benchmarks.vs_sentence_transformers", *sizes, *steps],
        "forms": ["benchmarks.forms", *sizes, *steps],
        **({} if tiny else {"kernels": ["benchmarks.kernels", *sizes, "--types", "bf16"]}),
        "roofline": ["benchmarks.roofline", *sizes, *short],
        "recipe-24GiB": [*recipe("crossrank", model, *enough), "--memory-gib", RTX_3090_GIB],
        "recipe-minilm": recipe("crossrank", minilm),
        "batches": ["benchmarks.batches", *sizes, "--batches", *batches, "--steps", 4 if tiny else 40],
        "largest": ["benchmarks.batches", *sizes, "--largest", *shapes, "--memory-gib", RTX_3090_GIB,
                    *(["--limit", 8] if tiny else [])],
        "transformers": ["benchmarks.vs_transformers", *sizes, *steps],
        "evaluation": ["benchmarks.vs_sentence_transformers", "--what", "evaluation", *sizes, *pairs],
        "recipe-minilm-sentence_transformers": recipe("sentence_transformers", minilm),
    }  # fmt: skip


def run(arguments: list[object], env: dict[str, str], log: Path, seconds: float) -> dict[str, Any]:
    """One stage, with what a contender says of itself. After `seconds` it ends, with all that it started."""
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT, env=env,
            cwd=common.ROOT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = None
    said = log.read_text(errors="replace").strip().splitlines()
    results = [json.loads(line) for line in said if line.startswith('{"')]
    return {
        "exit_code": code,
        "seconds": time.perf_counter() - started,
        "last_line": said[-1] if said else "",
        "result": results[-1] if results else None,
    }


def install(wheels: Path, folder: Path) -> None:
    """Beside the machine's own packages, which stay as they are."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if found:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(folder), *found], check=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pack", type=Path, required=True, help="folder that benchmarks.gpu.pack made")
    options.add_argument("--out", type=Path, required=True, help="folder for the results")
    options.add_argument("--only", nargs="+", default=None, help="only these stages")
    options.add_argument("--minutes", type=float, default=9.5, help="after which no stage continues")
    options.add_argument("--rehearsal", action="store_true", help="tiny sizes, also without a GPU")
    chosen = options.parse_args()
    deadline = time.monotonic() + 60 * chosen.minutes
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="crossrank-gpu-") as name:
        work = Path(name)
        if not chosen.rehearsal:
            install(chosen.pack / "wheels", work / "site")
        path = os.pathsep.join([str(common.ROOT), str(work / "site"), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
                            "CROSSRANK_SHARED": str(chosen.pack.resolve())}  # fmt: skip
        if chosen.rehearsal:
            env["CROSSRANK_GPU_TESTS_ON"] = "cpu"
        sys.path.insert(1, str(work / "site"))
        pack.unpack_minilm(chosen.pack, work / "minilm")
        table = stages(chosen.pack.resolve(), work / "minilm", work / "out", chosen.rehearsal)
        if unknown := set(chosen.only or table) - set(table):
            sys.exit(f"no such stage: {', '.join(unknown)}; there are {', '.join(table)}")
        (work / "out").mkdir()
        summary: dict[str, Any] = {"machine": common.machine(), "stages": {}}
        for stage, arguments in table.items():
            if chosen.only and stage not in chosen.only:
                continue
            # The tests come first, and leave two thirds of the time to the rest.
            left = min(deadline - time.monotonic(), 20 * chosen.minutes if stage == "tests" else math.inf)
            found: dict[str, Any] = {"skipped": "no time was left"}
            if left > 0:
                found = run(arguments, env, work / "out" / f"{stage}.log", left)
            summary["stages"][stage] = found
            print(f"{stage}: {found}", flush=True)
            summary["rtx_3090"] = predict.rtx_3090(work / "out")
            (chosen.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            shutil.make_archive(str(chosen.out / "results"), "gztar", work / "out")
    failed = [stage for stage, found in summary["stages"].items() if found.get("exit_code") != 0]
    sys.exit(f"not done: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
