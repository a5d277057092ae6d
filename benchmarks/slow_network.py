"""What a slow network between two hosts costs, and what helps: bf16 gradients, and fewer, larger steps.

    python -m benchmarks.slow_network [--rates 1gbit 100mbit]      (as root)

Two hosts in network namespaces, one rank of one thread each, alternating runs. Four times the batch, accumulated in
four forwards, sends gradients a fourth as often; it is another run, of course.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from benchmarks import common, two_hosts

# (batches in a step, options of crossrank train)
WAYS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, []),
    "bf16 gradients": (1, ["ddp_comm_hook=bf16"]),
    "4 batches a step": (4, []),
    "both": (4, ["ddp_comm_hook=bf16"]),
}


def measure(settings: list[object], batch: int, more: list[str], rate: str | None) -> dict[str, Any]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29500", "--rdzv-id", "slow"]  # fmt: skip
    command = [*torchrun, "-m", "benchmarks.contenders", "crossrank", *map(str, settings), "--batch", str(batch),
               "--more", "per_device_train_batch_size=32", *more]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(common.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with two_hosts.TwoHosts(rate) as hosts:
        results = hosts.run([command, command], env)
    if any(result.returncode for result in results):
        sys.exit("\n".join(result.stdout for result in results))
    (line,) = (line for result in results for line in result.stdout.splitlines() if line.startswith("{"))
    measured: dict[str, Any] = json.loads(line)
    return measured


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(model="minilm")
    options.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"], help="as tc writes them")
    options.add_argument("--steps", type=int, default=8, help="of 64 pairs; the first quarter is not timed")
    chosen = options.parse_args()
    if reason := two_hosts.missing():
        sys.exit(reason)
    model = common.model_folder(chosen.model, chosen.tokenizer)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number in range(chosen.rounds):
        for rate in [None, *chosen.rates]:
            for way, (factor, more) in WAYS.items():
                # Two steps, at the least, after one that is not timed.
                steps = max(3, chosen.steps // factor)
                settings: list[object] = ["--model", model, "--data", chosen.data, "--bf16", chosen.bf16]
                settings += ["--steps", steps, "--window", max(1, steps // 4)]
                key = f"{rate or 'no limit'}, {way}"
                runs.setdefault(key, []).append(measure(settings, chosen.batch * factor, more, rate))
                print(f"round {number + 1}, {key}: {runs[key][-1]['samples_per_second']:.1f} samples/s", flush=True)
    first = next(iter(runs))
    table = {key: common.ratio(runs[key], runs[first], "samples_per_second") for key in runs}
    for key, ratio in table.items():
        print(f"{key} / {first}: {ratio['ratio']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    common.save(f"slow-network-{chosen.model.split('/')[-1]}", chosen, {"to_first": table, "runs": runs})


if __name__ == "__main__":
    main()
