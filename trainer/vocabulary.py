"""An embedding table of which only the rows that training can change are parameters.

A token that is in no training pair gets no gradient. Its moments stay zero, and without weight decay AdamW then leaves
its row exactly as it is. Such rows are kept aside: they take no gradient, no moments, no share of the gradient's norm,
of the optimizer step, of what ranks send, or of a checkpoint. Of RoBERTa's 50,265 rows, 100,000 pairs of AllNLI hold
17,592. Evaluation sees all rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class UsedRows(nn.Module):
    """Takes the place of an nn.Embedding of (rows, hidden).

    Args:
        table: the whole table.
        used: token numbers, ascending, each once, of the rows that stay parameters.
    """

    place: torch.Tensor  # (rows,) of a used row its place in `weight`; of another one -1 - its place in `rest`
    rest: torch.Tensor  # (rows - used, hidden)

    def __init__(self, table: nn.Embedding, used: np.ndarray) -> None:
        super().__init__()
        rows = torch.from_numpy(used.astype(np.int64))
        unused = torch.ones(table.num_embeddings, dtype=torch.bool).index_fill_(0, rows, False)
        place = torch.empty(table.num_embeddings, dtype=torch.int64)
        place[rows] = torch.arange(len(rows))
        place[unused] = -1 - torch.arange(int(unused.sum()))
        whole = table.weight.detach()
        self.weight = nn.Parameter(whole[rows])
        # Not saved: a checkpoint goes on with the model that the run began with, and `widen` puts them back.
        self.register_buffer("rest", whole[unused], persistent=False)
        self.register_buffer("place", place.to(whole.device), persistent=False)
        # As in nn.Embedding, the padding token's row has no gradient.
        self.padding = None if table.padding_idx is None else int(place[table.padding_idx])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = self.place[ids]
        if self.training:
            return functional.embedding(place, self.weight, self.padding)
        used, unused = self.weight[place.clamp(min=0)], self.rest[(-1 - place).clamp(min=0)]
        return torch.where((place < 0)[..., None], unused, used)

    def widen(self, weight: torch.Tensor) -> torch.Tensor:
        """The whole table (rows, hidden), given that of the used rows."""
        place = self.place.to(weight.device)
        whole = weight.new_empty(len(place), weight.shape[1])
        whole[place >= 0], whole[place < 0] = weight, self.rest.to(weight.device)
        return whole

    def narrow(self, whole: torch.Tensor) -> torch.Tensor:
        """The reverse of `widen`."""
        return whole[self.place.to(whole.device) >= 0]
