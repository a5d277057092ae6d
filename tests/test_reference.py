"""Step-for-step agreement with sentence-transformers' CrossEncoderTrainer, the reference."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, crossrank, losses

STEPS = 50


def reference_losses(model, rows, tmp_path) -> list[float]:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import CrossEntropyLoss

    encoder = CrossEncoder(str(model), num_labels=3)
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "reference"), per_device_train_batch_size=64, num_train_epochs=1, seed=42,
        warmup_steps=0.1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        max_grad_norm=1.0,
    )  # fmt: skip
    data = Dataset.from_list(rows).select_columns(["premise", "hypothesis", "label"])
    trainer = CrossEncoderTrainer(model=encoder, args=arguments, train_dataset=data, loss=CrossEntropyLoss(encoder))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_losses_agree_with_the_reference_trainer(tmp_path):
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertForSequenceClassification

    from trainer.data.builtin import make_tokenizer, pairs

    tokenizer = make_tokenizer()
    real = SHARED / "data" / "allnli" / "train_first3000_hub_order.parquet"
    table = pq.read_table(real) if real.exists() else pa.Table.from_pylist(pairs("train")[:3000])
    table = table.take(list(range(3000)) + list(range(64 * STEPS - 3000)))
    data = tmp_path / "train.parquet"
    pq.write_table(table, data)
    # Letters and words of the built-in tokenizer serve as well as any: what counts is real text of real lengths.
    tokenizer.model_max_length = 256
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    model = tmp_path / "model"
    BertForSequenceClassification(config).save_pretrained(model)
    tokenizer.save_pretrained(model)

    crossrank("train", "--recipe", "allnli-100k", "--model_name_or_path", model, "--train_file", data, "--dropout", "0",
              "--bf16", "false", "--logging_steps", "1", "--eval_on_start", "false", "--eval_strategy", "no",
              "--output_dir", tmp_path / "ours")  # fmt: skip
    ours, theirs = losses(tmp_path / "ours"), reference_losses(model, table.to_pylist(), tmp_path)
    assert len(ours) == len(theirs) == STEPS
    assert np.allclose(ours, theirs, rtol=1e-4, atol=0)
