"""Exact evaluation: every sample once, the same numbers from any number of ranks.

Samples are sorted by length and cut into batches before ranks come into play; ranks are dealt entire batches. So a
batch is computed in the same shape whoever computes it, no sample is padded in or counted twice, and logits travel
with the index of their sample.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.base.errors import TrainingFailed, out_of_memory
from trainer.base.files import replacing
from trainer.base.log import log
from trainer.data.pairs import Pairs, Rows
from trainer.data.sampler import Deal, longest_first
from trainer.data.tokens import Split, Tokens
from trainer.metrics import activated, classification_scores, merged, score_names, scores_by_source
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.precision import autocast, products
from trainer.options import Objective
from trainer.ranks import World
from trainer.score_metrics import binary_scores, number_scores

READ_EVERY = 1000  # batches whose logits stay on the device, so that the next one need not wait for them


@dataclass(frozen=True)
class Evaluation:
    """`scores` on every rank; `logits` (n, classes of the model) in the data's order on rank 0, None elsewhere."""

    scores: dict[str, Any]
    logits: np.ndarray | None


def evaluate(
    model: CrossEncoder,
    split: Split,
    world: World,
    batch_size: int,
    bf16: bool,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Scores of `model` on a split; see `scores_of`. With sources, also `by_source`.

    Beside them of classes `label_names`, the split's, and where these are not the model's `mapped`, in words.
    """
    pairs = split.pairs
    logits = predict_logits(model, pairs, split.tokens, world, batch_size, bf16, check)
    scores = None
    if logits is not None:
        own = merged(logits, pairs.of_class)
        scored = partial(scores_of, pairs, own, model.objective)
        scores = scored(np.arange(len(pairs))) | ({"label_names": [*pairs.label_names]} if pairs.label_names else {})
        if pairs.mapped:
            scores["mapped"] = pairs.mapped
        if lacking := [name for name in score_names(scores) if scores[name] is None]:
            log.info(f"{split.name}: no {' nor '.join(lacking)}, which is not defined where all pairs have the same "
                     "label, or the same score")  # fmt: skip
        if pairs.source is not None:
            scores["by_source"] = scores_by_source(pairs.source_names, pairs.source, scored)
    return Evaluation(world.broadcast(scores), logits)


def scores_of(pairs: Pairs, logits: np.ndarray, objective: Objective, rows: np.ndarray) -> dict[str, Any]:
    """Of logits (n, outputs), on some rows: what metrics.py says of classes, and score_metrics.py of one score."""
    labels, logits = pairs.label[rows], logits[rows]
    if pairs.values is None:
        return classification_scores(labels, logits, len(pairs.label_names), pairs.label_names)
    if objective == "mse":
        return number_scores(pairs.values[labels], logits)
    return binary_scores(labels, logits, pairs.label_names)


@torch.no_grad()
def predict_logits(
    model: CrossEncoder,
    pairs: Rows,
    tokens: Tokens,
    world: World,
    batch_size: int,
    bf16: bool,
    check: Callable[[], None] = lambda: None,
) -> np.ndarray | None:
    """Logits (n, classes) in fp32 in the order of `tokens` on rank 0, None elsewhere.

    Every rank calls `check` before each batch, equally often; it may raise to stop. Raises RuntimeError if a sample is
    missing or was computed twice, on every rank TrainingFailed if a logit is not finite, and TrainingFailed where the
    memory does not suffice.
    """
    if model.training:  # to look through all modules takes longer than to tokenise a pair
        model.eval()
    ordered = longest_first(tokens.lengths)
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    costs = np.array([tokens.lengths[batch].sum() for batch in batches])
    dealt = Deal(costs, world.size)
    mine = [batches[i] for i in dealt.part(world.rank)]
    # A sharded model needs all ranks for a forward: one that has a batch less computes another for nothing.
    idle = dealt.largest - len(mine)
    labels = np.zeros(len(tokens.lengths), dtype=np.int64)
    order, on_device = [], []
    results = [np.empty((0, model.num_classes), np.float32)]
    # Autocast around all batches rounds the weights once.
    with failures(batch_size), products(world.device, bf16), autocast(world.device, bf16):
        for number, rows in enumerate(mine + batches[:1] * idle):
            check()
            batch = model.batch(tokens, labels, rows, world.device)
            logits = model(batch)
            if number >= len(mine):
                break
            order.append(batch.rows)
            on_device.append(logits.float())
            if len(on_device) == READ_EVERY or number == len(mine) - 1:
                results.append(torch.cat(on_device).cpu().numpy())
                on_device.clear()
    gathered = world.gather(np.concatenate(results))
    rows = world.gather(np.concatenate([*order, np.empty(0, np.int64)]))
    logits = None if gathered is None or rows is None else in_order(rows, gathered, len(labels))
    # Scores that are no numbers would pass for a class.
    wrong = world.broadcast(None if logits is None else np.flatnonzero(~np.isfinite(logits).all(1)).tolist())
    if wrong:
        raise TrainingFailed(f"{pairs.all_at(wrong, 3)}: the model's scores are not finite ({len(wrong):,} of "
                             f"{len(pairs):,} pairs); its weights are too large")  # fmt: skip
    return logits


@contextmanager
def failures(batch_size: int) -> Iterator[None]:
    """One clear error where the GPU's memory does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        advice = f"lower --per_device_eval_batch_size ({batch_size})"
        raise TrainingFailed(f"the GPU's memory is used up; {advice}") from None


def in_order(rows: np.ndarray, values: np.ndarray, num_samples: int) -> np.ndarray:
    """`values` sorted by their sample's row. Raises RuntimeError unless each of 0..num_samples-1 is there once."""
    times_seen = np.bincount(rows, minlength=num_samples)
    if len(times_seen) != num_samples or (times_seen != 1).any():
        wrong = np.flatnonzero(times_seen != 1)[:5].tolist()
        raise RuntimeError(f"evaluation saw samples {wrong} not exactly once, so its scores would be wrong")
    ordered = np.empty_like(values)
    ordered[rows] = values
    return ordered


def predicted(pairs: Pairs, logits: np.ndarray, objective: Objective) -> np.ndarray:
    """What a model says of a split, by metrics.activated, in the split's own classes: (n, classes), or scores (n, 1).

    `logits` (n, outputs of the model).
    """
    return activated(merged(logits, pairs.of_class), objective)


def write_predictions(path: Path, pairs: Pairs, scores: np.ndarray) -> None:
    """A parquet file: index (the row in the data's source), label, source if there is one, and of `predicted` either
    score_<class> or `score`. The label is a class number, 0 or 1, or the target itself."""
    import pyarrow as pa
    from pyarrow import parquet

    names = ["score"] if pairs.values is not None else [f"score_{name}" for name in pairs.label_names]
    labels = pairs.targets if pairs.targets.dtype == np.float32 else pairs.targets.astype(np.int64)
    columns: dict[str, Any] = {"index": pairs.row.astype(np.int64), "label": labels}
    columns |= dict(zip(names, scores.T, strict=True))
    if pairs.source is not None:
        columns["source"] = pa.array(pairs.source_names, pa.string()).take(pa.array(pairs.source))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)
