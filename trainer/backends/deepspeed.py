"""DeepSpeed's ZeRO (Rajbhandari et al. 2020), stages 0 to 3: optimizer, gradients and weights sharded over the ranks.

Weights and sums of gradients are fp32 in every stage, and bf16 is autocast around the forward, as in the other
backends. So the run is the same; only what a rank keeps in memory differs. DeepSpeed's JSON is DeepSpeed's: here the
numbers that crossrank decides are filled in, and what contradicts them is refused.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import ranks
from trainer.backends.optim import parameter_groups, set_rate
from trainer.backends.share import Share
from trainer.backends.single import SavedTensors, Single, add_moments
from trainer.base.errors import UserError, unknown
from trainer.config import Config
from trainer.data.sampler import global_batch_size, num_forwards
from trainer.model.batch import Batch
from trainer.ranks import World

CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
NO_CLIPPING = 1e30  # a limit that no norm reaches: with 0, DeepSpeed does not compute the norm
DEPRECATED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
Settings = dict[str, Any]


class DeepSpeed(Single):
    name = "deepspeed"
    replicated = False

    def __init__(self, world: World, config: Config) -> None:
        super().__init__(world, config)
        # DeepSpeed's calls to torch, several a step: nothing that a user could change. Its own warnings are heard.
        warnings.filterwarnings("ignore", DEPRECATED, FutureWarning, r"torch\.distributed\.c10d_logger")
        ranks.form_group(world)
        try:
            import deepspeed
        except ImportError:
            raise UserError('DeepSpeed is not installed; pip install "crossrank[deepspeed]"') from None
        if world.device.type == "cpu":
            # An op for ranks of one machine that has to be compiled first; gloo does the same without a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        name = config.deepspeed or "zero2"
        settings = read_settings(name)
        if not world.all(world.broadcast(settings) == settings):
            raise UserError(f"the ranks' nodes see different DeepSpeed configs under the name {name}")
        self.settings = fill(settings, name, config, world.size)
        self.stage: int = self.settings["zero_optimization"]["stage"]
        self.sharded = self.stage > 0

    def prepare(self, module: nn.Module) -> Callable[[Batch], torch.Tensor]:
        import deepspeed

        self.module = module
        groups = parameter_groups(module, self.config)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self._make_optimizer(groups), config=self.settings, dist_init_required=False
        )
        return self.engine

    def _make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        offload = self.settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
        if offload == "cpu" and self.world.device.type != "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            c = self.config
            betas = (c.adam_beta1, c.adam_beta2)
            try:
                return DeepSpeedCPUAdam(groups, lr=c.learning_rate, betas=betas, eps=c.adam_epsilon, adamw_mode=True)
            except Exception as error:
                raise UserError(
                    f"the optimizer cannot be offloaded: DeepSpeedCPUAdam does not compile here ({error}); install g++ "
                    "and ninja, or choose a config without offload_optimizer"
                ) from None
        return super()._make_optimizer(groups)

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        # Ranks are averaged; ours are parts of one sum.
        self.engine.backward(loss * self.world.size)

    def step(self, learning_rate: float, max_grad_norm: float) -> torch.Tensor:
        set_rate(self.optimizer, learning_rate)
        norm = None
        if self.stage == 0:  # DeepSpeed would clip, and keep the norm to itself
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), max_grad_norm or torch.inf)
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm() if norm is None else norm)

    def _shape(self, parameter: Any) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)  # under stage 3 a parameter itself is empty

    def _extent(self, parameter: Any) -> tuple[int, int]:
        if self.stage == 0:
            return super()._extent(parameter)
        if self.stage == 3:
            each = len(self._padded(parameter, "weight"))
            first, last = (min(parameter.ds_numel, each * rank) for rank in (self.world.rank, self.world.rank + 1))
            return first, last
        if parameter._hp_mapping is None:  # it is on other ranks
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def _own(self, parameter: Any, kind: str) -> torch.Tensor:
        if self.stage == 0:
            return super()._own(parameter, kind)
        if self.stage == 3:
            start, stop = self._extent(parameter)
            return self._padded(parameter, kind)[: stop - start]
        own: torch.Tensor = parameter._hp_mapping.get_hp_fragment(None if kind == "weight" else kind)
        return own

    def _padded(self, parameter: Any, kind: str) -> torch.Tensor:
        """Stage 3: this rank's part of a weight or moment, which is as long on every rank."""
        wrapped: Any = self.optimizer
        key = None if kind == "weight" else kind
        shard, _ = wrapped._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
        part: torch.Tensor = shard.data
        return part

    def _set_own(self, parameter: Any, kind: str, run: torch.Tensor) -> None:
        super()._set_own(parameter, kind, run)
        if self.stage == 3 and kind == "weight":
            parameter.ds_tensor.data[: len(run)].copy_(run)

    def load_state(self, saved: SavedTensors, num_updates: int) -> None:
        super().load_state(saved, num_updates)
        if self.stage in (1, 2):  # each rank has its part, and from now on all the weights
            wrapped: Any = self.optimizer
            wrapped.update_lp_params()

    def make_moments(self, num_updates: int) -> None:
        wrapped: Any = self.optimizer
        if self.stage == 0:
            return super().make_moments(num_updates)
        flat = wrapped.fp32_partitioned_groups_flat if self.stage == 3 else wrapped.single_partition_of_fp32_groups
        add_moments(wrapped.optimizer, flat, num_updates)
        self._link_moments()
        return None

    def save_state(self) -> Share:
        self._link_moments()
        return super().save_state()

    def _link_moments(self) -> None:
        """DeepSpeed 0.19 links moments to parameters after the first group's first step, when the others have none."""
        wrapped: Any = self.optimizer
        if self.stage in (1, 2):
            wrapped._hp_optimizer_states_linked = False
            wrapped._lazy_init_hp_params_optimizer_state()

    def full_weights(self, module: nn.Module) -> dict[str, torch.Tensor]:
        with self._gathered(module):
            return super().full_weights(module)

    def load_weights(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        with self._gathered(module, modifier_rank=0):
            if self.world.is_main:
                module.load_state_dict(weights)
        if self.stage < 3:
            super().load_weights(module, weights)

    def _gathered(self, module: nn.Module, modifier_rank: int | None = None) -> AbstractContextManager[object]:
        """Stage 3: the full weights on every rank while it lasts."""
        import deepspeed

        parameters = list(module.parameters())
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank, enabled=self.stage == 3)


def read_settings(name: str) -> Settings:
    """A file of ds_configs by its name, or the user's own by its path. Raises UserError."""
    shipped = CONFIGS / f"{name}.json"
    path = shipped if shipped.is_file() else Path(os.path.expanduser(name))
    if not path.is_file():
        valid = [p.stem for p in CONFIGS.glob("*.json")]
        raise UserError(f"{unknown('DeepSpeed config', name, valid)}; or give the path of a JSON file")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a DeepSpeed config is a JSON object")
    return settings


def fill(settings: Settings, place: str, config: Config, world_size: int) -> Settings:
    """`settings` with the numbers that crossrank's fields decide, as DeepSpeed wants them. Raises UserError."""
    refuse_contradictions(settings, place, config, world_size)
    stage = _at(settings, "zero_optimization.stage") or 0
    dropped = ("optimizer", "fp16", "bf16", "train_batch_size")
    filled = _without_auto({key: value for key, value in settings.items() if key not in dropped})
    filled["zero_optimization"] = (filled.get("zero_optimization") or {}) | {"stage": stage}
    # crossrank's own loop accumulates, and tells DeepSpeed which forward is a step's last.
    return filled | {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if stage == 0 else config.max_grad_norm or NO_CLIPPING,
        # No module is safe for lower precision in what travels between ranks: gradients are summed in fp32.
        "torch_autocast": {"enabled": config.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def refuse_contradictions(settings: Settings, place: str, config: Config, world_size: int) -> None:
    """Raises UserError, naming both, where a key contradicts a field; "auto" never does."""
    batch = global_batch_size(config, world_size)
    ours: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch, "train_batch_size"),
        "train_micro_batch_size_per_gpu": (config.per_device_train_batch_size, "per_device_train_batch_size"),
        "gradient_accumulation_steps": (
            num_forwards(config.per_device_train_batch_size, batch, world_size),
            "gradient_accumulation_steps",
        ),
        "gradient_clipping": (config.max_grad_norm, "max_grad_norm"),
        "torch_autocast.enabled": (config.bf16, "bf16"),
        "torch_autocast.dtype": ("bfloat16", "bf16"),
        "optimizer.type": ("AdamW", "optimizer"),
        "optimizer.params.lr": (config.learning_rate, "learning_rate"),
        "optimizer.params.betas": ([config.adam_beta1, config.adam_beta2], "adam_beta1 and 2"),
        "optimizer.params.eps": (config.adam_epsilon, "adam_epsilon"),
        "optimizer.params.weight_decay": (config.weight_decay, "weight_decay"),
    }
    for key, (value, field) in ours.items():
        theirs = _at(settings, key)
        if theirs not in (None, "auto", value):
            raise UserError(f'{place}: {key} is {theirs}, but {field} is {value}; make them equal, or write "auto"')
    for key, fix in (("fp16", "--bf16"), ("bf16", "--bf16, with torch_autocast in the JSON: the weights stay fp32")):
        if _at(settings, f"{key}.enabled") not in (None, False, "auto"):
            raise UserError(f"{place}: {key}.enabled is set; crossrank computes in bf16 by {fix}")
    if "scheduler" in settings:
        raise UserError(f"{place}: has a scheduler; the schedule is --lr_scheduler_type and --warmup_ratio")
    if (stage := _at(settings, "zero_optimization.stage") or 0) not in (0, 1, 2, 3):
        raise UserError(f"{place}: unknown zero_optimization.stage {stage}; it is 0, 1, 2 or 3")


def _at(settings: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _without_auto(settings: Settings) -> Settings:
    """What is "auto" and not crossrank's is DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }
