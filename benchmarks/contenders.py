"""One run of one trainer: crossrank, sentence-transformers' CrossEncoderTrainer, or transformers' Trainer.

    python -m benchmarks.contenders NAME --model FOLDER --data FOLDER [--steps N] ...

The last line of its output is a JSON object. All contenders start from the same folder, train on the same pairs with
the same seed, batch size and schedule, and are timed in the same way: from one log event, which waits for the device,
to another.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from trainer.base.environment import set_libraries

F1 = ("f1_macro", "f1_micro", "f1_weighted")


def peak_memory() -> dict[str, float]:
    """Of this process, in MB: resident memory, and what torch allocated on the GPU."""
    import torch

    peak = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def speed(windows: list[tuple[int, int, float]]) -> dict[str, float]:
    """Of (samples, tokens, seconds) windows but for the first, which warms up."""
    samples, tokens, seconds = (sum(column) for column in zip(*windows[1:], strict=True))
    return {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}


def crossrank_config(options: argparse.Namespace, folder: Path) -> Any:
    from trainer.cli import parse_train

    fields = {
        "seed": options.seed,
        "recipe": "allnli-100k", "model_name_or_path": options.model, "train_file": options.data / "train.parquet",
        "train_batch_size": options.batch, "bf16": str(options.bf16).lower(), "max_steps": options.steps,
        "logging_steps": options.window, "eval_strategy": "no", "eval_on_start": "false", "output_dir": folder,
        "track_emissions": "false", "write_report": "false",
    }  # fmt: skip
    more = [f"--{text}" for text in options.more]
    return parse_train([f"--{name}={value}" for name, value in fields.items()] + more)


def crossrank(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from trainer import ranks
    from trainer.model.precision import products
    from trainer.train import prepare, settle_step

    config = crossrank_config(options, folder)
    world = ranks.start(600)
    trainer = prepare(config, world)
    settle_step(trainer)
    with products(world.device, config.bf16):
        trainer.loop()
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if world.is_main else []
    # From rates back to seconds: every window has the same number of pairs, but not of tokens.
    pairs = options.batch * options.window
    seconds = [pairs / event["samples_per_second"] for event in events]
    tokens = [event["tokens_per_second"] * s for event, s in zip(events, seconds, strict=True)]
    form = trainer.state.step_form
    # The model goes before the ranks part: between hosts, gloo's end would wait for a peer that has left.
    del trainer
    gc.collect()
    ranks.stop()
    if not world.is_main:
        return {}
    return speed([(pairs, t, s) for t, s in zip(tokens, seconds, strict=True)]) | {
        "losses": [event["loss"] for event in events],
        "step_form": form,
    }


def crossrank_recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The reference run from the folder of an encoder to results.json: tokens, training, evaluations, energy.

    `total_seconds` compares with another trainer's; it holds a second evaluation in fp32, which others do not make.
    """
    from trainer.cli import parse_train
    from trainer.train import train

    os.environ["CROSSRANK_CACHE"] = str(folder / "cache")  # tokens made anew, as the others have to
    files = {"train_file": "train", "validation_file": "dev", "test_file": "test"}
    fields = {
        name: f"AllNLI={options.data / f'{split}.parquet'}" for name, split in files.items()
    } | {
        "recipe": "allnli-100k", "model_name_or_path": options.model, "train_batch_size": options.batch,
        "bf16": str(options.bf16).lower(), "seed": options.seed, "output_dir": folder / "run", "write_report": "false",
    }  # fmt: skip
    more = [f"--{text}" for text in options.more]
    started = time.perf_counter()
    results = train(parse_train([*(f"--{name}={value}" for name, value in fields.items()), *more]))
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "total_seconds": time.perf_counter() - started,
        "train_seconds": results["train"]["seconds"],
        "samples_per_second": results["train"]["samples_per_second"],
        "kwh": results["energy"]["kwh"] if results["energy"] else None,
        "scores": {split: {name: scores[name] for name in F1} for split, scores in results["metrics"].items()},
        "losses": [(event["step"], event["loss"]) for event in events if event["event"] == "train"],
        "dev_f1_macro": [
            (event["step"], event["f1_macro"])
            for event in events
            if event["event"] == "eval" and event["split"] == "AllNLI-dev"
        ],
    }


def crossrank_evaluation(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from trainer import ranks
    from trainer.config import DataConfig
    from trainer.data.load import load_pairs
    from trainer.data.tokenize import in_memory
    from trainer.evaluate import predict_logits
    from trainer.predict import InferenceConfig, Predictor

    predictor = Predictor(str(options.model), InferenceConfig(bf16=options.bf16), ranks.start(600))
    files = DataConfig(test_file=[str(options.data / "test.parquet")], max_test_samples=options.pairs)
    (pairs,) = load_pairs(files, "test", predictor.label_names)
    started = time.perf_counter()
    tokens = in_memory(pairs, predictor.encoder)  # the reference tokenises inside its evaluation, too
    logits = predict_logits(predictor.model, pairs, tokens, predictor.world, 64, options.bf16)
    seconds = time.perf_counter() - started
    assert logits is not None
    return {"samples_per_second": len(pairs) / seconds, "accuracy": float((logits.argmax(1) == pairs.label).mean())}


CONTENDERS = {own.__name__: own for own in (crossrank, crossrank_evaluation, crossrank_recipe)}
PEERS = ("sentence_transformers", "transformers", "sentence_transformers_evaluation", "sentence_transformers_recipe")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", choices=[*CONTENDERS, *PEERS])
    options.add_argument("--model", type=Path, required=True)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--bf16", type=lambda text: text == "True", default=True)
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--window", type=int, default=3, help="steps between log events")
    options.add_argument("--pairs", type=int, default=2000, help="of an evaluation")
    options.add_argument("--seed", type=int, default=42)
    options.add_argument("--memory-gib", type=float, default=None, help="what the GPU may use; None = all it has")
    options.add_argument("--more", nargs="*", default=[], help="further options of crossrank train, without dashes")
    return options


def main() -> None:
    chosen = parser().parse_args()
    contenders = CONTENDERS
    if chosen.name in PEERS:
        from benchmarks import peers

        contenders = {name: getattr(peers, name) for name in PEERS}
    else:
        set_libraries()
    common.limit_memory(chosen.memory_gib)
    with tempfile.TemporaryDirectory() as folder:
        result = contenders[chosen.name](chosen, Path(folder) / "run")
        if result:
            print(json.dumps(result | peak_memory()), flush=True)


if __name__ == "__main__":
    main()
