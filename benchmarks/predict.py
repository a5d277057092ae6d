"""crossrank predict against sentence-transformers' CrossEncoder.predict, and against the model alone.

    python -m benchmarks.predict [--model minilm] [--rows 20000] [--rounds 3] [--bf16 false]
    python -m benchmarks.predict --memory 20000

All have the same folder, a classifier of three classes, and the same rows, in processes of their own that alternate,
each with the model loaded before the clock runs. `crossrank` is the command from a parquet file to a parquet file;
`sentence_transformers` is CrossEncoder.predict on lists of texts, in batches of the same size, sorted as it does, with
neither file; `model` is a forward over all batches, whose tokens are ready. `--memory N`: the command's peak of memory
at N and at 4 N rows of each format, with a tiny model, so that it is the rows' memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.versus import with_classes
from trainer.base.environment import set_libraries

KINDS = ("parquet", "jsonl", "csv")


def write_rows(path: Path, source: Path, count: int) -> Path:
    """`count` pairs of `source`, from its beginning as often as it takes; one row group, where there are such."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    table = parquet.read_table(source).select(["premise", "hypothesis"])
    table = pa.concat_tables([table] * -(-count // table.num_rows)).slice(0, count)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=count)
    elif path.suffix == ".csv":
        csv.write_csv(table, path)
    else:
        with path.open("w") as file:
            for batch in table.to_batches(10_000):
                file.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    return path


def ours(options: argparse.Namespace) -> float:
    """Seconds of what the command does once its model is loaded."""
    set_libraries()
    from trainer import predict, ranks

    inference = predict.InferenceConfig(bf16=options.bf16, per_device_eval_batch_size=options.batch)
    ready = predict.Predictor(str(options.model), inference, ranks.start(600))
    predict.Predictor = lambda *_: ready  # type: ignore[misc, assignment]
    ready.logits(_texts(options.input, options.batch))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = predict.PredictConfig(input=str(options.input), output=f"{folder}/out.parquet")
        predict.predict_file(str(options.model), config, inference)
    return time.perf_counter() - started


def theirs(options: argparse.Namespace) -> float:
    import torch
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(options.model))
    texts = _texts(options.input)
    pairs = list(zip(texts.premise, texts.hypothesis, strict=True))

    def call(some: list[tuple[str, str]]) -> None:
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=options.bf16):
            encoder.predict(some, batch_size=options.batch, apply_softmax=True, show_progress_bar=False)

    call(pairs[: options.batch])
    started = time.perf_counter()
    call(pairs)
    return time.perf_counter() - started


def alone(options: argparse.Namespace) -> float:
    """Of a forward over all rows, part by part as the command cuts them, from tokens to logits on the host."""
    set_libraries()
    from trainer import ranks
    from trainer.predict import InferenceConfig, Predictor
    from trainer.rows import limits

    inference = InferenceConfig(bf16=options.bf16, per_device_eval_batch_size=options.batch)
    ready = Predictor(str(options.model), inference, ranks.start(600))
    parts = [_texts(options.input, limits.ROWS, start) for start in range(0, options.rows, limits.ROWS)]
    tokens = [ready.feed.tokens(part) for part in parts]
    ready.logits(_texts(options.input, options.batch))
    started = time.perf_counter()
    for part, own in zip(parts, tokens, strict=True):
        ready.scored(part, own)
    return time.perf_counter() - started


def _texts(path: Path, count: int | None = None, start: int = 0) -> Any:
    from pyarrow import parquet

    from trainer.data.given import unlabelled

    return unlabelled(parquet.read_table(path).slice(start, count), str(path), "premise", "hypothesis")


WORK: dict[str, Callable[[argparse.Namespace], float]] = {
    "crossrank": ours,
    "sentence_transformers": theirs,
    "model": alone,
}


def peak(model: Path, given: Path, folder: str) -> float:
    """MiB of the command at the most."""
    out = Path(folder) / f"out{given.suffix}"
    command = [sys.executable, "-m", "crossrank", "predict", str(model), "--input", str(given),
               "--output", str(out)]  # fmt: skip
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(common.ROOT)}
    process = subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        sys.exit(f"{' '.join(command)} failed")
    out.unlink()
    return used.ru_maxrss / 1024


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peaks in MiB by format."""
    from trainer.data.builtin import make_config, make_model, make_tokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(make_config(), seed=42).save_pretrained(model)
        make_tokenizer().save_pretrained(model)
        for kind in KINDS:
            found[kind] = {}
            for count in (options.memory, 4 * options.memory):
                path = write_rows(Path(folder) / f"in.{kind}", options.data / "train.parquet", count)
                found[kind][count] = peak(model, path, folder)
            print(kind, ", ".join(f"{count:,} rows {mib:.0f} MiB" for count, mib in found[kind].items()), flush=True)
    return {"peak_MiB": found}


def speed(options: argparse.Namespace) -> dict[str, Any]:
    model = with_classes(common.model_folder(options.model, options.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / "in.parquet", options.data / "train.parquet", options.rows)
        told = ["--input", path, "--model", model, "--rows", options.rows, "--batch", options.batch, "--bf16",
                str(options.bf16).lower()]  # fmt: skip
        each = {name: ["--run", name, *told] for name in WORK}
        results = common.alternate(each, options.rounds, "benchmarks.predict")
    rates = {name: options.rows / common.median(own, "value") for name, own in results.items()}
    against = {
        name: common.ratio(results[name], results["crossrank"], "value") for name in ("sentence_transformers", "model")
    }
    for name, own in against.items():
        print(f"rows/s of crossrank over {name}: {own['ratio']:.2f} ({own['lowest']:.2f} to {own['highest']:.2f})")
    return {"rows_per_second": rates, "crossrank_over": against, "seconds": results}


def main() -> None:
    options = common.parser(__doc__)
    options.set_defaults(model="minilm", bf16=False)
    options.add_argument("--rows", type=int, default=20_000)
    options.add_argument("--memory", type=int, default=None, help="rows of the smaller file; None = speed")
    options.add_argument("--run", choices=WORK, help=argparse.SUPPRESS)
    options.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.run:
        print(json.dumps({"value": WORK[chosen.run](chosen)}))
        return
    if chosen.memory:
        common.save("predict-memory", chosen, memory(chosen))
    else:
        name = f"predict-{str(chosen.model).split('/')[-1]}-{'bf16' if chosen.bf16 else 'fp32'}"
        common.save(name, chosen, speed(chosen))


if __name__ == "__main__":
    main()
