"""Dropout that belongs to the sample, in any model.

Every dropout of a transformers model is a call of torch's one function, which nn.Dropout calls too. While a model's
forward runs, that function is ours: it draws masks by the sample's key, as dropout.py does. A site is the number of
its call in the forward. Which dimension of its input counts the pairs, two batches of different size tell; where none
does, as for a table of relative positions, all pairs of a step share one mask. The other dimensions are coordinates,
which padding on the right does not move.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional

from trainer.model.masks import columns_of, hash_key, masked, mixed, numbers

Shape = tuple[int, ...]
SHARED, UNCLEAR = -1, -2  # in place of a dimension


class DropoutCalls:
    """The dropout calls of one model.

    Attributes:
        sites: of each call, the dimension that counts the pairs, or SHARED, and its number in hashes; None = not looked
            at yet: torch's own dropout then runs.
    """

    def __init__(self) -> None:
        self.sites: list[tuple[int, int]] | None = None
        self.number = 0  # of the next call
        self.seen: list[Shape] | None = None
        self.pairs: torch.Tensor  # (pairs,) keys
        self.step: torch.Tensor  # (1,) key

    def set(self, pairs: torch.Tensor, step: torch.Tensor) -> None:
        """The keys of the pairs (pairs,) and of the step (1,) that the next forward is of."""
        self.pairs, self.step = pairs, step

    @contextmanager
    def active(self, start: int = 0) -> Iterator[None]:
        """While it lasts, dropout is ours; the next call is number `start`."""
        if self.sites is None and self.seen is None:
            yield
            return
        plain, self.number = functional.dropout, start
        functional.dropout = self.dropout  # type: ignore[assignment]
        try:
            yield
        finally:
            functional.dropout = plain

    def replay(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For gradient checkpointing, as its `context_fn`: a part that is computed again has the same calls."""
        return nullcontext(), self.active(self.number)

    def dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        """Takes the place of torch.nn.functional.dropout."""
        number, self.number = self.number, self.number + 1
        if self.seen is not None:
            self.seen.append(tuple(x.shape))
            return x
        if not training or p == 0 or self.sites is None:
            return x
        dim, site = self.sites[number]
        if dim == SHARED:
            return self._masked(x[None], p, site, self.step)[0]
        return self._masked(x.movedim(dim, 0), p, site, self.pairs).movedim(0, dim)

    @staticmethod
    def _masked(x: torch.Tensor, p: float, site: int, keys: torch.Tensor) -> torch.Tensor:
        """x (pairs * any number, ..., features), with `keys` (pairs,)."""
        if x.dim() == 1:
            return DropoutCalls._masked(x[:, None], p, site, keys)[:, 0]
        inner = len(x) // len(keys)
        keys = (keys[:, None] + numbers(site, 0, inner, x.device)).flatten()
        for dim in range(1, x.dim() - 1):
            keys = keys.unsqueeze(-1) + numbers(site, dim, x.shape[dim], x.device)
        return masked(x, p, mixed(keys).unsqueeze(-1), columns_of(site, 1, x.shape[-1], x.device)[0])

    def probe(self, forward: Callable[[int], Any], another: Callable[[], Any]) -> bool:
        """Finds the sites by `forward(pairs)`, the model on so many pairs of one length, in training.

        `another` is a forward of another length. Returns whether each site was understood; if not, dropout stays
        torch's own.
        """
        two, three = self.shapes(lambda: forward(2)), self.shapes(lambda: forward(3))
        dims = [_counted(*shapes) for shapes in zip(two, three, strict=False)]
        if len({len(two), len(three), len(self.shapes(another))}) > 1 or UNCLEAR in dims:
            return False
        self.sites = [(dim, int(hash_key(number) >> 33)) for number, dim in enumerate(dims)]
        return True

    def shapes(self, forward: Callable[[], Any]) -> list[Shape]:
        """Of the inputs of all calls in a forward, which drops nothing."""
        self.seen = []
        try:
            forward()
            return self.seen
        finally:
            self.seen = None


def _counted(two: Shape, three: Shape) -> int:
    """Which dimension counts the pairs, given a site's shapes with two and with three of them."""
    if two == three:
        return SHARED
    differing = [dim for dim, sizes in enumerate(zip(two, three, strict=False)) if sizes[0] != sizes[1]]
    if len(two) != len(three) or len(differing) != 1 or two[differing[0]] * 3 != three[differing[0]] * 2:
        return UNCLEAR
    return differing[0]
