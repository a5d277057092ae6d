"""How the batch under way is laid out in a model: padded, or unpadded with attention in groups of like length."""

import math
from typing import Any

import torch

from trainer.model.batch import Batch, Group
from trainer.model.dropout import DropoutKeys


class Taken(torch.autograd.Function):
    """rows.index_select(0, places) of `places` that differ, so that the backward needs no sum."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.shape = rows.shape
        ctx.save_for_backward(places)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.saved_tensors[0], gradient), None


class Layout:
    """How the batch under way is laid out, for the attention and dropout sites of one model.

    Attention works on groups of pairs of like length, each padded to its longest pair. A group's rows are ordered by
    pair, head and place, so that a head's attention inside a pair is one matrix of a batched product.
    """

    def __init__(self, unpad: bool) -> None:
        self.unpad = unpad
        self.dropout = DropoutKeys()
        self.groups: tuple[Group, ...]
        self.longest: int
        self.first: torch.Tensor  # (pairs,) place of each pair's first token among the tokens
        self.keys: list[torch.Tensor]  # of each group (pairs, longest), dropout keys
        self.visible: list[torch.Tensor | None]  # of each group (pairs, 1, 1, longest), True at real tokens; None = all
        self.hidden: torch.Tensor  # (1, tokens, hidden) what the last layer's keys and values are computed from

    def set(self, batch: Batch) -> None:
        self.groups, self.first, self.batch = batch.groups, batch.first, batch
        self.longest = max(group.longest for group in batch.groups)
        self.num_tokens = len(batch.ids)
        self.num_slots = sum(group.pairs * group.longest for group in batch.groups)
        self.places = {1: self._places(1)}
        keys, real = self.pad(batch.keys), self.pad(torch.ones_like(batch.ids, dtype=torch.bool))
        self.keys = self.split(keys)
        self.visible = [
            None if group.tokens == group.pairs * group.longest else mask[:, None, None, :]
            for group, mask in zip(self.groups, self.split(real), strict=True)
        ]
        of_pairs = batch.keys[batch.first]
        self.dropout.set(batch.keys[None] if self.unpad else self.keys[0], of_pairs, batch.step_key)

    def _places(self, heads: int) -> torch.Tensor:
        """Where each (token, head) lies among the groups' rows."""
        batch, widths = self.batch, self.batch.widths
        starts = (widths.cumsum(0) - widths) * heads
        of_head = torch.arange(heads, device=widths.device)
        places = (starts[batch.pair] + batch.positions)[:, None] + widths[batch.pair][:, None] * of_head
        return places.flatten()

    def pad(self, values: torch.Tensor, heads: int = 1, filler: int = 0) -> torch.Tensor:
        """(tokens * heads, ...) to the groups' rows, one after the other."""
        if heads not in self.places:
            self.places[heads] = self._places(heads)
        rows = values.new_full((self.num_slots * heads, *values.shape[1:]), filler)
        return rows.index_copy(0, self.places[heads], values)

    def unpadded(self, rows: torch.Tensor, heads: int = 1) -> torch.Tensor:
        """The groups' rows to (tokens * heads, ...)."""
        return Taken.apply(rows, self.places[heads])

    def split(self, rows: torch.Tensor, heads: int | None = None) -> list[torch.Tensor]:
        """The groups' rows to (pairs, longest, ...) of each group; given `heads`, to (pairs, heads, longest, ...)."""
        of_heads = () if heads is None else (heads,)
        shapes = [(group.pairs, *of_heads, group.longest) for group in self.groups]
        parts = rows.split([math.prod(shape) for shape in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def first_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, tokens, hidden) to (pairs, 1, hidden)."""
        return hidden[0].index_select(0, self.first)[:, None]

    def means(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, tokens, hidden) to the means over each pair's tokens, (pairs, 1, hidden)."""
        sums = torch.cat([rows.sum(1, keepdim=True) for rows in self.split(self.pad(hidden[0]))])
        return sums / self.batch.lengths[:, None, None]
