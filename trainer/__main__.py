"""`crossrank VERB ...`, which is also `python -m trainer VERB ...` on every rank of torchrun or srun.

Exit codes: 0 done, 1 a failure of the program, 2 a mistake in the input, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from trainer.cli import given_fields, make_parser, parse, parse_train
from trainer.config import DataConfig, UserError, unknown

USAGE = """usage: crossrank VERB ...

  train      fine-tune a cross-encoder           crossrank train --recipe demo
  evaluate   score a model on labelled pairs     crossrank evaluate MODEL_DIR --test_file pairs.parquet
  predict    classify new pairs                  crossrank predict MODEL_DIR --input pairs.jsonl

`crossrank VERB --help` shows a verb's options. On several ranks: torchrun --nproc-per-node N -m trainer VERB ...
"""


def train(argv: list[str]) -> None:
    config = parse_train(argv)
    from trainer import train as training

    training.train(config)


def evaluate(argv: list[str]) -> None:
    from trainer.predict import EvaluateConfig, InferenceConfig, evaluate_model

    groups: tuple[Any, ...] = (DataConfig, InferenceConfig, EvaluateConfig)
    parser = make_parser("crossrank evaluate", groups, usage="crossrank evaluate MODEL_DIR [--field value ...]")
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a trained model: config, weights, tokenizer")
    values = parse(parser, argv)
    data, inference, output = (group(**given_fields(values, group)) for group in groups)
    evaluate_model(values["model"], data, inference, output)


def predict(argv: list[str]) -> None:
    from trainer.predict import InferenceConfig, PredictConfig, predict_file

    groups: tuple[Any, ...] = (PredictConfig, InferenceConfig)
    parser = make_parser("crossrank predict", groups, usage="crossrank predict MODEL_DIR [--field value ...]")
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a trained model: config, weights, tokenizer")
    values = parse(parser, argv)
    pairs, inference = (group(**given_fields(values, group)) for group in groups)
    predict_file(values["model"], pairs, inference)


VERBS: dict[str, Callable[[list[str]], None]] = {"train": train, "evaluate": evaluate, "predict": predict}


def main(argv: list[str] | None = None) -> int:
    verb, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        if verb not in VERBS:
            raise UserError(unknown("verb", verb, VERBS))
        VERBS[verb](rest)
    except UserError as error:
        report(f"crossrank: error: {error}")
        return 2
    except KeyboardInterrupt:
        report("crossrank: interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has had enough
        return 1
    except Exception:
        import traceback

        report(traceback.format_exc())
        return 1
    finally:
        if "torch" in sys.modules:
            from trainer import dist

            dist.stop()
    return 0


def report(text: str) -> None:
    """An error, once: by the first rank that fails, with its number."""
    import os

    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        from trainer import dist

        if not dist.first_to_fail():
            return
        text = f"[rank {os.environ.get('RANK', '?')}] {text}"
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
