"""The columns that prediction adds to its input: the same names in every kind of file, whatever the input has."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trainer.base.errors import UserError
from trainer.metrics import activated
from trainer.options import Objective


class Answers:
    """`prediction`, the class, and `score_<class>` of each; of a model with one output `score`; with `marks` `error`.

    Args:
        label_names: of the model's classes.
        objective: what it was trained for, which says how its outputs are to be read.
        marks: whether rows without an answer say why in a column of their own.
        prefix: what all names begin with.
    """

    def __init__(self, label_names: Sequence[str], objective: Objective, marks: bool = False, prefix: str = "") -> None:
        self.label_names, self.objective, self.marks = label_names, objective, marks
        one = len(label_names) == 1
        self.names = ["score"] if one else ["prediction", *(f"score_{name}" for name in label_names)]
        self.names = [prefix + name for name in [*self.names, *(["error"] if marks else [])]]

    def check(self, table: pa.Table, place: str) -> None:
        """Raises UserError where the input has columns that the output cannot have, too."""
        names = table.column_names
        if taken := [name for name in self.names if name in names]:
            raise UserError(f"{place} has a column {taken[0]!r} itself, as one of the new columns is called; with "
                            f"--prefix new_ that is new_{taken[0]}")  # fmt: skip
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{place}: two columns are called {twice!r}; rename one")

    def table(self, logits: np.ndarray, places: np.ndarray, errors: Sequence[str | None]) -> pa.Table:
        """The new columns of as many rows as `errors`; `logits` (n, outputs) are of those at `places` (n,)."""
        there = np.zeros(len(errors), dtype=bool)
        there[places] = True
        scores = np.zeros((len(errors), logits.shape[1]))
        scores[there] = activated(logits, self.objective)
        columns = [pa.array(column, mask=~there) for column in scores.T.copy()]
        if len(self.label_names) > 1:
            names = pa.array(self.label_names, pa.string())
            columns.insert(0, names.take(pa.array(scores.argmax(1), mask=~there)))
        if self.marks:
            columns.append(pa.array(errors, pa.string()))
        return pa.table(columns, names=self.names)
