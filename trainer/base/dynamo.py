"""torch._dynamo, torch.compile's reader of Python, as long as nothing is compiled.

It takes half a second to load, and the optimizer of a run that compiles nothing loads it, as DDP and transformers do:
to tell it what it must not compile. `postpone` puts a module in its place that gives the answers it would give a
process that has compiled nothing, and notes what it is told; whatever else is asked of it loads the real one, which is
told then. It stands for a private module, so it is for processes of our own: those of the command line.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

NAME = "torch._dynamo"


class Utils:
    """Its module of that name: what DDP asks for is answered, all else wakes it."""

    def __init__(self, dormant: "Dormant") -> None:
        self._dormant = dormant

    def get_optimize_ddp_mode(self) -> str:
        """A setting that only the real one has, and by default makes DDP what it is without it."""
        asleep = sys.modules.get(NAME) is self._dormant
        return "ddp_optimizer" if asleep else self._dormant.wake().utils.get_optimize_ddp_mode()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dormant.wake().utils, name)


class Dormant(types.ModuleType):
    """The module in place of torch._dynamo."""

    def __init__(self, finder: "Finder") -> None:
        super().__init__(NAME)
        self.finder = finder
        self.told: list[tuple[str, Any]] = []
        self.utils = Utils(self)

    def graph_break(self, *args: Any, **kwargs: Any) -> None:
        pass

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """As torch._disable_dynamo: fn is disabled by the real one as soon as that is there to compile it."""
        if fn is None:
            return functools.partial(self.disable, recursive=recursive, **options)
        if isinstance(fn, type) or not callable(fn):
            return self.wake().disable(fn, recursive, **options)

        disabled: Callable[..., Any] | None = None

        @functools.wraps(fn)
        def inner(*args: Any, **kwargs: Any) -> Any:
            nonlocal disabled
            if disabled is None and sys.modules.get(NAME) is not self:
                disabled = self.wake().disable(fn, recursive, **options)
            return (disabled or fn)(*args, **kwargs)

        return inner

    def allow_in_graph(self, fn: Any) -> Any:
        self.told.append(("allow_in_graph", fn))
        return fn

    def assume_constant_result(self, fn: Any) -> Any:
        self.told.append(("assume_constant_result", fn))
        return fn

    def wake(self) -> Any:
        """The real one."""
        if sys.modules.get(NAME) is self:
            sys.meta_path.remove(self.finder)
            del sys.modules[NAME]
            with suppress(AttributeError):  # while the real one loads, parts of it look there
                del sys.modules["torch"]._dynamo
            real = importlib.import_module(NAME)
            for what, fn in self.told:
                getattr(real, what)(fn)
        return importlib.import_module(NAME)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.wake(), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the dormant module, and wakes it where something inside it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != NAME and not name.startswith(f"{NAME}."):
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None:
            return None
        if name != NAME:
            sys.modules[NAME].wake()  # type: ignore[attr-defined]
            importlib.import_module(name)
        spec = importlib.machinery.ModuleSpec(name, self, is_package=found.submodule_search_locations is not None)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Dormant(self) if spec.name == NAME else sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def postpone() -> None:
    """From here on it is loaded where it is needed, unless it is there."""
    if NAME not in sys.modules:
        sys.meta_path.insert(0, Finder())
