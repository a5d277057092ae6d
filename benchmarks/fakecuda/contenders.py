"""One step of each trainer on the same real pairs, counted.

crossrank's is `Trainer.loop`; the others' is their own `train()`, of the released packages, with the model, loss,
collator, optimizer and checks that they take by default: fused AdamW, clipping to 1, bf16 by autocast, SDPA attention,
the loss looked at for NaN in every step. sentence-transformers tokenises inside its loss, padding to the longest pair.

Not theirs: no step is logged (each log line would read the loss once more), and batches are not pinned by a thread,
which has no part in the count.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from datasets import Dataset
from torch import nn

from benchmarks.fakecuda.cases import options
from benchmarks.fakecuda.device import to_fake_cuda
from benchmarks.fakecuda.steps import NAMES, WARM, counted_evaluation, counted_step, examined, last_of


def rows(settings: argparse.Namespace) -> Dataset:
    """The pairs of the one batch."""
    data = Dataset.from_parquet(str(settings.data / "train.parquet")).select(range(settings.batch))
    return data.select_columns(["premise", "hypothesis", "label"])


def crossrank(settings: argparse.Namespace, folder: Path, form: str = "kernels") -> dict[str, Any]:
    from trainer.data.load import load_splits
    from trainer.data.tokenize import in_memory
    from trainer.data.tokens import Encoder, Split
    from trainer.model.loading import load_for_training

    own = {
        "model_name_or_path": folder,
        "train_file": settings.data / "train.parquet",
        "train_batch_size": settings.batch,
    }
    limits = {"max_train_samples": settings.batch, "validation_file": settings.data / "dev.parquet"}
    config = options(**own, **limits, bf16=str(settings.bf16).lower())
    pairs = load_splits(config)["train"]
    encoder = load_for_training(config, pairs.label_names)
    split = Split("train", pairs, in_memory(pairs, Encoder(encoder.tokenizer, encoder.max_length)))
    encoder = examined(encoder, config, split)
    train = counted_step(encoder, config, split, form).to_json()
    facts = {"tokens": int(split.tokens.lengths.sum()), "longest": int(split.tokens.lengths.max())}
    return {"train": train, "evaluation": counted_evaluation(encoder, config, split).to_json(), **facts}


def arguments_of(settings: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(settings.scratch), "per_device_train_batch_size": settings.batch, "bf16": settings.bf16,
        "max_steps": 100, "logging_steps": 10**6, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def trained(trainer: Callable[[], Any], check: Callable[[], None]) -> None:
    """train() of the trainer that is made, until `check`, which is called after each step, raises Enough."""
    # The model is on the device already, where torch cannot move fake tensors to.
    with mock.patch.object(nn.Module, "to", lambda module, *args, **kwargs: module):
        made = trainer()
        made.add_callback(ended(check))
        made.train()


def ended(check: Callable[[], None]) -> Any:
    """A callback that calls `check` after each step."""
    from transformers import TrainerCallback

    class Ended(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            check()

    return Ended()


def sentence_transformers(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    encoder, data = CrossEncoder(str(folder), num_labels=len(NAMES), device="cpu"), rows(settings)

    def trainer() -> Any:
        arguments = CrossEncoderTrainingArguments(**arguments_of(settings))
        model = to_fake_cuda(encoder)
        return CrossEncoderTrainer(model=model, args=arguments, train_dataset=data, loss=CrossEntropyLoss(model))

    return {"train": last_of(WARM + 1, partial(trained, trainer)).to_json()}


def transformers(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = rows(settings).map(
        lambda pair: tokenizer(pair["premise"], pair["hypothesis"], truncation=True),
        remove_columns=["premise", "hypothesis"],
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(NAMES))

    def trainer() -> Any:
        return Trainer(
            model=to_fake_cuda(model),
            args=TrainingArguments(**arguments_of(settings)),
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
        )

    return {"train": last_of(WARM + 1, partial(trained, trainer)).to_json()}


CONTENDERS: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
    "crossrank": crossrank,
    "crossrank_static": partial(crossrank, form="static"),
    "crossrank_plain": partial(crossrank, form="plain"),
    "sentence_transformers": sentence_transformers,
    "transformers": transformers,
}
