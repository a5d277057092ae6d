"""More ranks: speed, efficiency, and how evenly tokens are dealt.

    python -m benchmarks.scaling [--bf16 false] [--model minilm] [--ranks 1 2 4]

On a CPU each rank has one thread.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks import common


def imbalance(data: Any, model: Any, batch: int, ranks: int) -> dict[str, float]:
    """Tokens of the busiest rank over the mean, mean over 500 steps: dealt by length, and cut as they come."""
    from transformers import AutoTokenizer

    from trainer.config import DataConfig
    from trainer.data.load import load_pairs
    from trainer.data.sampler import Deal, GlobalBatchSampler
    from trainer.data.tokenize import in_memory
    from trainer.data.tokens import Encoder

    (pairs,) = load_pairs(DataConfig(train_file=[str(data / "train.parquet")], max_train_samples=32_000), "train")
    tokens = in_memory(pairs, Encoder(AutoTokenizer.from_pretrained(model), 512))
    balanced: list[float] = []
    plain: list[float] = []
    for step in GlobalBatchSampler(len(pairs), batch, 42, len(pairs) // batch, "").steps():
        lengths = tokens.lengths[step.rows]
        dealt = Deal(lengths, ranks)
        for parts, kept in (
            (map(dealt.part, range(ranks)), balanced),
            (np.array_split(np.arange(batch), ranks), plain),
        ):
            sums = [lengths[part].sum() for part in parts]
            kept.append(max(sums) / np.mean(sums))
    return {"dealt_by_length": statistics.mean(balanced), "as_they_come": statistics.mean(plain)}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--steps", type=int, default=8)
    chosen = options.parse_args()
    model = common.model_folder(chosen.model, chosen.tokenizer)
    settings = ["crossrank", "--model", model, "--data", chosen.data, "--batch", chosen.batch, "--bf16", chosen.bf16,
                "--steps", chosen.steps, "--window", 2]  # fmt: skip
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in map(str, chosen.ranks)}
    for number in range(chosen.rounds):
        for ranks in chosen.ranks:
            name, one_thread = str(ranks), {"OMP_NUM_THREADS": "1"}
            runs[name].append(common.run_json("benchmarks.contenders", *settings, ranks=ranks, env=one_thread))
            print(f"round {number + 1}, {name}: {runs[name][-1]['samples_per_second']:.1f} samples/s", flush=True)
    first = next(iter(runs))
    result: dict[str, Any] = {"runs": runs, "to_first": {name: common.ratio(runs[name], runs[first],
                              "samples_per_second") for name in runs}}  # fmt: skip
    for name, ratio in result["to_first"].items():
        print(f"{name} / {first}: {ratio['ratio']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    result["imbalance"] = {n: imbalance(chosen.data, model, chosen.batch, n) for n in (2, 4, 8)}
    print("tokens of the busiest rank over the mean:", result["imbalance"])
    common.save(f"scaling-{chosen.model.split('/')[-1]}-{'bf16' if chosen.bf16 else 'fp32'}", chosen, result)


if __name__ == "__main__":
    main()
