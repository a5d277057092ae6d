"""The backends side by side: speed, what a rank keeps, and what it sends.

    python -m benchmarks.backends [--ranks 2] [--model minilm] [--bf16 false]

Alternating runs on CPU ranks of one thread each, over gloo. What a rank keeps is the bytes of every tensor alive
between the backward pass and the optimizer's step: weights, gradients, moments. What it sends is read from the kernel's
counter of the loopback device, so nothing else should talk there (`unshare --net sh -c 'ip link set lo up; ...'`, as
root).

The formulas are those of Rajbhandari et al. 2020 (ZeRO), for weights, gradients and two moments in fp32.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from trainer.base.environment import set_libraries

BACKENDS = {
    "ddp": [],
    "ddp, bf16 gradients": ["ddp_comm_hook=bf16"],
    "fsdp": ["backend=fsdp"],
    **{name: [f"deepspeed={name}"] for name in ("zero0", "zero1", "zero2", "zero3")},
}


def bytes_by_formula(name: str, ranks: int) -> float:
    """Bytes a parameter and rank: 4 of weights, 4 of gradients, 8 of moments, each in full or sharded."""
    full = {"zero1": 8, "zero2": 4, "zero3": 0, "fsdp": 0}.get(name, 16)
    return full + (16 - full) / ranks


def tensor_bytes() -> int:
    """Of every storage that a tensor of this process refers to."""
    import torch

    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                local = getattr(tensor, "_local_tensor", tensor)
                if local is not None and local.device.type != "meta":
                    storage = local.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def sent_bytes() -> int:
    """That have gone through the loopback device since it is there."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def worker(argv: list[str]) -> None:
    """One rank: steps of the recipe on one backend; rank 0 prints what was measured."""
    set_libraries()  # before torch is loaded, as the command line does
    from benchmarks.contenders import crossrank_config, parser
    from trainer import ranks
    from trainer.train import prepare

    options = parser().parse_args(["crossrank", *argv])
    with tempfile.TemporaryDirectory() as folder:
        world = ranks.start(600)
        trainer = prepare(crossrank_config(options, Path(folder) / "run"), world)
        trainer.model.train()
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
        seconds, kept, sent = [], 0, 0
        for current in trainer.sampler.steps():
            world.barrier()
            started, before = time.perf_counter(), sent_bytes()
            for rows in trainer.plain.micro_batches(current):
                trainer.plain.backward(current, rows, last=True)
            if current.step == 2:
                kept = tensor_bytes()
            trainer.backend.step(1e-5, 1.0)
            world.barrier()
            seconds.append(time.perf_counter() - started)
            sent = sent_bytes() - before
        ranks.stop()
    if world.is_main:
        measured = {
            "samples_per_second": options.batch / statistics.median(seconds[3:]),
            "bytes_per_parameter": kept / num_parameters,
            "sent_bytes_per_parameter": sent / num_parameters / world.size,
        }
        print(json.dumps(measured), flush=True)


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--steps", type=int, default=10)
    chosen = options.parse_args()
    model = common.model_folder(chosen.model, chosen.tokenizer)
    settings = ["--model", model, "--data", chosen.data, "--batch", chosen.batch, "--bf16", chosen.bf16]
    settings += ["--steps", chosen.steps]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    for number in range(chosen.rounds):
        for name, more in BACKENDS.items():
            arguments = ["--worker", *settings, "--more", *more]
            env = {"OMP_NUM_THREADS": "1"}
            runs[name].append(common.run_json("benchmarks.backends", *arguments, ranks=chosen.ranks, env=env))
            shown = ", ".join(f"{key} {value:.2f}" for key, value in runs[name][-1].items())
            print(f"round {number + 1}, {name}: {shown}", flush=True)
    table: dict[str, dict[str, Any]] = {
        name: {
            "to_ddp": common.ratio(runs[name], runs["ddp"], "samples_per_second"),
            "bytes_per_parameter": common.median(runs[name], "bytes_per_parameter"),
            "bytes_by_formula": bytes_by_formula(name, chosen.ranks),
            "sent_bytes_per_parameter": common.median(runs[name], "sent_bytes_per_parameter"),
        }
        for name in BACKENDS
    }
    for name, row in table.items():
        kept, formula, sent = (row[k] for k in ("bytes_per_parameter", "bytes_by_formula", "sent_bytes_per_parameter"))
        print(f"{name:<20} {row['to_ddp']['ratio']:.2f} x ddp; bytes a parameter: keeps {kept:.2f} (formula "
              f"{formula:.2f}), sends {sent:.2f} a step")  # fmt: skip
    name = f"backends-{chosen.ranks}-{chosen.model.split('/')[-1]}-{'bf16' if chosen.bf16 else 'fp32'}"
    common.save(name, chosen, {"table": table, "runs": runs})


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
