"""The cross-encoder: a transformers sequence classifier fed with batches of pairs, and its tokenizer."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.base.files import replacing
from trainer.data.tokens import Tokens
from trainer.model.attention import Layout, adopt
from trainer.model.batch import Batch, assemble
from trainer.model.embedding import UsedRows


class CrossEncoder(nn.Module):
    """Scores of the classes for each pair of a batch.

    Attributes:
        tokenizer, max_length (longest pair in tokens): what `save` writes beside the model; no forward needs them.
        layout: None where the model's family is unknown: it then runs as it is, and its dropout masks come from torch's
            stream, which is seeded by (seed, step, rank).
        note: for the user, where the model runs padded unasked.
    """

    def __init__(
        self,
        model: Any,
        attn_implementation: str | None = None,
        unpad: bool = True,
        tokenizer: Any = None,
        max_length: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer, self.max_length = tokenizer, max_length
        self.layout: Layout | None = None
        self.note = ""
        if attn_implementation is None:
            self.layout, self.note = adopt(model, unpad)
        self.takes_types = getattr(model.config, "type_vocab_size", 0) > 1
        self.first_position = first_position(model)
        self.num_classes: int = model.config.num_labels
        self.padding = model.config.pad_token_id or 0

    @property
    def label_names(self) -> list[str]:
        return [self.model.config.id2label[i] for i in range(self.num_classes)]

    @property
    def num_parameters(self) -> int:
        """Frozen rows included."""
        frozen = self.used_rows[1].frozen.numel() if self.used_rows else 0
        return frozen + sum(p.numel() for p in self.model.parameters())

    def freeze_unused_rows(self, tokens: Tokens) -> None:
        """Before training on `tokens` without weight decay: see embedding.UsedRows."""
        table = self.model.get_input_embeddings() if self.layout else None
        if type(table) is not nn.Embedding:
            return
        used = np.zeros(table.num_embeddings, dtype=bool)
        used[tokens.ids] = True
        used[[self.padding, *([] if table.padding_idx is None else [table.padding_idx])]] = True
        if not used.all():
            self.model.set_input_embeddings(UsedRows(table, used))

    @property
    def used_rows(self) -> tuple[str, UsedRows] | None:
        """Name and table where rows are frozen. No attribute: it would be a second name of its parameters."""
        return next(((name, m) for name, m in self.model.named_modules() if isinstance(m, UsedRows)), None)

    @property
    def frozen_fingerprint(self) -> str | None:
        """Of the embedding rows that are no parameters, and so in no checkpoint."""
        return self.used_rows[1].fingerprint() if self.used_rows else None

    def with_frozen_rows(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`weights` of the model with the full embedding table; {} stays so."""
        return self._with_table(weights, UsedRows.full)

    def without_frozen_rows(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse."""
        return self._with_table(weights, UsedRows.only_used)

    def _with_table(
        self, weights: dict[str, torch.Tensor], change: Callable[[UsedRows, torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if not weights or self.used_rows is None:
            return weights
        name, table = self.used_rows
        return weights | {f"{name}.weight": change(table, weights[f"{name}.weight"])}

    def batch(self, tokens: Tokens, labels: np.ndarray, rows: np.ndarray, device: torch.device, **keys: int) -> Batch:
        """The batch of data set rows `rows` in the layout that suits model and device; see batch.assemble."""
        # On a CPU time goes into arithmetic, which small groups save; on a GPU into launches, of which each group has
        # as many as a full batch.
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

    def save(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes a folder that transformers and sentence_transformers.CrossEncoder load, with these full `weights`.

        An older one is there until the new one is complete.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        self.tokenizer.model_max_length = self.max_length
        with replacing(folder) as temporary:
            self.model.save_pretrained(temporary, state_dict=weights)
            self.tokenizer.save_pretrained(temporary)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights, frozen rows included."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def compile_layers(model: CrossEncoder) -> None:
    """Compiles what is computed for every token: the feed-forward, dense and norm modules of each layer.

    They are the leaves that hold weights. Attention and dropout, which depend on the batch's layout, stay as they are.
    """
    for module in model.modules():
        if type(module).__name__.endswith(("Intermediate", "FFN", "MLP")):
            module.compile(dynamic=True)


def first_position(model: Any) -> int:
    """The position of a pair's first token: 0, or in RoBERTa's kind the padding token's number + 1."""
    positions = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else padding + 1
