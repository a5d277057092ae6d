"""A loaded model's calls against sentence-transformers' CrossEncoder.predict, alternating in one process.

    python -m benchmarks.load_predict [--model minilm] [--sizes 1,32,1000] [--rounds 15]

Both load the same folder, a classifier of three classes, and are given the same new pairs in each round, ours first in
one and theirs in the next. Times are wall time of a call, from texts to probabilities on the host, in fp32.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.versus import with_classes

Call = Callable[[list[tuple[str, str]]], np.ndarray]


def seconds(call: Call, pairs: list[tuple[str, str]]) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    scores = call(pairs)
    return time.perf_counter() - started, scores


def compare(ours: Call, theirs: Call, texts: list[tuple[str, str]], size: int, rounds: int) -> dict[str, Any]:
    """Medians of calls with `size` pairs, which are others in each round, and the medians' ratio."""
    times: dict[str, list[float]] = {"crossrank": [], "sentence_transformers": []}
    largest = 0.0
    for number in range(rounds + 1):
        start = number * size % (len(texts) - size + 1)
        pairs, results = texts[start : start + size], {}
        contenders = [("crossrank", ours), ("sentence_transformers", theirs)]
        for name, call in contenders if number % 2 else reversed(contenders):
            taken, results[name] = seconds(call, pairs)
            if number:  # the first round warms up
                times[name].append(taken)
        largest = max(largest, float(np.abs(results["crossrank"] - results["sentence_transformers"]).max()))
    medians = {name: statistics.median(own) for name, own in times.items()}
    ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
    return {
        "pairs": size,
        "median_ms": {name: 1000 * value for name, value in medians.items()},
        "ratio": medians["crossrank"] / medians["sentence_transformers"],
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "largest_difference": largest,
    }


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(model="minilm", rounds=15, bf16=False)
    options.add_argument("--sizes", default="1,32,1000", help="pairs in a call")
    options.add_argument("--theirs", type=int, default=32, help="pairs in a forward of sentence-transformers")
    chosen = options.parse_args()

    from pyarrow import parquet
    from sentence_transformers import CrossEncoder

    import crossrank

    folder = with_classes(common.model_folder(chosen.model, chosen.tokenizer))
    rows = parquet.read_table(chosen.data / "test.parquet").slice(0, 19000)
    texts = list(zip(rows["premise"].to_pylist(), rows["hypothesis"].to_pylist(), strict=True))
    model, encoder = crossrank.load(folder), CrossEncoder(str(folder))

    def theirs(pairs: list[tuple[str, str]]) -> np.ndarray:
        return encoder.predict(pairs, batch_size=chosen.theirs, apply_softmax=True, show_progress_bar=False)

    gc.collect()
    gc.freeze()
    results = []
    for size in map(int, chosen.sizes.split(",")):
        rounds = chosen.rounds * (10 if size < 10 else 3 if size < 100 else 1)
        results.append(compare(model.predict, theirs, texts, size, rounds))
        shown = ", ".join(f"{name} {value:.2f} ms" for name, value in results[-1]["median_ms"].items())
        low, high = results[-1]["quartiles"]
        print(f"{size} pairs: {shown}, ratio {results[-1]['ratio']:.2f} (half of the rounds {low:.2f} to {high:.2f})",
              flush=True)  # fmt: skip
    common.save(f"calls-vs-sentence_transformers-{chosen.model.split('/')[-1]}-fp32", chosen, {"calls": results})


if __name__ == "__main__":
    main()
