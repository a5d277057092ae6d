"""The dropout of known families: its masks are those of masks.py, and kernels.py may draw them."""

import torch
from torch import nn

from trainer.model import kernels
from trainer.model.masks import DRAWS, columns_of, masked, mixed, numbers


class DropoutKeys:
    """The keys of the tokens that the model is about to see, shared by all its dropout sites.

    A site finds its keys by the leading shape of its input: every token, (batch, length), or only each pair's first
    one, (batch,) or (batch, 1).

    Attributes:
        passes: how often layers that are computed several times in a forward have begun; each pass has its own masks.
        fast: whether kernels.py computes dropout, and what there is around it.
    """

    def __init__(self) -> None:
        self.kinds: tuple[torch.Tensor, ...] = ()
        self.step: torch.Tensor
        self.num_sites = 0
        self.passes = 0
        self.fast = False

    def set(self, tokens: torch.Tensor, first: torch.Tensor, step: torch.Tensor) -> None:
        """`tokens` (batch, length) keys of every token, `first` (pairs,) those of each pair's first token, `step` (1,)
        one that all pairs of the step share."""
        self.kinds = (tokens, first[:, None], first)
        self.step, self.passes = step, 0

    def new_site(self) -> int:
        self.num_sites += 1
        return self.num_sites

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """(...) keys of the rows of x (..., features)."""
        return next(kind for kind in self.kinds if kind.shape == x.shape[:-1])  # no table: shapes can be symbols

    def columns(self, site: int, num_rows: int, width: int, device: torch.device) -> torch.Tensor:
        """`columns_of` a site, in this pass."""
        return columns_of(site + self.passes * self.num_sites, num_rows, width, device)

    def mask(self, site: int, p: float, x: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., features) after dropout; `columns` are the site's, for as many features or more, if at hand."""
        keys = self.keys(x)
        if columns is None:
            columns = self.columns(site, 1, x.shape[-1], x.device)[0]
        if self.fast and kernels.available(x.device):
            return kernels.drop(x.flatten(0, -2), keys.flatten(), columns, p).view(x.shape)
        return masked(x, p, keys.unsqueeze(-1), columns[: -(-x.shape[-1] // DRAWS)])

    def attention_mask(self, site: int, p: float, weights: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The same for attention weights (batch, heads, queries, keys), given the `queries`' keys (batch, queries)."""
        columns = self.columns(site, weights.shape[1], weights.shape[-1], weights.device)
        return masked(weights, p, queries[:, None, :, None], columns[:, None])

    def shared_mask(self, site: int, p: float, x: torch.Tensor, start: int) -> torch.Tensor:
        """The same for rows (rows, features) of a table, from row `start` on, that all pairs of a step share."""
        of_row = numbers(site, 0, start + len(x), x.device)[start:]
        return masked(x, p, mixed(self.step + of_row)[:, None], columns_of(site, 1, x.shape[-1], x.device)[0])


class KeyedDropout(nn.Module):
    """Takes the place of an nn.Dropout.

    Attributes:
        columns: as in `keep`, of more features than there are. Only compiled code has them beforehand: it can make
            none, and would be another one for each site, if it had to know its number.
    """

    def __init__(self, p: float, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.keys, self.site = p, keys, keys.new_site()
        self.columns: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        return self.keys.mask(self.site, self.p, x, self.columns)

    def extra_repr(self) -> str:
        return f"p={self.p}, site={self.site}"
