"""What a run has done so far: the one object that a checkpoint's state.json is written from and read into."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from trainer.base.errors import UserError
from trainer.data.sampler import GlobalBatchSampler
from trainer.ranks import World
from trainer.run.versions import versions


@dataclass
class Window:
    """What has happened since the last log line; what is on the device stays there until it is logged."""

    loss: torch.Tensor
    nonfinite: torch.Tensor  # (2,) first step + 1 whose own loss, or whose gradient norm, was not finite; 0 = none
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    seconds_before: float = 0.0  # in a run that this one resumes
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def new(cls, device: torch.device) -> Window:
        return cls(torch.zeros((), device=device), torch.zeros(2, dtype=torch.int64, device=device))

    def count(
        self, number: int | torch.Tensor, loss: torch.Tensor, norm: torch.Tensor, own: torch.Tensor | None = None
    ) -> None:
        """What of step `number`, counted from 1, is on the device.

        `loss` adds up over ranks; `own` is what this rank has computed, if it is not that.
        """
        self.loss += loss
        bad = ~torch.isfinite(torch.stack([loss if own is None else own, norm.to(loss.device)]))
        self.nonfinite.copy_(torch.where((self.nonfinite == 0) & bad, number, self.nonfinite))

    def add(self, samples: int, tokens: int) -> None:
        """The rest of it."""
        self.steps, self.samples, self.tokens = self.steps + 1, self.samples + samples, self.tokens + tokens

    def restart(self) -> None:
        """Begins a new one, in the same place on the device."""
        self.loss.zero_()
        self.nonfinite.zero_()
        self.steps = self.samples = self.tokens = 0
        self.seconds_before, self.started = 0.0, time.perf_counter()

    def start(self) -> None:
        """Begins to count the time."""
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is not training does not count as its time."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused


@dataclass
class Totals:
    """Of the run so far; seconds do not overlap."""

    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    evaluated: int = 0
    interruptions: int = 0
    skipped_steps: int = 0
    energy: list[dict[str, Any]] = field(default_factory=list)  # a row a node and stretch of the run, those before

    def add(self, window: Window, seconds: float) -> None:
        """A window that has been logged, after `seconds`."""
        self.train_seconds += seconds
        self.samples += window.samples
        self.tokens += window.tokens


class SavedWindow(TypedDict):
    loss: float  # sum over ranks
    steps: int
    samples: int
    tokens: int
    seconds: float


class Saved(TypedDict):
    """state.json."""

    sampler: dict[str, int | str]  # GlobalBatchSampler.position
    data: dict[str, str]  # fingerprint of each role's split
    rest: str | None  # Identity.frozen
    exact: dict[str, Any] | None  # Identity.exact
    num_updates: int
    totals: dict[str, Any]  # Totals
    best: tuple[float, int] | None
    waited: int
    window: SavedWindow
    pending_evaluation: bool
    step_form: str
    num_events: int  # lines of metrics.jsonl that belong to it
    world_size: int
    backend: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Identity:
    """What makes the run, beyond its config. A checkpoint of another one is refused."""

    sampler: GlobalBatchSampler
    data: dict[str, str]  # fingerprint of each role's split
    frozen: str | None  # fingerprint of what is in no checkpoint: rows, layers, or the base model of LoRA
    exact: dict[str, Any] | None = None  # what decides bits, where the run promises the same on any number of ranks

    def check(self, saved: Saved, places: dict[str, str]) -> None:
        """Raises UserError where a checkpoint's run had other data, named by `places`, froze other weights, or was
        computed in a way that gives other bits, where these shall be the same."""
        for role, fingerprint in saved.get("data", {}).items():
            if self.data.get(role, fingerprint) != fingerprint:
                raise UserError(f"{places[role]} is not the {role} data with which the run began")
        if saved.get("rest") != self.frozen:
            raise UserError(
                "the checkpoint cannot be resumed here: its run froze other rows of the embedding table, embeddings or "
                "layers of another model, or all of another model, under LoRA; give the same model_name_or_path, init, "
                "seed, weight_decay, freeze and lora fields"
            )
        before, now = saved.get("exact") or {}, self.exact or {}
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed:
            differing = "; ".join(f"{name}: saved {before[name]!r}, now {now[name]!r}" for name in changed)
            raise UserError(f"under exact_shards the checkpoint cannot be resumed here, bits would differ: {differing}")


@dataclass
class State:
    """Where the run is.

    Attributes:
        step: optimizer steps done, over all epochs.
        best: value of metric_for_best_model, higher is better, and the step that had it.
        waited: evaluations since one that was better than the best before it, as early stopping counts.
        saved_step: of the newest checkpoint.
        pending_evaluation: an evaluation of this step is still to be done.
        step_form: how steps are taken: plain, static or captured; or why they are plain, where another form failed.
    """

    window: Window
    step: int = 0
    totals: Totals = field(default_factory=Totals)
    best: tuple[float, int] | None = None
    waited: int = 0
    saved_step: int = -1
    pending_evaluation: bool = False
    step_form: str = "plain"

    @property
    def num_updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.totals.skipped_steps

    def to_json(
        self, identity: Identity, world: World, backend: str, num_events: int, energy: list[dict[str, Any]]
    ) -> Saved:
        """state.json. Every rank takes part; `num_events` lines of metrics.jsonl belong to it."""
        window = self.window
        return {
            "sampler": identity.sampler.position(self.step),
            "data": identity.data,
            "rest": identity.frozen,
            "exact": identity.exact,
            "num_updates": self.num_updates,
            "totals": dataclasses.asdict(self.totals) | {"energy": energy},
            "best": self.best,
            "waited": self.waited,
            "window": {
                "loss": float(world.sum(window.loss.clone())),
                "steps": window.steps,
                "samples": window.samples,
                "tokens": window.tokens,
                "seconds": window.seconds,
            },
            "pending_evaluation": self.pending_evaluation,
            "step_form": self.step_form,
            "num_events": num_events,
            "world_size": world.size,
            "backend": backend,
            "versions": versions(),
        }

    @classmethod
    def from_json(cls, saved: Saved, sampler: GlobalBatchSampler, world: World, has_best: bool) -> State:
        """The reverse, on every rank. Raises UserError if the samples' order was another one.

        `has_best`: whether the best model so far lies in this run's folder, if the run is to end with it. Of another
        run it does not: the best of this one starts over.
        """
        counted = saved["window"]
        window = Window.new(world.device)
        window.loss += counted["loss"] if world.is_main else 0.0
        window.steps, window.samples, window.tokens = counted["steps"], counted["samples"], counted["tokens"]
        window.seconds_before = counted["seconds"]
        totals = Totals(**saved["totals"])
        totals.interruptions += 1
        best, waited = (saved["best"], saved.get("waited", 0)) if has_best else (None, 0)
        step = sampler.seek(saved["sampler"])
        form = str(saved.get("step_form", "plain"))
        kept = best and (best[0], best[1])
        return cls(window, step, totals, kept, waited, step, saved["pending_evaluation"], form)
