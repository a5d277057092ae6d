"""The cross-encoder: a transformers sequence classifier fed with batches of pairs, and its tokenizer."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.base.errors import UserError
from trainer.base.files import replacing
from trainer.data.pairs import Rows
from trainer.data.tokens import Tokens
from trainer.model.attention import library_fused
from trainer.model.batch import Batch, assemble
from trainer.model.calls import DropoutCalls
from trainer.model.dropout import KeyedDropout
from trainer.model.embedding import UsedRows
from trainer.model.facts import first_position, num_rows, number_of_types, pads_left
from trainer.model.families import adopt
from trainer.model.layout import Layout
from trainer.model.lora import Lora, is_adapter
from trainer.model.masks import columns_of
from trainer.model.outputs import ACTIVATIONS
from trainer.model.parts import fingerprint_of_frozen
from trainer.options import Objective


class CrossEncoder(nn.Module):
    """Scores of the classes for each pair of a batch.

    Attributes:
        tokenizer, max_length (longest pair in tokens): what `save` writes beside the model; no forward needs them.
        layout: None where the model's family is unknown: it then runs as it is, padded.
        calls: its dropout then, once probe.py has looked at the model.
        draws: whether training draws random numbers from torch's stream, which no sample has of its own.
        one_length: whether every pair of a step is padded to the longest of them, on whichever rank: where padding
            changes scores, or comes first.
        note: for the user, where the model runs padded unasked.
        lora: where adapters are trained; `model` then has them, and what `save` writes as the model has them merged.
        objective: what its outputs mean; see metrics.activated.
        hollow: whether its values are on rank 0 only, until the backend has sharded it; see scattered.py.
    """

    hollow = False

    def __init__(
        self,
        model: Any,
        attn_implementation: str | None = None,
        unpad: bool = True,
        tokenizer: Any = None,
        max_length: int = 0,
        lora: Lora | None = None,
        objective: Objective = "cross_entropy",
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.tokenizer, self.max_length, self.lora = tokenizer, max_length, lora
        self.layout: Layout | None = None
        self.calls, self.draws, self.note = DropoutCalls(), False, ""
        if attn_implementation is None:
            self.layout, self.note = adopt(model, unpad)
        self.num_types = number_of_types(model)
        self.left = self.one_length = pads_left(model)
        self.first_position = first_position(model)
        self.num_classes: int = model.config.num_labels
        self.padding = model.config.pad_token_id or 0

    @property
    def gives_types(self) -> bool:
        """Whether the saved tokenizer shall make token types: as it did, if the model tells them apart."""
        return self.num_types > 1 and "token_type_ids" in self.tokenizer.model_input_names

    @property
    def label_names(self) -> list[str]:
        return [self.model.config.id2label[i] for i in range(self.num_classes)]

    @property
    def classes(self) -> list[str] | None:
        """What labels mean: its classes, or of a score the names of 0 and 1; None where it says nothing of them."""
        known: list[str] | None = getattr(self.model.config, "score_labels", None)
        return self.label_names if self.objective == "cross_entropy" else known

    @property
    def num_parameters(self) -> int:
        """Frozen rows included, adapters not. Under ZeRO-3 a parameter itself is empty."""
        frozen = self.used_rows[1].frozen.numel() if self.used_rows else 0
        return frozen + sum(
            getattr(p, "ds_numel", p.numel()) for name, p in self.model.named_parameters() if not is_adapter(name)
        )

    def freeze_unused_rows(self, tokens: Tokens) -> None:
        """Before training on `tokens` without weight decay: see embedding.UsedRows."""
        table = self.model.get_input_embeddings() if self.layout else None
        if type(table) is not nn.Embedding or not table.weight.requires_grad:
            return
        used = np.zeros(table.num_embeddings, dtype=bool)
        used[tokens.used] = True
        used[[self.padding, *([] if table.padding_idx is None else [table.padding_idx])]] = True
        if not used.all():
            self.model.set_input_embeddings(UsedRows(table, used))

    @property
    def used_rows(self) -> tuple[str, UsedRows] | None:
        """Name and table where rows are frozen. No attribute: it would be a second name of its parameters."""
        return next(((name, m) for name, m in self.model.named_modules() if isinstance(m, UsedRows)), None)

    @property
    def frozen_fingerprint(self) -> str | None:
        """Of what is in no checkpoint: rows of embeddings, embeddings and layers, or all that LoRA leaves as it is."""
        frozen = (self.lora.fingerprint if self.lora else fingerprint_of_frozen)(self.model)
        return self.used_rows[1].fingerprint() + (frozen or "") if self.used_rows else frozen

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

    def batch(
        self,
        tokens: Tokens,
        labels: np.ndarray,
        rows: np.ndarray,
        device: torch.device,
        longest: int | None = None,
        num_pairs: int | None = None,
        **keys: int,
    ) -> Batch:
        """The batch of data set rows `rows` in the layout that suits model and device; see batch.assemble.

        `longest`: of the pairs that shall get one length, this batch's or more. `num_pairs`: most pairs of a batch that
        is to be filled up to one of few shapes.
        """
        # On a CPU time goes into arithmetic, which small groups save; on a GPU into launches, of which each group has
        # as many as a full batch.
        likeness = 0.8 if self.layout and self.layout.unpad and device.type == "cpu" else 0.0
        longest = longest if self.one_length else None
        return assemble(
            tokens,
            labels,
            rows,
            device,
            **keys,
            likeness=likeness,
            longest=longest,
            num_pairs=num_pairs,
            padding=self.padding,
            first_position=self.first_position,
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (pairs, classes), in the order of the batch."""
        layout = self.layout or Layout(unpad=False)
        layout.set(batch)
        if layout.unpad:
            inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None]}
            types = batch.types[None]
        else:
            ids, mask = layout.filled(batch.ids, self.padding), layout.filled(torch.ones_like(batch.ids), 0)
            types = layout.filled(batch.types, 0)
            if self.left:
                width = mask.shape[1]
                places = (torch.arange(width, device=mask.device) + mask.sum(1, keepdim=True)) % width
                ids, mask, types = (rows.gather(1, places) for rows in (ids, mask, types))
            inputs = {"input_ids": ids, "attention_mask": mask}
        if self.num_types > 1:
            inputs["token_type_ids"] = types
        self.calls.set(batch.keys[batch.first], batch.step_key)
        with self.calls.active(), library_fused():
            return self.model(**inputs).logits

    def check(self, pairs: Rows, tokens: Tokens) -> None:
        """Raises UserError, naming the row, where the model cannot take a pair: it has no embedding for a token or a
        token type, or does not find the end, which BART's kind knows by the number of the tokens that end a text.
        """
        limits = [(tokens.ids, int(tokens.used.max(initial=0)), num_rows(self.model), "token", "tokens")]
        if self.num_types > 1:
            limits.append((tokens.types, tokens.largest_type, self.num_types, "token type", "token types"))
        for numbers, largest, limit, one, all_of_them in limits:
            if largest >= limit:
                wrong = int(np.argmax(numbers >= limit))
                number = int(np.searchsorted(tokens.offsets, wrong, side="right")) - 1
                raise UserError(f"{pairs.at(number)}: the tokenizer gives {one} {numbers[wrong]}, and the "
                                f"model has {limit} {all_of_them}; take the tokenizer of this model")  # fmt: skip
        eos = getattr(self.model.config, "eos_token_id", None)
        if hasattr(self.model, "classification_head") and isinstance(eos, int):
            check_ends(pairs, tokens, eos)

    def save(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Writes a folder that transformers and sentence_transformers.CrossEncoder load, with these full `weights`.

        An older one is there until the new one is complete. With LoRA, the folder `adapter` beside it is written first.
        """
        from transformers.utils import logging

        if self.lora:
            self.lora.save(weights, folder.with_name("adapter"))
            weights = self.lora.merged(weights)
        logging.disable_progress_bar()
        self.model.config.sentence_transformers = {"activation_fn": ACTIVATIONS[self.objective]}
        self.model.config.task_specific_params = None  # with which a pipeline would change the config
        self.tokenizer.model_max_length = self.max_length
        inputs = ["input_ids", *(["token_type_ids"] if self.gives_types else []), "attention_mask"]
        for name, value in {"padding_side": "left" if self.left else "right", "model_input_names": inputs}.items():
            setattr(self.tokenizer, name, value)
            self.tokenizer.init_kwargs[name] = value  # by which it knows what to write
        with replacing(folder) as temporary:
            # A backend that gathers weights makes a copy for each name of a tied one.
            own = {name: weight for name, weight in weights.items() if name not in self.tied}
            self.model.save_pretrained(temporary, state_dict=own)
            self.tokenizer.save_pretrained(temporary)

    @property
    def tied(self) -> dict[str, str]:
        """The second names of weights, with the first ones."""
        return getattr(self.model, "all_tied_weights_keys", {})

    def saved_weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """What `save` wrote, under all names; with LoRA only what is trained: the others are as they were."""
        if self.lora:
            return self.lora.load(folder.with_name("adapter"))
        weights = load_file(folder / "model.safetensors")
        return weights | {name: weights[first] for name, first in self.tied.items()}


def model_facts(model: CrossEncoder) -> dict[str, Any]:
    """What ranks compare: each entry of config.json, the classes' names among them, and the SHA-256 of all weights; of
    a hollow model, of their names and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        if model.hollow:
            digest.update(f"{name} {[*value.shape]} {value.requires_grad}\n".encode())
            continue
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    settings = json.loads(model.model.config.to_json_string(use_diff=False))
    return {f"config.json's {name}": value for name, value in settings.items()} | {"model": digest.hexdigest()}


def checkpoint_activations(model: CrossEncoder) -> None:
    """Computes each layer's activations again in the backward. Raises UserError where the model cannot."""
    inner = model.model
    if not inner.supports_gradient_checkpointing:
        raise UserError(f"{inner.config.model_type} has no gradient checkpointing; say "
                        "--gradient_checkpointing false, and lower --per_device_train_batch_size")  # fmt: skip
    # transformers has renamed the method
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": model.calls.replay})
    inner.disable_input_require_grads()  # which would take the backward down to frozen embeddings


def compile_layers(model: CrossEncoder, **options: Any) -> None:
    """Compiles what is computed for every token alike: the feed-forward modules of each layer, on their device.

    No table of embeddings is among them: compiled, its backward would add up in any order. Attention, which depends on
    the batch's layout, stays as it is. `options` of torch.compile. Raises UserError where there are no such modules, or
    dropout is not of ours.
    """
    parts = [part for part in model.modules() if type(part).__name__.endswith(("Intermediate", "FFN", "MLP"))]
    if model.layout is None or not parts:
        name = model.model.config.model_type
        raise UserError(f"torch_compile needs a family of docs/models.md that has feed-forward modules; {name} is none")
    inside = {module for part in parts for module in part.modules()}
    widest = max(max(module.weight.shape) for module in inside if isinstance(module, nn.Linear))
    for module in inside:
        if isinstance(module, KeyedDropout):
            module.columns = columns_of(module.site, 1, widest, next(model.parameters()).device)[0]
    for part in parts:
        part.compile(dynamic=True, **options)


def check_ends(pairs: Rows, tokens: Tokens, eos: int, block: int = 1 << 18) -> None:
    """Raises UserError unless all pairs have equally many of the token that ends a text."""
    usual: int | None = None
    for start in range(0, len(pairs), block):
        offsets = tokens.offsets[start : start + block + 1]
        ids = tokens.ids[offsets[0] : offsets[-1]]
        ends = np.add.reduceat((ids == eos).astype(np.int64), offsets[:-1] - offsets[0])
        usual = max(1, int(np.bincount(ends).argmax())) if usual is None else usual
        if len(wrong := np.flatnonzero(ends != usual)):
            first = start + int(wrong[0])
            raise UserError(f"{pairs.at(first)}: the model finds the end by token {eos}, and this one has "
                            f"{ends[wrong[0]]} of it, not {usual}; take it out")  # fmt: skip
