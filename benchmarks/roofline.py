"""Where the time of a training step goes, and how much of this device's matrix-product peak it reaches.

    python -m benchmarks.roofline [--bf16 false] [--model minilm]

The peak is measured in the same run. Only FLOPs that are needed count: of real tokens, and in the last layer of what
reaches the classifier. A backward has twice the FLOPs of its forward.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.contenders import crossrank_config

WARM_UP = 10  # steps; on a CPU the heap grows as long as a step needs more memory than any before
WAITS = ("aten::item", "aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device, number: torch.dtype) -> float:
    """FLOP/s of a (2048, 768) x (768, 3072) product, the shape of a feed-forward; the fastest of 20 on a CPU.

    On a GPU such a product is shorter than its launch: there it is (8192, 8192) x (8192, 8192), ten in a row.
    """
    rows, inner, columns, repeats = (2048, 768, 3072, 1) if device.type == "cpu" else (8192, 8192, 8192, 10)
    a, b = (torch.randn(*shape, device=device, dtype=number) for shape in ((rows, inner), (inner, columns)))
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return repeats * 2 * rows * inner * columns / min(seconds)


def needed_flops(config: Any, lengths: np.ndarray) -> float:
    """Of a step on pairs of `lengths` tokens: 2 a multiply-add, times 3 for forward and backward."""
    lengths = lengths.astype(np.int64)  # small integers, whose squares would not fit
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, pairs = float(lengths.sum()), len(lengths)
    layer = tokens * (4 * hidden**2 + 2 * hidden * wide) + 2 * hidden * float((lengths**2).sum())
    last = tokens * 2 * hidden**2 + pairs * (2 * hidden**2 + 2 * hidden * wide) + 2 * hidden * tokens
    head = pairs * hidden**2
    return 3 * 2 * ((layers - 1) * layer + last + head)


def saved_bytes(trainer: Any, tokens: Any, num_pairs: int, bf16: bool) -> int:
    """What the forward of the first pairs of `tokens` keeps for its backward, each storage once, without parameters."""
    from trainer.model.precision import autocast

    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = trainer.world.device
    batch = trainer.model.batch(tokens, np.zeros(num_pairs, np.int64), np.arange(num_pairs), device, seed=1, step=1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(device, bf16):
        logits = trainer.plain.forward(batch)
        del logits
    return sum(saved.values())


def memory(trainer: Any, batch: int, bf16: bool) -> dict[str, float]:
    """Bytes of a training step: weights, gradients and moments, and what a forward of `batch` pairs keeps."""
    from trainer.data.tokens import Tokens

    real = trainer.data["train"].tokens
    longest = trainer.model.max_length
    ids, types = np.full(4 * longest, real.ids[0]), np.arange(4 * longest) % longest >= longest // 2
    wide = Tokens.of(ids, np.arange(5) * longest, types, 0, "")
    return {
        "state": 16 * sum(p.numel() for p in trainer.model.parameters()),
        "activations": saved_bytes(trainer, real, batch, bf16),
        # Pairs do not share anything, so a few of them tell what a batch needs.
        "activations_of_longest": batch / 4 * saved_bytes(trainer, wide, 4, bf16),
    }


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--steps", type=int, default=20, help=f"timed steps, after {WARM_UP} that warm up")
    chosen = options.parse_args()
    from trainer import ranks
    from trainer.model.batch import IGNORED
    from trainer.model.precision import autocast, has_bf16, products
    from trainer.train import prepare

    run = argparse.Namespace(
        model=common.model_folder(chosen.model, chosen.tokenizer), data=chosen.data, batch=chosen.batch,
        bf16=chosen.bf16, steps=chosen.steps + WARM_UP + 1, window=1000, seed=42, more=[],
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()
    trainer = prepare(crossrank_config(run, Path(folder.name) / "run"), ranks.start(600))
    device, tokens, labels = trainer.world.device, trainer.data["train"].tokens, trainer.data["train"].pairs.label
    trainer.model.train()
    times: dict[str, list[float]] = {"data": [], "forward": [], "backward": [], "optimizer": []}
    flops, profile = [], None

    def step(current: Any) -> list[float]:
        marks = [time.perf_counter()]
        batch = trainer.model.batch(tokens, labels, current.rows, device, seed=42, step=current.step)
        marks.append(time.perf_counter())
        with products(device, chosen.bf16):
            with autocast(device, chosen.bf16):
                logits = trainer.plain.forward(batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels, ignore_index=IGNORED)
            wait_for(device)
            marks.append(time.perf_counter())
            trainer.backend.backward(loss)
        wait_for(device)
        marks.append(time.perf_counter())
        trainer.backend.step(1e-5, 1.0)
        wait_for(device)
        return [*marks, time.perf_counter()]

    for current in trainer.sampler.steps():
        if current.step == chosen.steps + WARM_UP:
            with torch.profiler.profile() as profile:
                step(current)
            continue
        marks = step(current)
        if current.step >= WARM_UP:
            flops.append(needed_flops(trainer.model.model.config, tokens.lengths[current.rows]))
            for name, seconds in zip(times, np.diff(marks), strict=True):
                times[name].append(float(seconds))
    bytes_needed = memory(trainer, chosen.batch, chosen.bf16)
    number = torch.bfloat16 if chosen.bf16 and has_bf16(device) else torch.float32
    best = peak(device, number)
    assert profile is not None
    result = report(times, statistics.median(flops), best, profile.key_averages(), bytes_needed)
    name = f"roofline-{chosen.model.split('/')[-1]}-{'bf16' if chosen.bf16 else 'fp32'}"
    plot(result["seconds"], result["operations"], common.save(name, chosen, result).with_suffix(".png"),
         100 * result["reached_fraction"])  # fmt: skip
    folder.cleanup()


def report(
    times: dict[str, list[float]], flops: float, best: float, profiled: Any, bytes_needed: dict[str, float]
) -> dict[str, Any]:
    """Prints and returns what was measured: seconds of a step's parts, its FLOPs, the peak's FLOP/s, the profile."""
    parts = {name: statistics.median(seconds) for name, seconds in times.items()}
    whole = sum(parts.values())
    reached = flops / whole
    rows = sorted(profiled, key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    operations = {row.key: row.self_cpu_time_total / total for row in rows[:20]}
    waits = {row.key: row.count for row in rows if row.key in WAITS}
    print(f"peak {best / 1e9:.0f} GFLOP/s; a step needs {flops / 1e9:.0f} GFLOP and takes {whole:.3f} s: "
          f"{reached / 1e9:.0f} GFLOP/s, {100 * reached / best:.0f} % of the peak")  # fmt: skip
    for name, own in parts.items():
        print(f"  {name:<10} {1e3 * own:8.1f} ms  {100 * own / whole:5.1f} %")
    for name, share in operations.items():
        print(f"  {name:<40} {100 * share:5.1f} %")
    print(f"calls that make the host wait for the device: {waits or 'none'}")
    print("memory of a step: " + ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in bytes_needed.items()))
    return {"peak_flops_per_second": best, "reached_fraction": reached / best, "seconds": parts, "step_flops": flops,
            "operations": operations, "waits": waits, "memory_bytes": bytes_needed}  # fmt: skip


def plot(parts: dict[str, float], operations: dict[str, float], path: Path, percent: float) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print('no plot: pip install "crossrank[bench]"')
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.bar(parts.keys(), [1e3 * seconds for seconds in parts.values()], color="#4878a8")
    left.set(ylabel="ms", title=f"a training step: {percent:.0f} % of the matrix-product peak")
    shown = dict(list(operations.items())[:12])
    right.barh(list(shown)[::-1], [100 * share for share in list(shown.values())[::-1]], color="#4878a8")
    right.set(xlabel="% of the step", title="operations")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
