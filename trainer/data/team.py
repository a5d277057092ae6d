"""The ranks that share a cache folder: those of a node, or of all nodes where its file system is one."""

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.base.errors import UserError
from trainer.data.stored import no_room
from trainer.ranks import World


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


def team_of(world: World, folder: Path) -> Team:
    """This rank's. Every rank takes part.

    Whether nodes share the folder is tried: rank 0 makes a file there, and the first rank of every node looks for it.
    """
    if world.size == 1:
        return Team(world, [0], folder)
    nodes = world.nodes()
    own = next(node for node in nodes if world.rank in node)
    if len(nodes) == 1:
        return Team(world, own, folder)
    name = world.broadcast(f".seen-{uuid.uuid4().hex}")
    if world.is_main:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    world.barrier()
    seen = world.broadcast(world.gather_values((folder / name).exists()))
    if world.is_main:
        with suppress(OSError):
            os.unlink(folder / name)
    sharing = [rank for node in nodes if seen[node[0]] for rank in node]
    return Team(world, sorted(sharing) if seen[own[0]] else own, folder)
