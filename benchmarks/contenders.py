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

import numpy as np
import torch

from benchmarks import common

F1 = ("f1_macro", "f1_micro", "f1_weighted")


def peak_memory() -> dict[str, float]:
    """Of this process, in MB: resident memory, and what torch allocated on the GPU."""
    peak = {"peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if torch.cuda.is_available():
        peak["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return peak


def speed(windows: list[tuple[int, int, float]]) -> dict[str, float]:
    """Of (samples, tokens, seconds) windows but for the first, which warms up."""
    samples, tokens, seconds = (sum(column) for column in zip(*windows[1:], strict=True))
    return {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}


def crossrank_config(options: argparse.Namespace, folder: Path) -> Any:
    from trainer.base.environment import set_libraries
    from trainer.cli import parse_train

    set_libraries()

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
    fields = {name: options.data / f"{split}.parquet" for name, split in files.items()} | {
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


def sentence_transformers_recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same run by the reference trainer, with its own evaluator."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    def evaluator(split: str, num_pairs: int | None) -> CrossEncoderClassificationEvaluator:
        data = Dataset.from_parquet(str(options.data / f"{split}.parquet"))
        data = data.select(range(min(len(data), num_pairs or len(data))))
        pairs = list(zip(data["premise"], data["hypothesis"], strict=True))
        return CrossEncoderClassificationEvaluator(pairs, list(data["label"]), name=split, batch_size=options.batch)

    limits = dict(text.split("=") for text in options.more)
    num_train, num_dev, num_test = (
        int(limits[name]) if name in limits else default
        for name, default in (("max_train_samples", 100_000), ("max_eval_samples", 1000), ("max_test_samples", None))
    )
    started = time.perf_counter()
    encoder, data = CrossEncoder(str(options.model), num_labels=3), training_rows(options).select(range(num_train))
    dev, test = evaluator("dev", num_dev), evaluator("test", num_test)
    arguments = CrossEncoderTrainingArguments(
        **arguments_of(options, folder) | {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 100},
        eval_strategy="steps", eval_steps=500, eval_on_start=True,
    )  # fmt: skip
    loss = CrossEntropyLoss(encoder)
    trainer = CrossEncoderTrainer(model=encoder, args=arguments, train_dataset=data, loss=loss, evaluator=dev)
    trained = trainer.train().metrics
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=options.bf16):
        scores = {"AllNLI-dev": dev(encoder), "AllNLI-test": test(encoder)}
    return {
        "total_seconds": time.perf_counter() - started,
        "train_and_evaluation_seconds": trained["train_runtime"],
        "scores": {
            split: {name: float(found[f"{split.rpartition('-')[2]}_{name}"]) for name in F1}
            for split, found in scores.items()
        },
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "dev_f1_macro": [
            (entry["step"], entry["eval_dev_f1_macro"])
            for entry in trainer.state.log_history
            if "eval_dev_f1_macro" in entry
        ],
    }


def training_rows(options: argparse.Namespace) -> Any:
    from datasets import Dataset

    data = Dataset.from_parquet(str(options.data / "train.parquet"))
    # The rows that crossrank trains on: those of the recipe that have a label.
    return data.select(range(min(len(data), 100_000))).select_columns(["premise", "hypothesis", "label"])


def arguments_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": options.batch, "seed": options.seed,
        "bf16": options.bf16, "max_steps": options.steps, "warmup_steps": 0.1, "learning_rate": 5e-5,
        "logging_steps": options.window,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def stopwatch() -> Any:
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.times.append(time.perf_counter())

    return Stopwatch()


def timed(trainer: Any, watch: Any, options: argparse.Namespace, tokens_per_pair: float) -> dict[str, Any]:
    trainer.train()
    pairs = options.batch * options.window
    return speed([(pairs, pairs * tokens_per_pair, float(s)) for s in np.diff(watch.times)]) | {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    }


def sentence_transformers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    encoder, data = CrossEncoder(str(options.model), num_labels=3), training_rows(options)
    arguments = CrossEncoderTrainingArguments(**arguments_of(options, folder))
    trainer = CrossEncoderTrainer(model=encoder, args=arguments, train_dataset=data, loss=CrossEntropyLoss(encoder))
    watch = stopwatch()
    trainer.add_callback(watch)
    sample = data[:2000]
    lengths = encoder.tokenizer(sample["premise"], sample["hypothesis"])["input_ids"]
    return timed(trainer, watch, options, float(np.mean([len(ids) for ids in lengths])))


def transformers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokenised beforehand, outside the timing; batches of like length by its own length-grouped sampler."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )
    from transformers.trainer_pt_utils import LengthGroupedSampler

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = training_rows(options).map(
        lambda rows: tokenizer(rows["premise"], rows["hypothesis"], truncation=True),
        batched=True, remove_columns=["premise", "hypothesis"], desc="tokenising",
    )  # fmt: skip
    lengths = [len(ids) for ids in data["input_ids"]]

    class Grouped(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return LengthGroupedSampler(
                options.batch, lengths=lengths, generator=torch.Generator().manual_seed(options.seed)
            )

    watch = stopwatch()
    trainer = Grouped(
        model=AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=3),
        args=TrainingArguments(**arguments_of(options, folder)),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[watch],
    )
    return timed(trainer, watch, options, float(np.mean(lengths)))


def crossrank_evaluation(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from trainer import ranks
    from trainer.config import DataConfig
    from trainer.data.load import load_pairs
    from trainer.evaluate import predict_logits
    from trainer.predict import InferenceConfig, Predictor

    predictor = Predictor(str(options.model), InferenceConfig(bf16=options.bf16), ranks.start(600))
    files = DataConfig(test_file=str(options.data / "test.parquet"), max_test_samples=options.pairs)
    (pairs,) = load_pairs(files, "test", predictor.label_names)
    started = time.perf_counter()
    tokens = predictor.tokens(pairs, cache=None)  # the reference tokenises inside its evaluation, too
    logits = predict_logits(predictor.model, pairs, tokens, predictor.world, 64, options.bf16)
    seconds = time.perf_counter() - started
    return {"samples_per_second": len(pairs) / seconds, "accuracy": float((logits.argmax(1) == pairs.label).mean())}


def sentence_transformers_evaluation(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Its evaluator's own call: sorted by length; here with batches of 64, where its default is 32."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder

    data = Dataset.from_parquet(str(options.data / "test.parquet")).select(range(options.pairs))
    encoder = CrossEncoder(str(options.model), device=None if torch.cuda.is_available() else "cpu")
    pairs = list(zip(data["premise"], data["hypothesis"], strict=True))
    started = time.perf_counter()
    with torch.autocast(encoder.device.type, torch.bfloat16, enabled=options.bf16):
        logits = encoder.predict(pairs, batch_size=64, show_progress_bar=False)
    seconds = time.perf_counter() - started
    labels = np.array(data["label"])
    return {"samples_per_second": len(pairs) / seconds, "accuracy": float((logits.argmax(1) == labels).mean())}


CONTENDERS = {
    f.__name__: f
    for f in (
        crossrank,
        sentence_transformers,
        transformers,
        crossrank_evaluation,
        sentence_transformers_evaluation,
        crossrank_recipe,
        sentence_transformers_recipe,
    )
}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("name", choices=CONTENDERS)
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
    common.limit_memory(chosen.memory_gib)
    with tempfile.TemporaryDirectory() as folder:
        result = CONTENDERS[chosen.name](chosen, Path(folder) / "run")
        if result:
            print(json.dumps(result | peak_memory()), flush=True)


if __name__ == "__main__":
    main()
