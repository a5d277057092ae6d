"""What steps of ever new lengths leave in a CPU's memory, by how many kernels oneDNN and torch's layer above it keep.

    python -m benchmarks.leftover [--steps 41] [--pairs 8]

MiniLM trains on random tokens, on one thread, in processes of their own: in bf16 and fp32, with as many lengths as
steps and with one. Kernels are bounded by the variables of trainer/base/environment.py; 1,024 each is the libraries'
default. Printed is the growth of resident memory after the sixth step, in MB. About two minutes of CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import common

FIRST = 6  # steps, after which a heap has most of what it will hold


def resident() -> int:
    """Bytes, by the kernel."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def worker(bf16: bool, varied: bool, steps: int, pairs: int) -> int:
    """Bytes that resident memory grows by."""
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = common.model_folder("minilm", Path())
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    random, lengths = np.random.default_rng(0), np.arange(steps) + 44 if varied else np.full(steps, 64)
    before = 0
    for step, length in enumerate(random.permutation(lengths), 1):
        ids = torch.from_numpy(random.integers(1000, 20000, (pairs, length)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == FIRST:
            before = resident()
    return resident() - before


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=41)
    options.add_argument("--pairs", type=int, default=8)
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        number, lengths = chosen.worker
        print(worker(number == "bf16", lengths == "varied", chosen.steps, chosen.pairs))
        return
    capacities = {"1,024": ("1024", "1024"), "oneDNN's 128": ("128", "1024"), "both 128": ("128", "128")}
    print(f"| | {' | '.join(capacities)} |\n|{'---|' * (1 + len(capacities))}")
    for number, lengths in (("bf16", "varied"), ("bf16", "one"), ("fp32", "varied")):
        grown = []
        for below, above in capacities.values():
            command = [sys.executable, "-m", "benchmarks.leftover", "--worker", number, lengths,
                       "--steps", str(chosen.steps), "--pairs", str(chosen.pairs)]  # fmt: skip
            env = os.environ | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": below, "LRU_CACHE_CAPACITY": above}
            env |= {"OMP_NUM_THREADS": "1"}
            result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=common.ROOT, check=True)
            grown.append(int(result.stdout.split()[-1]) / 1e6)
        print(f"| {number}, {lengths} | {' | '.join(f'{own:+.0f} MB' for own in grown)} |", flush=True)


if __name__ == "__main__":
    main()
