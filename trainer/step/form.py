"""Which form a run's steps have: plain, static, or captured as CUDA graphs."""

from typing import get_args

from trainer.base.errors import out_of_memory
from trainer.base.log import log
from trainer.config import StepForm
from trainer.model import kernels
from trainer.step.graphs import Captured
from trainer.step.plain import PlainStep
from trainer.step.static import StaticStep


def make_step(plain: PlainStep) -> StaticStep | None:
    """The step that the config asks for, None = the plain one; notes it in the run's state. Every rank takes part."""
    config, device, state = plain.config, plain.world.device, plain.state
    before, state.step_form = state.step_form, "plain"
    failed = before if before not in get_args(StepForm) else ""
    # Kernels that are chosen by trying, and sums in the order of the ranks, are nothing for an exact run.
    auto = "captured" if device.type == "cuda" and config.exact_shards is None else "plain"
    form = {"auto": auto}.get(config.step_form, config.step_form)
    if state.step > 0 and form != before and not failed:
        log.warning(f"the steps before were {before}, and these are {form}, which round differently")
    if form == "plain":
        return None
    if reason := failed or _why_plain(plain):
        log.info(f"no {form} steps: {reason}")
        state.step_form = failed or "plain"
        return None
    static = _made(plain, form)
    if not plain.world.all(static is not None):
        log.warning(f"no {form} steps: they need more memory than there is")
        return None
    state.step_form = form
    if not kernels.available(device):
        log.info("no Triton for this GPU: attention and dropout run by torch's own operations")
    return static


def _made(plain: PlainStep, form: str) -> StaticStep | None:
    """None where the memory does not suffice."""
    try:
        return StaticStep(plain, Captured(plain.world.device) if form == "captured" else None)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def _why_plain(plain: PlainStep) -> str:
    """What of the run no static step can do, or ""."""
    config, layout = plain.config, plain.model.layout
    if config.attn_implementation is not None:
        return "attn_implementation is set"
    if layout is None or not layout.unpad:
        return "the model runs padded"
    if plain.backend.name not in ("single", "ddp"):
        return f"{plain.backend.name} keeps its own"
    for name in ("torch_compile", "gradient_checkpointing", "skip_nonfinite"):
        if getattr(config, name):
            return f"{name} is set"
    return ""
