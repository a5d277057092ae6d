"""An embedding table of which only the rows that training can change are parameters.

A token that is in no training pair gets no gradient. Its moments stay zero, and without weight decay AdamW then leaves
its row exactly as it is. Such rows are kept aside: they take no gradient, no moments, no share of the gradient's norm,
of the optimizer step, of what ranks send, or of a checkpoint. Of RoBERTa's 50,265 rows, 100,000 pairs of AllNLI hold
17,593. Evaluation sees all rows.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class UsedRows(nn.Module):
    """Takes the place of an nn.Embedding of (rows, hidden).

    Args:
        table: the whole table.
        used: (rows,) True for the rows that stay parameters.
    """

    place: torch.Tensor  # (rows,) where a row is among the used ones, and behind them the others
    rest: torch.Tensor  # (others, hidden)

    def __init__(self, table: nn.Embedding, used: np.ndarray) -> None:
        super().__init__()
        whole = table.weight.detach()
        mask = torch.from_numpy(used).to(whole.device)
        place = torch.cat([mask.nonzero(), (~mask).nonzero()]).flatten().argsort()
        self.num_used = int(used.sum())
        self.weight = nn.Parameter(whole[mask])
        # Not saved: a checkpoint has their fingerprint, and a model all rows, by `widen`.
        self.register_buffer("rest", whole[~mask], persistent=False)
        self.register_buffer("place", place, persistent=False)
        # As in nn.Embedding, the padding token's row has no gradient.
        self.padding = None if table.padding_idx is None else int(place[table.padding_idx])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = self.place[ids]
        if self.training:
            return functional.embedding(place, self.weight, self.padding)
        used, other = self.weight[place.clamp(max=self.num_used - 1)], self.rest[(place - self.num_used).clamp(min=0)]
        return torch.where((place < self.num_used)[..., None], used, other)

    def widen(self, weight: torch.Tensor) -> torch.Tensor:
        """The whole table (rows, hidden), given that of the used rows."""
        return torch.cat([weight, self.rest.to(weight.device)])[self.place.to(weight.device)]

    def narrow(self, whole: torch.Tensor) -> torch.Tensor:
        """The reverse of `widen`."""
        return whole[self.place.to(whole.device) < self.num_used]

    def fingerprint(self) -> str:
        """Of the rows that are kept aside, without which the others are of no use."""
        return hashlib.sha256(self.rest.cpu().numpy().tobytes()).hexdigest()
