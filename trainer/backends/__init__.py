"""Backends: the only place that knows how ranks are wired."""

from trainer.backends.single import Single
from trainer.base.errors import UserError
from trainer.config import Config
from trainer.ranks import World

__all__ = ["Single", "make_backend"]


def make_backend(config: Config, world: World) -> Single:
    """The backend that `config` names; auto is single on one rank and ddp on several, or deepspeed if that is set."""
    name = config.backend
    if config.exact_shards is not None and config.exact_shards % world.size:
        fitting = ", ".join(str(1 << power) for power in range(config.exact_shards.bit_length()))
        raise UserError(
            f"exact_shards {config.exact_shards} cannot be dealt evenly to {world.size} ranks; start one of {fitting}"
        )
    if name == "deepspeed" or (name == "auto" and config.deepspeed):
        from trainer.backends.deepspeed import DeepSpeed

        return DeepSpeed(world, config)
    if name == "fsdp":
        from trainer.backends.fsdp import FSDP

        return FSDP(world, config)
    if name == "single" or (name == "auto" and world.size == 1):
        if world.size > 1:
            raise UserError(f"backend single cannot wire {world.size} ranks; use --backend ddp")
        return Single(world, config)
    from trainer.backends.ddp import DDP, Replicas

    # The exact step adds gradients up by itself.
    return DDP(world, config) if config.exact_shards is None else Replicas(world, config)
