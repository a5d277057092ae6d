"""Words between the threads in which ranks write one checkpoint.

Collectives are the training's, and one more of them, from another thread, would mix with those. The process group's
store takes a few bytes under a name from any thread.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from trainer.base.errors import TrainingFailed
from trainer.ranks import World

Message = dict[str, Any]
LAST_CALL = 5.0  # seconds that others have, when one of them is gone in the middle of a checkpoint


class Abandoned(Exception):
    """Nobody will say anything any more; on rank 0 it says what is missing."""


class Post:
    """Of one checkpoint; its name is no other's, also where a program trains twice.

    `patience`: how many seconds a word may take.
    """

    def __init__(self, name: str, world: World, patience: float) -> None:
        self.name, self.world, self.patience = f"crossrank/checkpoint/{name}", world, patience
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.last_call: float | None = None

    @classmethod
    def new(cls, world: World, patience: float) -> "Post":
        """Every rank takes part."""
        return cls(world.broadcast(secrets.token_hex(8)), world, patience)

    def tell(self, who: object, message: Message) -> None:
        """Raises Abandoned where the store is gone with rank 0."""
        try:
            self.store.set(f"{self.name}/{who}", json.dumps(message))
            self.store.add(f"{self.name}/told", 1)
        except (RuntimeError, ValueError):
            raise Abandoned from None

    def hear(self, who: object) -> Message:
        """Raises Abandoned where it does not come, or says that the checkpoint is given up."""
        if not self._until(lambda: self.store.check([f"{self.name}/{who}"])):
            raise Abandoned
        message: Message = json.loads(self.store.get(f"{self.name}/{who}"))
        if who == "folder" and "error" in message:
            raise Abandoned
        return message

    def collect(self) -> dict[str, Any]:
        """On rank 0: the others' files, as they have written them. Raises TrainingFailed where one could not."""
        others = range(1, self.world.size)
        if not self._until(lambda: self.store.add(f"{self.name}/told", 0) == self.world.size):  # with rank 0's word
            missing = [rank for rank in others if not self.store.check([f"{self.name}/{rank}"])]
            what = f"rank {', '.join(map(str, missing))} did not write its part of a checkpoint"
            if self.last_call is not None:
                raise Abandoned(what)
            raise TrainingFailed(
                f"{what} within {self.patience:.0f} s (ddp_timeout); the checkpoints before it are whole"
            )
        said = [self.hear(rank) for rank in others]
        if errors := [message["error"] for message in said if "error" in message]:
            raise TrainingFailed(errors[0])
        return {message["file"]: message["described"] for message in said}

    def see_out(self) -> None:
        """Until rank 0 has the checkpoint, or has given it up: when one rank ends, launchers end the others."""
        self._until(lambda: self.store.check([f"{self.name}/end"]))

    def hurry(self) -> None:
        """Some rank is gone: what others say now comes soon, or never."""
        self.last_call = time.monotonic() + LAST_CALL

    @staticmethod
    @contextmanager
    def answering(post: "Post | None") -> Iterator[None]:
        """On rank 0: whatever happens, the others do not wait for a word; at the end what was said is forgotten."""
        try:
            yield
        except BaseException:
            if post is not None:
                with suppress(Abandoned):
                    post.tell("folder", {"error": ""})
                    post.tell("end", {})
            raise
        if post is not None:
            post.tell("end", {})
            for who in ("folder", "told", *range(1, post.world.size)):
                post.store.delete_key(f"{post.name}/{who}")

    def _until(self, happened: Any) -> bool:
        """Whether it does in time. Raises Abandoned where the store is gone with rank 0."""
        deadline, pause = time.monotonic() + self.patience, 0.005
        try:
            while not happened():
                if time.monotonic() > min(deadline, self.last_call or deadline):
                    return False
                time.sleep(pause)
                pause = min(2 * pause, 0.25)
        except (RuntimeError, ValueError):
            raise Abandoned from None
        return True
