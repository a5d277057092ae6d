"""crossrank, from Python and from the shell.

    import crossrank

    results = crossrank.train(recipe="demo", output_dir="runs/mine")  # what results.json holds
    model = crossrank.load("runs/mine/model")  # once
    scores = model.predict([("A man sleeps.", "A person rests.")])  # as often as one likes: (pairs, classes)
    metrics = crossrank.evaluate("runs/mine/model", test_file="test.parquet")

`python -m crossrank VERB ...` is the command `crossrank VERB ...`, also as a rank of torchrun or srun. The functions
are those of trainer/api.py, which is imported when one of them is first asked for.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
# `python -m` puts the working folder first: a user's evaluate.py or torch.py there would be imported for the package.
if __name__ == "__main__" and os.path.realpath(sys.path[0]) == os.getcwd() != HERE:
    del sys.path[0]

TYPE_CHECKING = False  # as in typing, which is not loaded for this: what editors and type checkers shall see
if TYPE_CHECKING:
    from trainer.api import evaluate, load, predict, train
    from trainer.base.errors import Preempted, TrainingFailed, UserError

__version__ = "0.2.0.dev0"
VERBS, ERRORS = ("evaluate", "load", "predict", "train"), ("Preempted", "TrainingFailed", "UserError")
__all__ = ["Preempted", "TrainingFailed", "UserError", "evaluate", "load", "predict", "train"]


def _own(name: str) -> None:
    """Makes `import NAME` mean the package beside this file, also where the working folder has a NAME.py."""
    import importlib.machinery
    import importlib.util

    loaded = sys.modules.get(name)
    if loaded is None:
        spec = importlib.machinery.PathFinder.find_spec(name, [HERE])
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    elif os.path.join(HERE, name) not in map(os.path.realpath, getattr(loaded, "__path__", [])):
        raise ImportError(
            f"crossrank's package {name} is hidden by {loaded.__file__}, which was imported before; rename that "
            "file, or import crossrank first"
        )


for _name in ("trainer", "launcher"):
    _own(_name)


def __getattr__(name: str) -> object:
    if name in VERBS:
        from trainer.base import environment, folders

        environment.set_libraries()
        folders.provide()
        from trainer import api

        globals().update({verb: getattr(api, verb) for verb in VERBS})
        return globals()[name]
    if name in ERRORS:
        from trainer.base import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "main"]


def main() -> None:
    """The command line, which ends this process."""
    from trainer.__main__ import run

    run()


if __name__ == "__main__":
    main()
