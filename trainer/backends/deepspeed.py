"""DeepSpeed's ZeRO (Rajbhandari et al. 2020), stages 0 to 3: optimizer, gradients and weights sharded over the ranks.

Weights and sums of gradients are fp32 in every stage, and bf16 is autocast around the forward, as in the other
backends. So the run is the same; only what a rank keeps in memory differs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from trainer import ranks
from trainer.backends.optim import parameter_groups, set_rate
from trainer.backends.share import Share
from trainer.backends.single import SavedTensors, Single, add_moments
from trainer.backends.zero_settings import fill, read_settings
from trainer.base.errors import UserError
from trainer.config import Config
from trainer.model.batch import Batch
from trainer.model.scattered import fill_buffers
from trainer.ranks import World

DEPRECATED = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"


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
        groups = parameter_groups(module, self.config)  # by the parameters' shapes, which stage 3 takes away
        if getattr(module, "hollow", False):
            self._fill(module)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self._make_optimizer(groups), config=self.settings, dist_init_required=False
        )
        return self.engine

    @property
    def scatters(self) -> bool:
        offloaded = self.settings["zero_optimization"].get("offload_param", {}).get("device", "none") != "none"
        return self.stage == 3 and self.world.size > 1 and not offloaded

    def _fill(self, module: nn.Module) -> None:
        """Partitions a hollow module, a parameter at a time, which rank 0 sends to the others."""
        import deepspeed

        first: Any = None
        for parameter in module.parameters():
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.world.device)
                torch.utils.swap_tensors(parameter, nn.Parameter(empty, parameter.requires_grad))
            if first is None:
                first, holder = parameter, nn.ParameterList([parameter])
                deepspeed.zero.Init(module=holder, config_dict_or_path=self.settings, dtype=torch.float32)
            else:
                first.convert_to_zero_parameters(param_list=[parameter])
        values = {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if self.world.is_main}
        fill_buffers(module, values, self.world)
        module.hollow = False  # type: ignore[assignment]

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
        if self.stage < 3:
            return super().full_weights(module)
        weights = {}
        for name, value in module.state_dict(keep_vars=True).items():
            with self._gathered(value):
                if self.world.is_main:
                    weights[name] = value.detach().to("cpu", copy=True)
        return weights

    @torch.no_grad()
    def load_weights(self, module: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        if self.stage < 3:
            return super().load_weights(module, weights)
        for name, value in module.state_dict(keep_vars=True).items():
            with self._gathered(value, modifier_rank=0):
                if self.world.is_main:
                    value.copy_(weights[name])
        return None

    def _gathered(self, value: Any, modifier_rank: int | None = None) -> AbstractContextManager[object]:
        """Stage 3: one full weight on every rank while it lasts; all at once would be the whole model on each."""
        import deepspeed

        sharded = hasattr(value, "ds_id")
        return deepspeed.zero.GatheredParameters([value], modifier_rank=modifier_rank, enabled=sharded)
