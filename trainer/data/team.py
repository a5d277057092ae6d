"""The ranks that share a cache folder: mostly those of a node, or of all nodes where its file system is one."""

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
    """This rank's: those that share the folder, and ask for the same, which is JSON. Every rank takes part.

    Who shares the folder is tried: the first rank of every node makes a file there, and each rank is in the team of the
    first one whose file it sees. A node's ranks that see none have other file systems than its first one, as containers
    have: they try again among themselves. Where that one can make no file, they are taken to share what it has.
    """
    if world.size == 1:
        return Team(world, [0], folder)
    name, left = world.broadcast(f".seen-{uuid.uuid4().hex}"), world.nodes()
    teams: dict[int, list[int]] = {}
    while left:
        seen = _seen(world, folder, name, [node[0] for node in left])
        for node in left:
            able = seen[node[0]] is not None
            for rank in node:
                lead = seen[rank] if able else node[0]
                if lead is not None:
                    teams.setdefault(lead, []).append(rank)
        placed = {rank for members in teams.values() for rank in members}
        left = [others for node in left if (others := [rank for rank in node if rank not in placed])]
    members = next(members for members in teams.values() if world.rank in members)
    told = world.broadcast(world.gather_values(asked))
    return Team(world, sorted(rank for rank in members if told[rank] == told[world.rank]), folder)


def _seen(world: World, folder: Path, name: str, leads: list[int]) -> list[int | None]:
    """By rank, the first of the `leads` whose file it sees. Every rank takes part."""
    own = folder / f"{name}-{world.rank}"
    if world.rank in leads:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
    world.barrier()
    first = next((rank for rank in sorted(leads) if _exists(folder / f"{name}-{rank}")), None)
    seen: list[int | None] = world.broadcast(world.gather_values(first))
    with suppress(OSError):
        own.unlink()
    return seen


def _exists(path: Path) -> bool:
    with suppress(OSError):  # a folder that may not be entered
        return path.exists()
    return False
