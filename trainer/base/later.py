"""Modules that are loaded when they are first used, and not when a library imports them.

Libraries import much that a run never comes to: transformers alone takes scipy's optimizers for detecting objects,
peft, accelerate, sharded tensors. Inside `waiting(...)` such an import gets a stand-in, and from it names that load
the module when they are called, asked for an attribute or derived from; that no object is an instance of as long as
nobody has loaded the module; and that are after that what the module calls so. When the block ends, the stand-ins
leave sys.modules: whoever imports the module then gets it. PEP 810 gives this to Python 3.15.
"""

import importlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Union


class Later:
    """A name of a module that waits."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__ = module, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return resolve(self)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "__signature__":
            return inspect.signature(resolve(self))
        if name.startswith("__"):  # what inspect and typing look for in any object
            raise AttributeError(name)
        return getattr(resolve(self), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (resolve(self),)

    def __instancecheck__(self, instance: object) -> bool:
        return is_loaded(self.__module__) and isinstance(instance, resolve(self))

    def __subclasscheck__(self, subclass: type) -> bool:
        return is_loaded(self.__module__) and issubclass(subclass, resolve(self))

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - it is no type, and `|` is what this defines

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


class Waiting(types.ModuleType):
    """What stands in sys.modules for a module, while it may."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # what the import machinery asks for
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is not self:  # loaded since, or the block is over
            return getattr(importlib.import_module(self.__name__), name)
        value = Later(self.__name__, name)
        setattr(self, name, value)
        return value


def resolve(waiting: Later) -> Any:
    """What it stands for. Loads the module."""
    if not is_loaded(waiting.__module__):
        for finder in [own for own in sys.meta_path if isinstance(own, Finder)]:
            finder.give_up(waiting.__module__)
    return getattr(importlib.import_module(waiting.__module__), waiting.__name__)


def is_loaded(name: str) -> bool:
    return name in sys.modules and not isinstance(sys.modules[name], Waiting)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for `roots` and the modules below them."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = [root for root in roots if root not in sys.modules]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        root = self._root(name)
        if root is None:
            return None
        if name == root and importlib.machinery.PathFinder.find_spec(name, path) is None:
            return None  # it is not installed, and whoever imports it is to hear so
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Waiting:
        return Waiting(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass

    def _root(self, name: str) -> str | None:
        return next((root for root in self.roots if f"{name}.".startswith(f"{root}.")), None)

    def give_up(self, name: str) -> None:
        """From now on imports of the root of `name` are imports."""
        if root := self._root(name):
            self.roots.remove(root)
            take_away([root])

    def end(self) -> None:
        take_away(self.roots)
        for root in self.roots:
            load_by_attribute(root)
        self.roots = []


_by_attribute: set[str] = set()  # modules that their packages load when they are asked for them


def load_by_attribute(name: str) -> None:
    """Has the package of a module load it when it is asked for that attribute.

    Libraries say torch.distributed.tensor without an import where another library, which now waits, has imported it.
    """
    package = sys.modules.get(name.rpartition(".")[0])
    if package is None or name in _by_attribute:
        return
    _by_attribute.add(name)
    before = vars(package).get("__getattr__")

    def __getattr__(own: str) -> Any:
        if f"{package.__name__}.{own}" == name:
            return importlib.import_module(name)
        if before is not None:
            return before(own)
        raise AttributeError(f"module {package.__name__!r} has no attribute {own!r}")

    package.__getattr__ = __getattr__  # type: ignore[method-assign]


def take_away(roots: Sequence[str]) -> None:
    """Takes the stand-ins of `roots` and below out of sys.modules and out of the packages that hold them."""
    for name, module in [item for item in list(sys.modules.items()) if isinstance(item[1], Waiting)]:
        if not any(f"{name}.".startswith(f"{root}.") for root in roots):
            continue
        del sys.modules[name]
        package, _, own = name.rpartition(".")
        if vars(sys.modules.get(package, sys)).get(own) is module:
            delattr(sys.modules[package], own)


@contextmanager
def waiting(*roots: str) -> Iterator[None]:
    """Inside, these modules and those below them wait, unless they are loaded already."""
    finder = Finder(roots)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.end()
