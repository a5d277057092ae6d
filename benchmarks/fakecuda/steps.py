"""crossrank's own step and evaluation, counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.fakecuda.count import Count, Counted
from benchmarks.fakecuda.device import DEVICE, fake_cuda, to_fake_cuda
from trainer.backends import Single
from trainer.config import Config
from trainer.data.pairs import Pairs, Texts
from trainer.data.sampler import GlobalBatchSampler
from trainer.data.tokens import Split, Tokens
from trainer.evaluate import predict_logits
from trainer.loop import Trainer
from trainer.model import kernels
from trainer.model.cross_encoder import CrossEncoder
from trainer.model.probe import examine
from trainer.ranks import World
from trainer.run.state import State, Window
from trainer.schedules import Schedule
from trainer.step.graphs import Graphs
from trainer.step.plain import PlainStep
from trainer.step.static import StaticStep

WARM = 1  # steps before the counted one: optimizer state and tables of random numbers are made once
NAMES = ("entailment", "neutral", "contradiction")


class Enough(Exception):
    """Ends a loop whose step has been counted."""


def drawn_lengths(pairs: int = 64) -> np.ndarray:
    """Lengths (pairs,) like those of 64 pairs of AllNLI in RoBERTa's tokens: 1,739 in all, 61 the longest.

    They are the evenly spaced quantiles of a lognormal distribution, in an order drawn once.
    """
    law = NormalDist(3.238, 0.36)
    quantiles = np.exp([law.inv_cdf((i + 0.5) / pairs) for i in range(pairs)])
    return np.random.default_rng(0).permutation(np.round(quantiles).astype(np.int64))


def split_of(lengths: np.ndarray, vocabulary: int) -> Split:
    """Pairs of these lengths, of random tokens."""
    rng, offsets = np.random.default_rng(0), np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(5, vocabulary, offsets[-1])
    types = np.zeros_like(ids)
    tokens = Tokens.of(ids, offsets, types, 0, "drawn")
    rows = np.arange(len(lengths))
    texts = Texts("drawn", rows, [""] * len(rows), [""] * len(rows))
    return Split("drawn", Pairs("drawn", rows, texts, rows % len(NAMES), None, NAMES), tokens)


def examined(encoder: CrossEncoder, config: Config, split: Split) -> CrossEncoder:
    """The model as training takes it, still on the CPU."""
    examine(encoder, split.tokens, config.attn_implementation is not None)
    if config.weight_decay == 0:
        encoder.freeze_unused_rows(split.tokens)
    return encoder


def train(encoder: CrossEncoder, config: Config, split: Split, form: str, after_step: Callable[[], None]) -> None:
    """Trainer.loop on the fake device, on one batch of all pairs again and again, until `after_step` raises Enough.

    All that is known here of how a step is made: the loop calls `preemption.check` after each. `form`: plain, static
    (what is captured, where there is no Triton), or kernels (what is captured with them).
    """
    world, pairs = World(0, 1, 0, DEVICE), len(split)
    backend = Single(world, config)
    bar = SimpleNamespace(update=lambda: None)
    parts: dict[str, Any] = {
        "config": config,
        "world": world,
        "data": {"train": split},
        "sampler": GlobalBatchSampler(pairs, pairs, config.seed, 100, ""),
        "schedule": Schedule(config, 100),
        "identity": None,
        "model": encoder,
        "backend": backend,
        "output": SimpleNamespace(journal=SimpleNamespace(bar=bar)),
        "state": State(Window.new(DEVICE)),
        "preemption": SimpleNamespace(check=after_step),
    }
    own = {name: parts[name] for name in ("config", "world", "model", "backend", "state")}
    forward, size = backend.prepare(encoder), config.per_device_train_batch_size
    plain = PlainStep(
        **own,
        split=split,
        forward=forward,
        micro_batch_size=size,
        batch_size=config.train_batch_size or pairs,
    )
    trainer = Trainer(**parts, plain=plain)
    # A static step's trials of its first step compare values, and take most of the time; here there are no values.
    trials = ((StaticStep, "_check"), (StaticStep, "_check_update"), (Graphs, "_again"))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "available", return_value=form == "kernels"))
        for owner, name in trials:
            stack.enter_context(mock.patch.object(owner, name))
        trainer.static = None if form == "plain" else StaticStep(plain, recorder=None)
        trainer.loop()


def counted_step(encoder: CrossEncoder, config: Config, split: Split, form: str = "plain") -> Counted:
    """One step, the optimizer and the window included. `encoder` is on the fake device afterwards."""
    return last_of(WARM + 1, lambda check: train(to_fake_cuda(encoder), config, split, form, check))


def counted_evaluation(encoder: CrossEncoder, config: Config, split: Split) -> Counted:
    """One batch of an evaluation up to its logits on the host; weights are cast already, as the batch before did."""
    world, pairs, batches = World(0, 1, 0, DEVICE), len(split), 3
    longer = split_of(np.tile(split.tokens.lengths, batches), int(split.tokens.ids.max()) + 1)

    def run(check: Callable[[], None]) -> None:
        to_fake_cuda(encoder)
        for _ in range(WARM + 1):  # what is made once for a length is there the second time
            predict_logits(encoder, longer.pairs, longer.tokens, world, pairs, config.bf16, check)

    return last_of(WARM * batches + 3, run)


def last_of(times: int, run: Callable[[Callable[[], None]], None]) -> Counted:
    """What was counted between the last two of so many calls of the function that `run` is given."""
    seen: list[Counted] = []
    with fake_cuda(), Count() as count:

        def check() -> None:
            seen.append(count.taken())
            if len(seen) == times:
                raise Enough

        try:
            run(check)
        except Enough:
            return seen[-1]
    raise RuntimeError(f"the loop ended after {len(seen)} of {times} steps")
