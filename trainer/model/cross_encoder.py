"""The cross-encoder: a transformers sequence classifier fed with batches of pairs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.config import ModelConfig, UserError, first_line
from trainer.data import builtin
from trainer.data.tokens import Tokens
from trainer.files import sync
from trainer.model.attention import Layout, adopt
from trainer.model.batch import Batch, assemble
from trainer.model.embedding import UsedRows

VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


class CrossEncoder(nn.Module):
    """Scores of the classes for each pair of a batch.

    `layout` is None where the model's family is unknown: it then runs as it is, and its dropout masks come from torch's
    stream, which is seeded by (seed, step, rank).
    """

    def __init__(self, model: Any, attn_implementation: str | None = None, unpad: bool = True) -> None:
        super().__init__()
        self.model = model
        self.layout: Layout | None = None
        self.note = ""  # for the user, where the model runs padded unasked
        if attn_implementation is None:
            self.layout, self.note = adopt(model, unpad)
        self.takes_types = getattr(model.config, "type_vocab_size", 0) > 1
        self.first_position = _first_position(model)
        self.num_classes: int = model.config.num_labels
        self.padding = model.config.pad_token_id or 0

    def set_unused_rows_aside(self, tokens: Tokens) -> None:
        """Before training on `tokens` without weight decay: see vocabulary.UsedRows."""
        table = self.model.get_input_embeddings() if self.layout else None
        if type(table) is not nn.Embedding:
            return
        used = np.zeros(table.num_embeddings, dtype=bool)
        used[tokens.ids] = True
        used[[self.padding, *([] if table.padding_idx is None else [table.padding_idx])]] = True
        if not used.all():
            self.model.set_input_embeddings(UsedRows(table, used))

    @property
    def vocabulary(self) -> tuple[str, UsedRows] | None:
        """Name and table where rows have been set aside. No attribute: it would be a second name of its parameters."""
        return next(((name, m) for name, m in self.model.named_modules() if isinstance(m, UsedRows)), None)

    def whole(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`weights` of the model with the rows that have been set aside; {} stays so."""
        return self._with_table(weights, UsedRows.widen)

    def used(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `whole`."""
        return self._with_table(weights, UsedRows.narrow)

    def _with_table(
        self, weights: dict[str, torch.Tensor], change: Callable[[UsedRows, torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if not weights or self.vocabulary is None:
            return weights
        name, table = self.vocabulary
        return weights | {f"{name}.weight": change(table, weights[f"{name}.weight"])}

    def batch(self, tokens: Tokens, labels: np.ndarray, rows: np.ndarray, device: torch.device, **keys: int) -> Batch:
        """The batch of data set rows `rows` in the layout that suits model and device; see batch.assemble."""
        # On a CPU time goes into arithmetic, which small groups save; on a GPU into launches, of which each group has
        # as many as a whole batch.
        likeness = 0.8 if self.layout and self.layout.unpad and device.type == "cpu" else 0.0
        return assemble(tokens, labels, rows, device, **keys, likeness=likeness)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (pairs, classes), in the order of the batch."""
        layout = self.layout or Layout(unpad=False)
        layout.set(batch)
        if layout.unpad:
            inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None] + self.first_position}
            types = batch.types[None]
        else:
            (ids,) = layout.split(layout.pad(batch.ids, filler=self.padding))
            (mask,) = layout.split(layout.pad(torch.ones_like(batch.ids)))
            (types,) = layout.split(layout.pad(batch.types))
            inputs = {"input_ids": ids, "attention_mask": mask}
        if self.takes_types:
            inputs["token_type_ids"] = types
        return self.model(**inputs).logits


def compile_layers(model: CrossEncoder) -> None:
    """Compiles what is computed for every token: the feed-forward, dense and norm modules of each layer.

    They are the leaves that hold weights. Attention and dropout, which depend on the batch's layout, stay as they are.
    """
    for module in model.modules():
        if type(module).__name__.endswith(("Intermediate", "FFN", "MLP")):
            module.compile(dynamic=True)


def _first_position(model: Any) -> int:
    """The position of a pair's first token: 0, or in RoBERTa's kind the padding token's number + 1."""
    positions = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else padding + 1


def longest_input(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """The longest pair in tokens. Raises UserError where `max_length` is more than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    limit = int(1e9) if limit is None else limit - _first_position(model)
    if max_length is not None and max_length > limit:
        raise UserError(f"max_length {max_length} is more than the {limit} positions that the model has")
    if max_length is not None and max_length < 5:
        raise UserError(f"max_length {max_length} leaves no room for two texts and their special tokens")
    return max_length or min(limit, tokenizer.model_max_length)


def load_tokenizer(config: ModelConfig) -> Any:
    """Raises UserError where the folder or the hub has no tokenizer."""
    from transformers import AutoTokenizer

    name = config.model_name_or_path

    def load() -> Any:
        # Without its files transformers makes a tokenizer of nothing but special tokens, in silence.
        if Path(name).is_dir() and not any(file for kind in VOCABULARIES for file in Path(name).glob(kind)):
            raise ValueError(f"none of {', '.join(VOCABULARIES)}")
        return AutoTokenizer.from_pretrained(name, **_hub_options(config))

    return _explained(load, name, "tokenizer", "put the tokenizer's files beside config.json")


def load_for_training(config: ModelConfig, label_names: Sequence[str], seed: int) -> tuple[Any, Any]:
    """(transformers model, tokenizer) to start from, in fp32; new weights are drawn from `seed`."""
    from transformers import AutoModelForSequenceClassification

    name = config.model_name_or_path
    if name == "builtin":
        settings, tokenizer = builtin.make_config(), builtin.make_tokenizer()
    else:
        settings, tokenizer = _load_settings(config), load_tokenizer(config)
    old_names = [settings.id2label[i] for i in range(settings.num_labels)]
    settings.num_labels = len(label_names)
    settings.id2label = dict(enumerate(label_names))
    settings.label2id = {label: i for i, label in enumerate(label_names)}
    settings.problem_type = "single_label_classification"
    _set_dropout(settings, config.dropout)
    if config.attn_implementation is not None:
        settings._attn_implementation = config.attn_implementation
    try:
        if name == "builtin":
            return builtin.make_model(settings, seed), tokenizer
        torch.manual_seed(seed)
        if config.init == "random":
            model = AutoModelForSequenceClassification.from_config(settings, trust_remote_code=config.trust_remote_code)
            return model.float(), tokenizer
    except (ValueError, ImportError) as error:
        raise UserError(f"{name}: transformers cannot make this model ({first_line(error)})") from None
    model, new = _load_weights(config, settings)
    if strange := [weight for weight in new if not HEAD.search(weight)]:
        raise UserError(f"{name}: its weights lack {len(strange)} tensors of the encoder, such as {strange[0]}")
    if sorted(old_names) == sorted(label_names) and old_names != list(label_names):
        _reorder_classes(model, [old_names.index(label) for label in label_names])
    return model, tokenizer


def load_trained(config: ModelConfig) -> tuple[Any, Any, list[str]]:
    """(transformers model, tokenizer, class names) of a trained model's folder. Raises UserError if it has no head."""
    path = Path(config.model_name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        hint = f"; {path / 'model'} is one" if (path / "model" / "config.json").is_file() else ""
        raise UserError(f"{path} is not a model folder: it has no config.json{hint}")
    settings = _load_settings(config)
    model, new = _load_weights(config, settings)
    if settings.num_labels < 2:
        raise UserError(f"{path} has one output, a score; crossrank needs a classifier of two classes or more")
    if new:
        raise UserError(f"{path} is no trained classifier: its weights lack {', '.join(new[:3])}; train it first")
    return model, load_tokenizer(config), [settings.id2label[i] for i in range(settings.num_labels)]


# What a classifier has beyond its encoder; drawn anew where an encoder alone is given.
HEAD = re.compile(r"^(classifier|pre_classifier|score|head|.*\.pooler)\.")


def _load_settings(config: ModelConfig) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # its table of new weights is the classifier's head, which is what training is for
    logging.disable_progress_bar()
    return _explained(
        lambda: AutoConfig.from_pretrained(config.model_name_or_path, **_hub_options(config)),
        config.model_name_or_path,
        "model",
        "a model folder holds a config.json",
    )


def _load_weights(config: ModelConfig, settings: Any) -> tuple[Any, list[str]]:
    """The classifier in fp32, and the names of its weights that were not in the folder in this shape."""
    from transformers import AutoModelForSequenceClassification

    name = config.model_name_or_path
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = _explained(
        lambda: AutoModelForSequenceClassification.from_pretrained(
            name, config=settings, **options, **_hub_options(config)
        ),
        name,
        "weights",
        "for a model of this shape with new weights say --init random",
    )
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    return model, sorted({*info["missing_keys"], *mismatched})


def _hub_options(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}


def _reorder_classes(model: Any, order: list[int]) -> None:
    """Gives the last layer's classes another order, so that a trained head keeps its meaning."""
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[order])


def save_trained(model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, max_length: int, folder: Path) -> None:
    """Writes a folder that transformers and sentence_transformers.CrossEncoder load; replaces an older one whole."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(temporary)
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)
    sync(folder.parent)


def _set_dropout(settings: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    for name, value in settings.to_dict().items():
        if "dropout" in name and (value is None or isinstance(value, (int, float))):
            setattr(settings, name, dropout)


def _explained(load: Callable[[], Any], name: str, what: str, fix: str) -> Any:
    """load(), or one UserError that says what is missing where, and what to do."""
    try:
        return load()
    except Exception as error:  # damaged files surface as any kind of error in four libraries
        reason = first_line(error)
    if Path(name).is_dir():
        raise UserError(f"{name} has no {what} that can be loaded ({reason}); {fix}")
    if name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such folder")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    raise UserError(
        f"{what} of {name!r} could not be loaded from the hub{offline} ({reason}). Without network, give a local "
        f"folder in its place"
    )
