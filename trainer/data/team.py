"""The ranks that share a cache folder: those of a node, or of all nodes where its file system is one."""

import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError
from trainer.data.stored import no_room
from trainer.ranks import ALONE, World


@dataclass(frozen=True)
class Team:
    """What one of its `members`, ascending ranks, writes into the folder, all of them can read."""

    world: World
    members: list[int]
    folder: Path

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once."""
        return self.world.rank == self.members[0]

    def once(self, name: str, make: Callable[[], Any], check: Callable[[], None]) -> Any:
        """What `make`, called by the first member, returns: JSON. The others call `check` while they wait.

        A run says each name once. Raises on all members the UserError that it raises, and one for its OSError.
        """
        title = f"{name} of rank {self.members[0]}"
        if not self.leads:
            told = self.world.wait_for(title, check)
            if "error" in told:
                raise UserError(told["error"])
            return told["value"]
        try:
            told = {"value": make()}
        except UserError as error:
            told = {"error": str(error)}
        except OSError as error:
            told = {"error": str(no_room(self.folder, error))}
        if len(self.members) > 1:
            self.world.say(title, told)
        if "error" in told:
            raise UserError(told["error"])
        return told["value"]

    def each(self, name: str, value: Any, check: Callable[[], None]) -> list[Any]:
        """Every member's JSON value, for the first one; nothing for the others, who do not wait."""
        if not self.leads:
            self.world.say(f"{name} of rank {self.world.rank}", value)
            return []
        return [value, *(self.world.wait_for(f"{name} of rank {rank}", check) for rank in self.members[1:])]


def alone(folder: Path) -> Team:
    """That of a process that has no others."""
    return Team(ALONE, [0], folder)


def team_of(world: World, folder: Path, asked: Any = None) -> Team:
    """This rank's: those that see the same folder, and ask for the same, which is JSON. Every rank takes part.

    Whether they see it is tried, first on all ranks, then on those of a host that do not see rank 0's: hosts may share
    a file system, and containers of one name may not.
    """
    if world.size == 1:
        return Team(world, [0], folder)
    makers = [0] * world.size
    seen = _seen(world, folder, makers)
    if not all(seen):
        for node in world.nodes():
            unseen = [rank for rank in node if not seen[rank]]
            for rank in unseen:
                makers[rank] = unseen[0]
        seen = _seen(world, folder, makers)
    told = world.broadcast(world.gather_values(asked))
    # Who sees nobody's file is alone.
    keys = [(maker if sees else rank, json.dumps(own))
            for rank, (maker, sees, own) in enumerate(zip(makers, seen, told, strict=True))]  # fmt: skip
    return Team(world, [rank for rank, key in enumerate(keys) if key == keys[world.rank]], folder)


def _seen(world: World, folder: Path, makers: list[int]) -> list[bool]:
    """By rank, whether it sees a file that the rank in its place in `makers` has made in the folder."""
    name = world.broadcast(f".seen-{uuid.uuid4().hex}")
    own = folder / f"{name}-{world.rank}"
    if world.rank in makers:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
    world.barrier()
    seen = world.broadcast(world.gather_values((folder / f"{name}-{makers[world.rank]}").exists()))
    with suppress(OSError):
        own.unlink(missing_ok=True)
    return list(seen)
