"""Which form a run's steps have: plain, static, or captured as CUDA graphs."""

from typing import get_args

from trainer.base.log import log
from trainer.config import StepForm
from trainer.model import kernels
from trainer.step.graphs import captured
from trainer.step.plain import PlainStep
from trainer.step.static import StaticStep


def make_step(plain: PlainStep) -> StaticStep | None:
    """The step that the config asks for, None = the plain one; notes it in the run's state."""
    config, device, state = plain.config, plain.world.device, plain.state
    before, state.step_form = state.step_form, "plain"
    if config.step_form == "plain" or (config.step_form == "auto" and device.type == "cpu"):
        return None
    failed = before if before not in get_args(StepForm) else ""
    if reason := _why_plain(plain) or failed:
        log.info(f"steps are plain, not captured: {reason}")
        state.step_form = failed or "plain"
        return None
    if not kernels.available(device):
        log.info("no Triton for this GPU: attention and dropout run by torch's own operations")
    record = None if config.step_form == "static" else captured(device)
    state.step_form = "captured" if record else "static"
    if state.step > 0 and before != state.step_form:
        log.warning(f"the steps before were {before}, and these are {state.step_form}, which round differently")
    return StaticStep(plain, record)


def _why_plain(plain: PlainStep) -> str:
    """What of the run no static step can do, or ""."""
    config, layout = plain.config, plain.model.layout
    if layout is None or not layout.unpad:
        return "the model runs padded"
    if plain.backend.name not in ("single", "ddp"):
        return f"{plain.backend.name} keeps its own"
    for name in ("torch_compile", "gradient_checkpointing", "skip_nonfinite"):
        if getattr(config, name):
            return f"{name} is set"
    return ""
