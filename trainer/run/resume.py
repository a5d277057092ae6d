"""Where a run begins: at its first step, or at a checkpoint of its own or of another run."""

import os
from dataclasses import dataclass
from pathlib import Path

from trainer.base.log import log
from trainer.config import Config
from trainer.ranks import World
from trainer.run.checkpoint import Checkpoints, load_given
from trainer.run.folder import RunFolder
from trainer.run.parts import Tensors
from trainer.run.state import Identity, Saved, State, Window
from trainer.run.verified import Checkpoint


@dataclass(frozen=True)
class Start:
    """`tensors` of the checkpoint; None where the run begins at its first step.

    `num_events`: lines of this folder's metrics.jsonl that belong to the state.
    """

    state: State
    tensors: Tensors | None
    num_events: int


def resume(
    config: Config,
    world: World,
    opened: RunFolder,
    checkpoints: Checkpoints,
    identity: Identity,
    places: dict[str, str],
) -> Start:
    """Every rank takes part. Raises UserError where the checkpoint is of another run; `places` names the splits."""
    found = find_checkpoint(config, world, checkpoints, opened.resuming)
    saved: Saved | None = world.broadcast(found.state if found else None)
    has_best = world.broadcast((opened.path / "model").exists()) or not config.keeps_best("dev" in places)
    if saved is None:
        state = State(Window.new(world.device))
    else:
        identity.check(saved, places)
        state = State.from_json(saved, identity.sampler, world, has_best)
    if saved and saved["best"] and state.best is None:
        log.info(f"the best model so far, of step {saved['best'][1]}, is not in {opened.path}: the best is that "
                 "of the evaluations to come, and any patience begins anew")  # fmt: skip
    if found is None or saved is None:
        return Start(state, None, 0)
    log.info(f"resuming at step {state.step} from {found.path}")
    own = found.path.parent == checkpoints.folder
    return Start(state, found.tensors, saved["num_events"] if own else 0)


def find_checkpoint(config: Config, world: World, checkpoints: Checkpoints, resuming: bool) -> Checkpoint | None:
    """The newest complete one of an unfinished run; where it has saved none, the one that the user names.

    Every rank takes part.
    """
    newest = checkpoints.newest() if resuming else None
    if newest is None and config.resume_from_checkpoint not in ("auto", "none"):
        return load_given(Path(os.path.expanduser(config.resume_from_checkpoint)), world)
    if newest is None and resuming:
        log.info(f"the run in {checkpoints.folder.parent} has no checkpoint yet: it starts from the beginning")
    return newest
