"""What one training step sends to a GPU, counted without one: crossrank beside sentence-transformers and transformers.

    python -m benchmarks.launches [--model distilroberta|deberta-v3-small|modernbert-base] [--contenders NAME ...]
    python -m benchmarks.launches --shapes          # those of the reference recipe: as many graphs are recorded
    python -m benchmarks.launches --host            # what the host does in a step that is replayed

crossrank's step is what a GPU with Triton captures as a CUDA graph; crossrank_static the same without Triton, and
crossrank_plain the step that both are checked against. Operations as torch dispatches them, on 64 real pairs; see
benchmarks/fakecuda for what is and is not seen, and benchmarks/fakecuda/contenders.py for what is taken of the others.
Each contender has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.fakecuda import library

NAMES = ("crossrank", "crossrank_static", "crossrank_plain", "sentence_transformers", "transformers")


def count(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process."""
    library.load()
    from benchmarks.fakecuda.contenders import CONTENDERS

    folder = common.model_folder(settings.model, settings.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        settings.scratch = Path(scratch)
        return CONTENDERS[name](settings, folder)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: operations by cause, crossrank's order, then what the host does."""
    counts = {name: result["train"] for name, result in results.items()}
    causes = dict.fromkeys(cause for counted in counts.values() for cause in counted["by_cause"])
    lines = [["", *counts], ["---", *(["---:"] * len(counts))]]
    for cause in causes:
        lines.append([cause, *(str(sum(c["by_cause"].get(cause, {}).values())) for c in counts.values())])
    lines.append(["**operations**", *(f"**{counted['operations']}**" for counted in counts.values())])
    lines.append(["host reads", *(str(len(counted["host_reads"])) for counted in counts.values())])
    lines.append(["copies to the device", *(str(len(counted["copies_to_device"])) for counted in counts.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shapes(settings: argparse.Namespace) -> dict[str, Any]:
    """The shapes of an epoch of 100,000 pairs in the recipe's order, most frequent first, and what fills them up."""
    import numpy as np
    from pyarrow import parquet
    from transformers import AutoTokenizer

    from trainer.data.sampler import epoch_order
    from trainer.model.batch import shape_of

    rows = parquet.read_table(settings.data / "train.parquet", columns=["premise", "hypothesis"]).slice(0, 100_000)
    tokenizer = AutoTokenizer.from_pretrained(common.model_folder(settings.model, settings.tokenizer))
    pairs = list(zip(rows["premise"].to_pylist(), rows["hypothesis"].to_pylist(), strict=True))
    lengths = np.array([len(ids) for ids in tokenizer(*map(list, zip(*pairs, strict=True)))["input_ids"]])
    order = epoch_order(len(lengths), 42, 0)
    steps = [lengths[order[i : i + settings.batch]] for i in range(0, len(order), settings.batch)]
    found = Counter(shape_of(step, settings.batch) for step in steps)
    computed = sum(shape.tokens * times for shape, times in found.items())
    listed = [{"tokens": s.tokens, "pairs": s.pairs, "longest": s.longest, "steps": n} for s, n in found.most_common()]
    return {"shapes": listed, "filled_up": computed / int(lengths.sum()) - 1, "longest_pair": int(lengths.max())}


def host(settings: argparse.Namespace) -> dict[str, float]:
    """Microseconds of the host in a static step, median: from the sampler's rows to the copy, one thread; no replay."""
    import numpy as np
    import torch

    from trainer.cli import parse_train
    from trainer.ranks import World
    from trainer.step.static import StaticStep
    from trainer.train import prepare

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "recipe": "allnli-100k", "model_name_or_path": common.model_folder(settings.model, settings.tokenizer),
            "train_file": settings.data / "train.parquet", "max_train_samples": 6400,
            "train_batch_size": settings.batch, "eval_strategy": "no", "eval_on_start": "false",
            "output_dir": Path(folder) / "run", "track_emissions": "false", "write_report": "false",
        }  # fmt: skip
        config = parse_train([f"--{name}={value}" for name, value in fields.items()])
        trainer = prepare(config, World(0, 1, 0, torch.device("cpu")))
        static, taken = StaticStep(trainer.plain, None), []
        static.graphs.run, static.updated = lambda *args: None, True  # type: ignore[method-assign]
        for current in [trainer.sampler.at(number) for number in range(50)] * 10:
            started = time.perf_counter()
            static(current, 1e-5)
            taken.append(1e6 * (time.perf_counter() - started))
        trainer.output.close()
    return {"microseconds": float(np.median(taken)), "lowest_tenth": float(np.quantile(taken, 0.1))}


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("--contenders", nargs="+", choices=NAMES, default=[*NAMES])
    options.add_argument("--count", choices=NAMES, help="count this one in this process, and print JSON")
    options.add_argument("--shapes", action="store_true", help="those of the recipe, in place of a step's operations")
    options.add_argument("--host", action="store_true", help="the host's work in a step that is replayed")
    settings = options.parse_args()
    if settings.host:
        print(work := host(settings))
        common.save(f"host-{settings.model}", settings, work)
        return
    if settings.shapes:
        found = shapes(settings)
        print(*found["shapes"], f"{len(found['shapes'])} shapes, {found['filled_up']:.1%} filled up", sep="\n")
        common.save(f"shapes-{settings.model}", settings, found)
        return
    if settings.count:
        print(json.dumps(count(settings.count, settings)))
        return
    common.model_folder(settings.model, settings.tokenizer)  # once for all
    given = [f"--{name}={getattr(settings, name)}" for name in ("model", "data", "tokenizer", "batch")]
    given.append(f"--bf16={str(settings.bf16).lower()}")
    results = {}
    for name in settings.contenders:
        results[name] = common.run_json("benchmarks.launches", "--count", name, *given)
    print(table(results))
    del settings.count, settings.rounds
    common.save(f"launches-{settings.model}", settings, {"contenders": results})


if __name__ == "__main__":
    main()
