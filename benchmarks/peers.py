"""What crossrank is measured beside: the trainers of sentence-transformers and transformers. See contenders.py."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import F1, speed


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


def sentence_transformers_recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The same run by the reference trainer, with its own evaluator."""
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    def evaluator(split: str, num_pairs: int) -> CrossEncoderClassificationEvaluator:
        data = Dataset.from_parquet(str(options.data / f"{split}.parquet"))
        data = data.select(range(min(len(data), num_pairs or len(data))))
        pairs = [*map(list, zip(data["premise"], data["hypothesis"], strict=True))]
        return CrossEncoderClassificationEvaluator(pairs, list(data["label"]), name=split, batch_size=options.batch)

    limits = dict(text.split("=") for text in options.more)
    num_train, num_dev, num_test = (
        int(limits[name]) if name in limits else default
        for name, default in (("max_train_samples", 100_000), ("max_eval_samples", 1000), ("max_test_samples", 0))
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
