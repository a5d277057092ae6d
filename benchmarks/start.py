"""Time from the command to the first optimizer step, of this checkout and of another one, with all caches warm.

    python -m benchmarks.start --other ../before [--model minilm] [--pairs 100000] [--rounds 5]

Both train on the same pairs with the same interpreter and packages, A B A B, on the CPU, and end in the hook that torch
calls after an optimizer's first step. Processor seconds and, where strace is installed, calls of the file system are
those of the whole process and of what it has started; the others are of a process without strace.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, median, model_folder, parser, ratio, save

CALLS = "openat,open,stat,lstat,newfstatat,statx,access,faccessat2,readlink,getdents64,read"
# The hook is set when the step's module is about to be imported, so that nothing else is imported for its sake.
CHILD = """
import os, sys
class Arm:
    def find_spec(self, name, path=None, target=None):
        if name == "trainer.step.plain":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.meta_path.insert(0, Arm())
import crossrank
crossrank.main()
"""


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    """Of a run up to its first step, whose output goes into `folder`."""
    data = ["--recipe", "demo"]
    if options.model != "demo":
        model = model_folder(options.model, options.tokenizer)
        data = [f"--model_name_or_path={model}", f"--train_file={options.data / 'train.parquet'}",
                f"--max_train_samples={options.pairs}"]  # fmt: skip
    emissions = ["--track_emissions", str(options.emissions).lower()]
    return [sys.executable, "-c", CHILD, "train", *data, *emissions, "--output_dir", str(folder)]


def environment(checkout: Path, cache: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "CROSSRANK_CACHE": str(cache)}


def first_step(options: argparse.Namespace, checkout: Path, cache: Path) -> dict[str, float]:
    """Wall and processor seconds of one start."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = subprocess.Popen(command(options, Path(folder) / "run"), env=environment(checkout, cache),
                                   cwd=checkout, stderr=subprocess.DEVNULL)  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
    if process.returncode != 0:
        sys.exit(f"{checkout}: the run ended with {process.returncode} before its first step")
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime}


def file_calls(options: argparse.Namespace, checkout: Path, cache: Path) -> int | None:
    """None where there is no strace."""
    if shutil.which("strace") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts"
        trace = ["strace", "-f", "-c", "-o", str(counts), "-e", f"trace={CALLS}"]
        subprocess.run([*trace, *command(options, Path(folder) / "run")], env=environment(checkout, cache), check=True,
                       cwd=checkout, stderr=subprocess.DEVNULL)  # fmt: skip
        total = re.search(r"^100\.00\s+\S+\s+\S+\s+(\d+)", counts.read_text().splitlines()[-1])
        assert total
        return int(total[1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--other", type=Path, required=True, help="another checkout of crossrank, such as main's")
    options.add_argument("--pairs", type=int, default=100_000)
    options.add_argument("--emissions", type=lambda text: text == "true", default=True, help="true or false")
    options.set_defaults(model="minilm", rounds=5)
    settings = options.parse_args()
    contenders = {"other": settings.other.resolve(), "crossrank": ROOT}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as caches:
        for number in range(settings.rounds + 1):  # the first one fills the caches
            for name, checkout in contenders.items():
                measured = first_step(settings, checkout, Path(caches) / name)
                if number:
                    results[name].append(measured)
                    print(
                        f"round {number}, {name}: " + ", ".join(f"{k} {v:.2f}" for k, v in measured.items()), flush=True
                    )
        calls = {name: file_calls(settings, checkout, Path(caches) / name) for name, checkout in contenders.items()}
    print(f"{'':10} {'seconds':>8} {'cpu seconds':>12} {'file calls':>11}")
    for name, own in results.items():
        print(f"{name:10} {median(own, 'seconds'):8.2f} {median(own, 'cpu_seconds'):12.2f} {calls[name] or '-':>11}")
    ratios = {key: ratio(results["crossrank"], results["other"], key) for key in ("seconds", "cpu_seconds")}
    name = f"start-{Path(settings.model).name}"
    save(name, settings, {"runs": results, "file_calls": calls, "ratios": ratios})


if __name__ == "__main__":
    main()
