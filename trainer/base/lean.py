"""How the command line imports torch and transformers: only what a run comes to, and each file once.

Nothing here changes what a module does, and all of it is only sooner or later: what does not fit another version of a
library is imported as that has it. CROSSRANK_LEAN_IMPORTS=0 imports everything as Python does, at its own pace.
"""

import gc
import importlib.abc
import importlib.machinery
import inspect
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from trainer.base import dynamo, listing
from trainer.base.later import waiting

# What transformers imports because it is installed, or for models that are split over GPUs, and encoders never call.
LATER = (
    "peft",
    "scipy.optimize",
    "torch._dynamo._trace_wrapped_higher_order_op",
    "torch.distributed._composable",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.distributed.expert_parallel",
    "transformers.distributed.pipeline_parallel",
    "transformers.distributed.tensor_parallel",
)

_own = threading.Event()  # set in a process of our own


@contextmanager
def imports() -> Iterator[None]:
    """Around the imports of a process of our own."""
    if os.environ.get("CROSSRANK_LEAN_IMPORTS") == "0":
        yield
        return
    _own.set()
    after = AfterLoading()
    dynamo.postpone()
    sys.meta_path.insert(0, after)
    gc.disable()  # modules are no garbage, and each collection looks at all of them: a fifth of the time
    try:
        with waiting(*LATER), frames_by_name():
            yield
    finally:
        sys.meta_path.remove(after)
        gc.freeze()  # nor need those of the run look at them
        gc.enable()


@contextmanager
def further(foreign: bool = False) -> Iterator[None]:
    """Around what imports more of transformers, in a process whose imports began like that.

    `foreign`: it also imports code that a model brings, which may do with a name what no stand-in can.
    """
    with waiting(*LATER) if _own.is_set() and not foreign else nullcontext():
        yield


@contextmanager
def frames_by_name() -> Iterator[None]:
    """Has inspect find a frame's module by its name.

    It would compare the real path of every module's file, some ten calls of the file system each. torch asks, to note
    where each of its operators is defined.
    """
    real = inspect.getmodule

    def getmodule(object: Any, _filename: str | None = None) -> Any:
        if inspect.isframe(object):
            return sys.modules.get(object.f_globals.get("__name__", ""))
        return real(object, _filename)

    inspect.getmodule = getmodule
    try:
        yield
    finally:
        inspect.getmodule = real


class AfterLoading(importlib.abc.MetaPathFinder):
    """Calls what AFTER names with the module that has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in AFTER else None
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                AFTER[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class Pattern:
    """A regular expression that is compiled when it is used."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy asks for these
            raise AttributeError(name)
        if "compiled" not in vars(self):
            self.compiled = re.compile(self.pattern)
        return getattr(self.compiled, name)


def compile_later(module: Any) -> None:
    """Has transformers.core_model_loading compile what it renames in a model's files when it loads such a model.

    To load any model it makes the rules of all, a thousand expressions: a third of a second.
    """
    own = types.ModuleType("re", re.__doc__)
    vars(own).update(
        vars(re), compile=lambda pattern, flags=0: re.compile(pattern, flags) if flags else Pattern(pattern)
    )
    module.re = own


AFTER: dict[str, Callable[[Any], None]] = {
    "transformers.utils.import_utils": listing.keep,
    "transformers.core_model_loading": compile_later,
}
