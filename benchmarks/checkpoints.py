"""What a checkpoint costs: how long a save holds up the loop, how long it takes to write, and to resume from.

    python -m benchmarks.checkpoints [--model minilm] [--bf16 false]

Steps alternate with steps that begin with a save. The stall is the time in the loop's own call; writing continues in a
thread beside the steps after it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import common
from benchmarks.contenders import crossrank_config


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--saves", type=int, default=5)
    options.add_argument("--gap", type=int, default=3, help="steps from one save to the next")
    chosen = options.parse_args()
    from trainer import ranks
    from trainer.train import prepare

    steps = chosen.saves * chosen.gap
    run = argparse.Namespace(
        model=common.model_folder(chosen.model, chosen.tokenizer), data=chosen.data, batch=chosen.batch,
        bf16=chosen.bf16, steps=steps + 2, window=1000, seed=42, more=["save_total_limit=2"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(crossrank_config(run, Path(folder) / "run"), ranks.start(600))
        trainer.model.train()
        seconds: dict[str, list[float]] = {"stall": [], "step while writing": [], "step": [], "write": []}
        for current in trainer.sampler.steps():
            started = time.perf_counter()
            for rows in trainer.plain.micro_batches(current):
                trainer.plain.backward(current, rows, last=True)
            trainer.backend.step(1e-5, 1.0)
            if current.step < 2:
                continue
            after_save = current.step > 2 and (current.step - 2) % chosen.gap == 0
            seconds["step while writing" if after_save else "step"].append(time.perf_counter() - started)
            if (current.step - 1) % chosen.gap == 0:
                trainer.output.checkpoints.wait()
                started = time.perf_counter()
                trainer.state.step = current.step + 1
                trainer.save()
                seconds["stall"].append(time.perf_counter() - started)
            elif after_save:
                trainer.output.checkpoints.wait()
                seconds["write"].append(time.perf_counter() - started)
        trainer.output.checkpoints.wait()
        started = time.perf_counter()
        checkpoint = trainer.output.checkpoints.newest()
        assert checkpoint is not None
        verified = time.perf_counter()
        trainer.backend.load_state(checkpoint.tensors, checkpoint.state["num_updates"])
        loaded = time.perf_counter()
        size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "median_seconds": medians,
        "seconds": seconds,
        "verify_and_read_seconds": verified - started,
        "load_seconds": loaded - verified,
        "checkpoint_mb": size / 1e6,
    }
    for name, value in medians.items():
        print(f"{name:<20} {1e3 * value:8.0f} ms")
    print(f"verify and read {verified - started:.2f} s, load {loaded - verified:.2f} s, {size / 1e6:.0f} MB")
    common.save(f"checkpoints-{chosen.model.split('/')[-1]}-{'bf16' if chosen.bf16 else 'fp32'}", chosen, result)


if __name__ == "__main__":
    main()
