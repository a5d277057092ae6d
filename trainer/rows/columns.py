"""Which columns of a table hold the texts and the label."""

from trainer.base.errors import UserError

# What corpora of NLI call them: SNLI and MultiNLI, SICK, ANLI, WANLI, FEVER. The first one that a table has is meant.
PREMISE = ("premise", "sentence1", "sentence_A", "context")
HYPOTHESIS = ("hypothesis", "sentence2", "sentence_B", "query")
LABEL = ("label", "gold_label", "entailment_judgment", "entailment_label", "gold")
# By objective; those of one score are numbers.
LABELS: dict[str, tuple[str, ...]] = {
    "cross_entropy": LABEL,
    "binary_cross_entropy": (*LABEL, "score"),
    "mse": ("label", "score", "similarity", "relatedness_score"),
}

Wanted = str | list[str] | None  # names, the best one first


def text_columns(names: list[str], place: str, premise_column: Wanted, hypothesis_column: Wanted) -> tuple[str, str]:
    """The names of the columns of premise and hypothesis. Raises UserError."""
    premise = column_named(names, place, "premise_column", premise_column, PREMISE)
    hypothesis = column_named(names, place, "hypothesis_column", hypothesis_column, HYPOTHESIS)
    if premise == hypothesis:
        raise UserError(f"{place}: premise and hypothesis are both column {premise!r}; name two columns")
    return premise, hypothesis


def column_named(names: list[str], place: str, field: str, given: Wanted, usual: tuple[str, ...]) -> str:
    """The first of those that the user has given, or else of the `usual` ones, that is among `names`.

    Raises UserError.
    """
    wanted = candidates(given, usual)
    for candidate in wanted:
        if names.count(candidate) > 1:
            raise UserError(f"{place}: two columns are called {candidate!r}; rename one")
        if candidate in names:
            return candidate
    raise UserError(
        f"{place}: no column {' or '.join(map(repr, wanted))}; it has {', '.join(names)}. "
        f"Name the right one with --{field}"
    )


def candidates(given: Wanted, usual: tuple[str, ...]) -> tuple[str, ...]:
    return usual if given is None else (given,) if isinstance(given, str) else tuple(given)
