"""How the batch under way is laid out in a model: padded, or unpadded with attention on a grid of pairs."""

import math
from collections.abc import Callable
from typing import Any

import torch

from trainer.model.batch import Batch, Group
from trainer.model.dropout import DropoutKeys


class Moved(torch.autograd.Function):
    """rows.index_select(0, forth), whose gradient is moved by index_select(0, back): no sum, no zeros to add to.

    `real`: 1 at the rows that are in the result, 0 at the others, whose gradient is 0; None = all are.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, forth: torch.Tensor, back: torch.Tensor, real: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(back, real)
        return rows.index_select(0, forth)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # type: ignore[override]
        back, real = ctx.saved_tensors
        moved = gradient.index_select(0, back)
        return moved if real is None else moved.mul_(real[:, None]), None, None, None


def moved(rows: torch.Tensor, forth: torch.Tensor, back: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Moved of them. Without gradients the function around the operation takes longer than that, for one pair."""
    if not torch.is_grad_enabled():
        return rows.index_select(0, forth)
    result: torch.Tensor = Moved.apply(rows, forth, back, real)
    return result


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

    Attention works on a grid: groups of pairs of like length, each padded to its longest pair. A group's rows are
    ordered by pair, head and place, so that a head's attention inside a pair is one matrix of a batched product.

    Attributes:
        hidden: (1, tokens, hidden) what the last layer's keys and values are computed from.
        fast: whether kernels.py computes attention, dropout and norms, as far as it can, and products.py the linear
            layers.
    """

    def __init__(self, unpad: bool) -> None:
        self.unpad = unpad
        self.dropout = DropoutKeys()
        self.batch: Batch
        self.hidden: torch.Tensor
        self._made: dict[object, Any] = {}

    @property
    def fast(self) -> bool:
        return self.dropout.fast

    @fast.setter
    def fast(self, fast: bool) -> None:
        self.dropout.fast = fast

    def set(self, batch: Batch) -> None:
        self.batch, self._made = batch, {}
        tokens = batch.keys[None] if self.unpad else self.keys(0)
        self.dropout.set(tokens, batch.keys[batch.first], batch.step_key)

    def forget(self) -> None:
        """Lets go of what a forward has left: it would keep the forward's graph."""
        self._made = {}
        self.__dict__.pop("hidden", None)

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.batch.groups

    @property
    def longest(self) -> int:
        return max(group.longest for group in self.groups)

    @property
    def is_full(self) -> bool:
        """Whether a token lies in every place of the grid."""
        return all(group.tokens == group.pairs * group.longest for group in self.groups)

    def grid(self, rows: torch.Tensor, heads: int = 1, parts: int = 1) -> torch.Tensor:
        """(tokens * parts * heads, ...) to (parts * slots * heads, ...); where no token lies is what must not be read.

        `parts`: queries, keys and values, say, of which each has its own grid.
        """
        token, place, _ = self._once(("moves", heads, parts), lambda: self._moves(heads, parts))
        return moved(rows, token, place, None)

    def tokens(self, rows: torch.Tensor, heads: int = 1) -> torch.Tensor:
        """(slots * heads, ...) back to (tokens * heads, ...)."""
        token, place, real = self._once(("moves", heads, 1), lambda: self._moves(heads, 1))
        return moved(rows, place, token, real)

    def filled(self, values: torch.Tensor, filler: int) -> torch.Tensor:
        """(tokens,) to the only group's (pairs, longest), with `filler` where no token lies."""
        (rows,) = self.split(self.grid(values).where(self.batch.real != 0, filler))
        return rows

    def split(self, rows: torch.Tensor, heads: int | None = None) -> list[torch.Tensor]:
        """The grid's rows to (pairs, longest, ...) of each group; given `heads`, to (pairs, heads, longest, ...)."""
        of_heads = () if heads is None else (heads,)
        shapes = [(group.pairs, *of_heads, group.longest) for group in self.groups]
        parts = rows.split([math.prod(shape) for shape in shapes]) if len(shapes) > 1 else [rows]
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def keys(self, group: int) -> torch.Tensor:
        """(pairs, longest) dropout keys."""
        made: list[torch.Tensor] = self._once("keys", lambda: self.split(self.grid(self.batch.keys)))
        return made[group]

    def visible(self, group: int, window: int | None = None) -> torch.Tensor | None:
        """(pairs, 1, 1, longest) True where a token lies; None = everywhere.

        Inside a sliding `window` that does not cover all, (pairs, 1, longest, longest).
        """
        if window is not None and window >= self.groups[group].longest:
            window = None
        made: torch.Tensor | None = self._once(("visible", group, window), lambda: self._visible(group, window))
        return made

    def absent(self, group: int, window: int | None = None) -> torch.Tensor | None:
        """Its reverse."""
        visible = self.visible(group, window)
        made: torch.Tensor = self._once(("absent", id(visible)), lambda: None if visible is None else ~visible)
        return made

    def first_tokens(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, tokens, hidden) to (pairs, 1, hidden)."""
        return Taken.apply(hidden.flatten(0, 1), self.batch.first)[:, None]

    def means(self, hidden: torch.Tensor) -> torch.Tensor:
        """(1, tokens, hidden) to the means over each pair's tokens, (pairs, 1, hidden)."""
        rows = self.grid(hidden.flatten(0, 1))
        if not self.is_full:
            rows = rows * self.batch.real[:, None].to(rows.dtype)
        sums = joined([group.sum(1, keepdim=True) for group in self.split(rows)])
        return sums / self.batch.lengths[:, None, None]

    def _once(self, name: object, make: Callable[[], Any]) -> Any:
        """What of this batch is made at its first use."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _moves(self, heads: int, parts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of each (part, slot by head) its (token, part, head); the reverse; and which slots by head hold a token."""
        batch, head = self.batch, torch.arange(heads, device=self.batch.token.device)
        real = None
        if heads * parts == 1:
            return batch.token, batch.place, None if self.is_full else batch.real
        token = self._by_head(batch.token * (heads * parts), head)
        place = (batch.start * heads + batch.place - batch.start)[:, None] + batch.width[:, None] * head
        if parts > 1:
            part = torch.arange(parts, device=head.device)[:, None]
            token = (token + part * heads).flatten()
            place = place[:, None] + part * (len(batch.token) * heads)
        elif not self.is_full:
            real = self._by_head(batch.real, torch.zeros_like(head))
        return token, place.flatten(), real

    def _by_head(self, of_slots: torch.Tensor, of_heads: torch.Tensor) -> torch.Tensor:
        """(slots,) and (heads,) to their sums, (slots * heads,)."""
        return joined([(part[:, None] + of_heads[:, None]).flatten() for part in self.split(of_slots)])

    def _visible(self, group: int, window: int | None) -> torch.Tensor | None:
        own = self.groups[group]
        if window is None:
            if own.tokens == own.pairs * own.longest:
                return None
            real = self._once("real", lambda: self.split(self.batch.real != 0))[group]
            return real[:, None, None, :]  # type: ignore[no-any-return]
        visible = self.visible(group)
        place = torch.arange(own.longest, device=self.batch.real.device)
        near = (place[:, None] - place).abs() < window
        # Padding sees itself, since a row that sees nothing would be NaN.
        return near[None, None] if visible is None else (near & visible) | (place[:, None] == place)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
