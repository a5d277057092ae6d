"""`crossrank VERB ...`, which is also `python -m crossrank VERB ...` on every rank of torchrun or srun.

Exit codes: 0 done, 1 a failure of the program, 2 a mistake in the input, 85 stopped on request and saved (start the
same command again to resume), 130 interrupted.
"""

import atexit
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from trainer.base import folders, lean
from trainer.base.environment import Place, heard, read_place, set_libraries
from trainer.base.errors import (
    EXIT_CODE,
    Preempted,
    RankGone,
    Terminated,
    TrainingFailed,
    UserError,
    cut_off,
    first_line,
    named,
    unknown,
)
from trainer.base.files import write_text
from trainer.base.log import start_log
from trainer.config import DataConfig

USAGE = """usage: crossrank VERB ...

  train      fine-tune a cross-encoder           crossrank train --recipe demo
  evaluate   score a model on labelled pairs     crossrank evaluate MODEL_DIR --test_file pairs.parquet
  predict    classify new pairs                  crossrank predict MODEL_DIR --input pairs.jsonl
  report     model card and pictures of a run    crossrank report RUN_DIR [RUN_DIR ...]
  plan       time and memory, before a run       crossrank plan --recipe allnli-100k --device rtx3090
  doctor     check this machine                  crossrank doctor --ranks 2
  launch     start a run: here, by torchrun      crossrank launch slurm --nodes 2 --gpus_per_node 4 -- train ...
             or in a Slurm job

`crossrank VERB --help` shows a verb's options. On several ranks: torchrun --nproc-per-node N -m crossrank VERB ...
"""


def train(argv: list[str]) -> None:
    from trainer.cli import parse_train

    config = parse_train(argv)
    for name in filter(heard, config.preemption_signals):
        signal.signal(getattr(signal, name), stop_early)
    with lean.imports():  # which take a second or two, and more on a network file system
        from trainer import api
    api.train(config)


def stop_early(number: int, frame: object) -> NoReturn:
    """Until the run takes the signals itself: it would die of them, and a batch script would not queue it again.

    Python's own Ctrl-C would surface in the middle of torch, which turns it into errors of other kinds.
    """
    code, text = (
        EXIT_CODE,
        f"stopped by {signal.Signals(number).name} before the run began; start the same command again",
    )
    if number == signal.SIGINT:
        code, text = 130, "interrupted"
    record_exit_code(code)
    if _place().rank == 0:
        print(f"crossrank: {text}", file=sys.stderr, flush=True)
    os._exit(code)


def terminate(number: int, frame: object) -> NoReturn:
    raise Terminated


def scoring(verb: str, argv: list[str], *groups: Any) -> list[Any]:
    """The model's folder and the groups of fields of a verb that scores pairs."""
    from trainer.cli import asks_for_help, grouped, make_parser, parse

    usage = f"crossrank {verb} MODEL_DIR [--field value ...]"
    signal.signal(signal.SIGTERM, terminate)
    parser = make_parser(f"crossrank {verb}", groups, asks_for_help(argv), usage=usage)
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a trained model: config, weights, tokenizer")
    values = parse(parser, argv)
    return [values.pop("model"), *grouped(values, *groups)]


def evaluate(argv: list[str]) -> None:
    with lean.imports():
        from trainer.predict import InferenceConfig
        from trainer.score import EvaluateConfig, evaluate_model, tables
    metrics = evaluate_model(*scoring("evaluate", argv, DataConfig, InferenceConfig, EvaluateConfig))
    if _place().rank == 0:
        print(tables(metrics))


def predict(argv: list[str]) -> None:
    with lean.imports():
        from trainer.predict import InferenceConfig, PredictConfig, predict_file
    predict_file(*scoring("predict", argv, PredictConfig, InferenceConfig))


def report(argv: list[str]) -> None:
    from trainer.cli import make_parser, parse
    from trainer.report.write import report as write

    start_log(is_main=True)

    parser = make_parser("crossrank report", (), usage="crossrank report RUN_DIR [RUN_DIR ...] [--output_dir FOLDER]")
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help="folders of runs; several are compared")
    parser.add_argument("--output_dir", help="where the comparison of several runs goes (default: report)")
    values = parse(parser, argv)
    target = values.get("output_dir")
    write([os.path.expanduser(run) for run in values["runs"]], target and os.path.expanduser(target))


def plan(argv: list[str]) -> None:
    from trainer.cli import parse_plan
    from trainer.plan.asked import PlanConfig

    config, asked = parse_plan(argv, PlanConfig)
    from trainer.plan.verb import show_plan

    show_plan(config, asked)


def doctor(argv: list[str]) -> None:
    from trainer.cli import grouped, make_parser, parse
    from trainer.doctor import DoctorConfig, diagnose

    parser = make_parser("crossrank doctor", (DoctorConfig,), usage="crossrank doctor [--json] [--ranks N]")
    if not diagnose(*grouped(parse(parser, argv), DoctorConfig)):
        raise TrainingFailed("something is wrong; the fixes are above")


def launch(argv: list[str]) -> None:
    from launcher.command import launch

    launch(argv)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "report": report,
    "plan": plan,
    "doctor": doctor,
    "launch": launch,
}


# What launch and doctor start, and nobody types: module and function.
INTERNAL = {
    "agent": ("launcher.agent", "main"),
    "preflight": ("launcher.preflight", "main"),
    "meet": ("trainer.doctor", "meet"),
    "gauge": ("trainer.plan.gauge", "main"),
}


def settle_process() -> None:
    """What holds for this process whatever the verb, and what libraries read when they are loaded."""
    if sys.stderr is None:  # it was closed; what is said there must not come among the results
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    set_libraries()
    # In a log every update of a library's progress bar would stay.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    settle_process()
    # DeepSpeed's launcher puts the rank before the verb; it is in the environment, too.
    verb, *rest = [arg for arg in argv if not arg.startswith("--local_rank=")] or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if verb in ("-V", "--version"):
        from crossrank import __version__

        print(f"crossrank {__version__}")
        return 0
    if verb in INTERNAL:
        module, function = INTERNAL[verb]
        return int(getattr(importlib.import_module(module), function)(rest))
    code = 0
    try:
        if verb not in VERBS:
            raise UserError(unknown("verb", verb, VERBS))
        if verb in ("train", "evaluate", "predict", "report", "plan"):
            folders.provide()
        VERBS[verb](rest)
    except UserError as error:
        return fail(2, f"error: {error}")
    except TrainingFailed as error:
        return fail(1, f"failed: {error}", follows=isinstance(error, RankGone))
    except KeyboardInterrupt as stop:
        return fail(143, "terminated") if isinstance(stop, Terminated) else fail(130, "interrupted")
    except Preempted as stop:
        code = EXIT_CODE
        record_exit_code(code)
        if str(stop):  # rank 0 speaks for all
            with suppress(OSError):  # to a terminal that has been closed
                print(f"crossrank: {stop}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # the reader of our output has had enough
        sys.stderr.close()
        return 1
    except OSError as error:  # a disk, a permission: no mistake of the program's
        return fail(1, f"failed: {first_line(error) if error.filename is None else named(error)}")
    except Exception as error:
        return fail_by(error)
    if "torch" in sys.modules:
        from trainer import ranks

        ranks.stop()
    return code


def record_exit_code(code: int, follows: bool = False) -> None:
    """Where agent and batch script look for it: torchrun turns every code of its ranks into 1.

    `follows`: from what has ended another rank, whose code stays.
    """
    if name := os.environ.get("CROSSRANK_EXIT_FILE"):
        with suppress(OSError):  # complete at any time: several ranks write theirs, and may be killed meanwhile
            # A launcher stops the others when one has failed: that they were stopped is not why the run ended.
            said = Path(name).read_text() if Path(name).exists() else ""
            if said and (follows or (code == EXIT_CODE and said != str(EXIT_CODE))):
                return
            write_text(Path(name), str(code), durable=False)


def _place() -> Place:
    """Which rank this is; where the variables contradict each other, the only one."""
    try:
        return read_place(os.environ)
    except ValueError:
        return Place()


def fail(code: int, text: str, follows: bool = False) -> int:
    """Reports a failure once, by the first rank that fails, with its number. `follows`: see record_exit_code."""
    place = _place()
    if re.search(r"^[^\n]*, rows? \d[^\n]*$", text):
        text += "; rows count from 0"
    if place.size == 1:
        record_exit_code(code)
        print(f"crossrank: {text}", file=sys.stderr)
        return code
    from trainer import ranks

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run that has failed has nothing to save
    # Ctrl-C reaches every rank by itself.
    if ranks.may_report_failure(patience=0.0 if code == 130 else 20.0):
        record_exit_code(code, follows)
        print(f"crossrank: [rank {place.rank}] {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Exit at once: a tidy exit would wait for collectives that the other ranks are stuck in.
    os._exit(code)


def fail_by(error: Exception) -> int:
    """An error that nobody has foreseen, unless it comes from another rank's end: with its traceback."""
    gone = cut_off(error) if isinstance(error, RuntimeError) and _place().size > 1 else None
    return fail(1, f"failed: {gone}" if gone else f"failed:\n{traceback.format_exc()}", follows=gone is not None)


def run() -> NoReturn:
    """The command as a process: its work is done and its files are written before it ends.

    Libraries leave threads behind. One that comes back from C++ while Python takes itself apart aborts the process: a
    rank of a run that was done and saved would fail, about once in a thousand times. So Python is not taken apart.
    """
    try:
        code = main()
        print(end="", flush=True)
    except BrokenPipeError:
        code = 1
    except OSError as error:  # stdout is a file on a full disk
        code = fail(1, f"failed: {first_line(error)}")
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
