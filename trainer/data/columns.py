"""Which columns of a table hold the texts and the label."""

import pyarrow as pa

from trainer.base.errors import UserError

# What corpora of NLI call them: SNLI and MultiNLI, SICK, ANLI, WANLI. The first one that a table has is meant.
PREMISE = ("premise", "sentence1", "sentence_A", "context")
HYPOTHESIS = ("hypothesis", "sentence2", "sentence_B")
LABEL = ("label", "gold_label", "entailment_judgment", "entailment_label", "gold")


def text_columns(
    table: pa.Table, place: str, premise_column: str | None, hypothesis_column: str | None
) -> tuple[str, str]:
    """The names of the columns of premise and hypothesis. Raises UserError."""
    premise = column_named(table.column_names, place, "premise_column", premise_column, PREMISE)
    hypothesis = column_named(table.column_names, place, "hypothesis_column", hypothesis_column, HYPOTHESIS)
    if premise == hypothesis:
        raise UserError(f"{place}: premise and hypothesis are both column {premise!r}; name two columns")
    return premise, hypothesis


def column_named(names: list[str], place: str, field: str, name: str | None, usual: tuple[str, ...]) -> str:
    """The one of `names` that the user gives as `name`, or else the first of the `usual` ones. Raises UserError."""
    wanted = (name,) if name else usual
    for candidate in wanted:
        if names.count(candidate) > 1:
            raise UserError(f"{place}: two columns are called {candidate!r}; rename one")
        if candidate in names:
            return candidate
    raise UserError(
        f"{place}: no column {' or '.join(map(repr, wanted))}; it has {', '.join(names)}. "
        f"Name the right one with --{field}"
    )
