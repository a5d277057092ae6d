"""The models whose steps are counted in the tests: tiny in width, which no count depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.fakecuda.steps import NAMES, counted_evaluation, counted_step, drawn_lengths, examined, split_of
from trainer.cli import parse_train
from trainer.config import Config
from trainer.data.tokens import Split
from trainer.model.cross_encoder import CrossEncoder

VOCABULARY = 200
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 130, "pad_token_id": 0,
}  # fmt: skip
ROBERTA = TINY | {"max_position_embeddings": 132, "pad_token_id": 1, "type_vocab_size": 1}
SPECIAL = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
V3 = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
# Model type and shape.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "distilroberta": ("roberta", ROBERTA | {"num_hidden_layers": 6}),
    "bert": ("bert", TINY),
    "distilbert": ("distilbert", {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "deberta-v2": ("deberta-v2", TINY | V3),
    "modernbert": ("modernbert", TINY | {"classifier_pooling": "mean"} | dict.fromkeys(SPECIAL, 1)),
    "roformer": ("roformer", TINY),  # no family that is known: padded, with its own attention
}


def options(**fields: Any) -> Config:
    """Of the reference recipe, without what comes between steps."""
    quiet = {
        "recipe": "allnli-100k", "train_batch_size": 64, "max_steps": 1000, "logging_steps": 10**6,
        "eval_strategy": "no", "eval_on_start": "false", "save_strategy": "no", "load_best_model_at_end": "false",
        "track_emissions": "false", "write_report": "false",
    }  # fmt: skip
    return parse_train([f"--{name}={value}" for name, value in (quiet | fields).items()])


def classifier(kind: str, shape: dict[str, Any]) -> Any:
    """A transformers classifier of this shape, with random weights."""
    config = AutoConfig.for_model(kind, num_labels=len(NAMES), **shape)
    return AutoModelForSequenceClassification.from_config(config)


def count_case(name: str) -> dict[str, Any]:
    """{"plain": ..., "static": ..., "kernels": ..., "evaluation": ...} of one of CASES, as Counted.to_json gives it.

    No static step of a model that runs padded. "others": bert's with kernels, on 61 other pairs of the shape.
    """
    kind, shape = CASES[name]
    lengths = drawn_lengths()
    config, split = options(), split_of(lengths, VOCABULARY)
    others = split_of(np.concatenate([lengths[:58] + 1, lengths[58:61]]), VOCABULARY)

    def encoder(split: Split = split) -> CrossEncoder:
        model = CrossEncoder(classifier(kind, shape), config.attn_implementation, config.unpad)
        return examined(model, config, split)

    forms = ["plain", "static", "kernels"] if encoder().layout else ["plain"]
    counted = {form: counted_step(encoder(), config, split, form).to_json() for form in forms}
    if name == "bert":
        counted["others"] = counted_step(encoder(others), config, others, "kernels").to_json()
    return counted | {"evaluation": counted_evaluation(encoder(), config, split).to_json()}
