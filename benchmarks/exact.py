"""What the same bits on any number of ranks cost: the time of a step and the bytes sent, beside ddp.

    python -m benchmarks.exact [--model minilm] [--ranks 1 2] [--shards 1 2 4 8]

Alternating runs of the recipe's steps on CPU ranks of one thread each, over gloo. What a rank sends is read from the
kernel's counter of the loopback device, so nothing else should talk there (`unshare --net sh -c 'ip link set lo up;
...'`, as root). By formula a rank sends 8 (ranks - 1) / ranks bytes a trained parameter and step, as a ring does.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.backends import sent_bytes
from trainer.base.environment import set_libraries


def worker(argv: list[str]) -> None:
    """One rank: whole steps of the recipe; rank 0 prints what was measured."""
    set_libraries()  # before torch is loaded, as the command line does
    from benchmarks.contenders import crossrank_config, parser
    from trainer import ranks
    from trainer.run.pins import pinned
    from trainer.train import prepare

    options = parser().parse_args(["crossrank", *argv])
    with tempfile.TemporaryDirectory() as folder:
        world, config = ranks.start(600), crossrank_config(options, Path(folder) / "run")
        seconds, sent = [], 0
        with pinned(config, world):
            trainer = prepare(config, world)
            trainer.model.train()
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            for current in trainer.sampler.steps():
                world.barrier()
                started, before = time.perf_counter(), sent_bytes()
                trainer.plain(current, 1e-5)
                world.barrier()
                seconds.append(time.perf_counter() - started)
                sent = sent_bytes() - before
            trainer.output.close()
        ranks.stop()
    if world.is_main:
        measured = {
            "milliseconds": 1000 * statistics.median(seconds[3:]),
            "sent_bytes_per_parameter": sent / trained / world.size,
        }
        print(json.dumps(measured), flush=True)


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(model="minilm")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--steps", type=int, default=13, help="of which the first three are not timed")
    chosen = options.parse_args()
    model = common.model_folder(chosen.model, chosen.tokenizer)
    settings = ["--model", model, "--data", chosen.data, "--batch", chosen.batch, "--bf16", chosen.bf16]
    settings += ["--steps", chosen.steps]
    contenders = {
        (ranks, shards): [f"exact_shards={shards}"] if shards else []
        for ranks in chosen.ranks
        for shards in (0, *chosen.shards)
        if shards % ranks == 0
    }
    runs: dict[tuple[int, int], list[dict[str, Any]]] = {key: [] for key in contenders}
    for number in range(chosen.rounds):
        for (ranks, shards), more in contenders.items():
            arguments = ["--worker", *settings, "--more", *more]
            measured = common.run_json("benchmarks.exact", *arguments, ranks=ranks, env={"OMP_NUM_THREADS": "1"})
            runs[ranks, shards].append(measured)
            shown = ", ".join(f"{key} {value:.2f}" for key, value in measured.items())
            print(f"round {number + 1}, {ranks} rank(s), {name_of(ranks, shards)}: {shown}", flush=True)
    table = {f"{ranks} ranks, {name_of(ranks, shards)}": row(runs, ranks, shards) for ranks, shards in runs}
    for name, found in table.items():
        print(f"{name:<24} {found['milliseconds']:8.0f} ms a step, {found['time']['ratio']:.2f} times, sends "
              f"{found['sent_bytes_per_parameter']:.2f} bytes a parameter")  # fmt: skip
    named = {f"{ranks} ranks, {name_of(ranks, shards)}": own for (ranks, shards), own in runs.items()}
    precision = "bf16" if chosen.bf16 else "fp32"
    common.save(f"exact-{chosen.model.split('/')[-1]}-{precision}", chosen, {"table": table, "runs": named})


def name_of(ranks: int, shards: int) -> str:
    return f"{shards} shards" if shards else "ddp" if ranks > 1 else "single"


def row(runs: dict[tuple[int, int], list[dict[str, Any]]], ranks: int, shards: int) -> dict[str, Any]:
    """One line of the table; `time` is relative to ddp, or single, on as many ranks."""
    own = runs[ranks, shards]
    return {
        "milliseconds": common.median(own, "milliseconds"),
        "time": common.ratio(own, runs[ranks, 0], "milliseconds"),
        "sent_bytes_per_parameter": common.median(own, "sent_bytes_per_parameter"),
    }


if __name__ == "__main__":
    worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
