"""Whole runs: one process, several ranks, and the model that comes out."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import crossrank, events, losses, torchrun, weights_equal
from families import save_encoder
from safetensors.torch import load_file

SMALL = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
         "--logging_steps", "1", "--num_train_epochs", "2", "--dropout", "0.1", "--max_grad_norm", "0.5",
         "--track_emissions", "false", "--write_report", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on one process and on 2, 3 and 4 ranks: dropout on, clipping active, short last batches."""
    folder = tmp_path_factory.mktemp("runs")
    for ranks in (0, 2, 3, 4):
        # 330 = 5 * 64 + 10 pairs: with 4 forwards of 5 pairs a rank, some share of the last batch is empty.
        start = torchrun if ranks == 2 else crossrank
        start("train", *SMALL, "--output_dir", folder / str(ranks), ranks=ranks)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_gives_the_same_run(runs, ranks):
    ours, reference = runs / str(ranks), runs / "0"
    assert len(losses(reference)) == 12
    assert np.allclose(losses(ours), losses(reference), rtol=0, atol=1e-5)
    for mine, theirs in zip(events(ours, "train"), events(reference, "train"), strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert mine["learning_rate"] == theirs["learning_rate"]
    weights_equal(ours, reference, within=1e-4)


def test_evaluation_is_the_same_to_the_last_digit(runs, tmp_path):
    """The same model scored by any number of ranks."""
    from trainer.data.builtin import pairs

    table = tmp_path / "dev.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in pairs("dev")[:331]))
    options = ["evaluate", runs / "0" / "model", "--validation_file", table, "--per_device_eval_batch_size", "16"]
    metrics = []
    for ranks in (0, 2, 3, 4):
        crossrank(*options, "--output_dir", tmp_path / str(ranks), ranks=ranks)
        metrics.append(json.loads((tmp_path / str(ranks) / "results.json").read_text())["metrics"])
    assert all(scores == metrics[0] for scores in metrics)
    assert set(metrics[0]["dev"]["by_source"]) == {row["source"] for row in pairs("dev")[:331]}


def test_accumulation_is_the_same_run(runs, tmp_path):
    crossrank("train", *SMALL, "--per_device_train_batch_size", "7", "--output_dir", tmp_path / "run")
    assert np.allclose(losses(tmp_path / "run"), losses(runs / "0"), rtol=0, atol=1e-5)
    crossrank("train", *SMALL, "--per_device_train_batch_size", "5", "--output_dir", tmp_path / "two", ranks=2)
    assert np.allclose(losses(tmp_path / "two"), losses(runs / "0"), rtol=0, atol=1e-5)


def test_repeats_are_bit_equal(runs, tmp_path):
    crossrank("train", *SMALL, "--output_dir", tmp_path / "run")
    again, first = weights(tmp_path / "run"), weights(runs / "0")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_gradient_checkpointing_is_the_same_run(runs, tmp_path):
    crossrank("train", *SMALL, "--gradient_checkpointing", "--output_dir", tmp_path / "run")
    assert np.allclose(losses(tmp_path / "run"), losses(runs / "0"), rtol=0, atol=1e-5)


def test_padded_is_the_same_run(runs, tmp_path):
    crossrank("train", *SMALL, "--unpad", "false", "--output_dir", tmp_path / "run")
    assert np.allclose(losses(tmp_path / "run"), losses(runs / "0"), rtol=0, atol=1e-5)


def test_another_seed_is_another_run(runs, tmp_path):
    crossrank("train", *SMALL, "--seed", "1", "--max_steps", "3", "--output_dir", tmp_path / "run")
    assert not np.allclose(losses(tmp_path / "run"), losses(runs / "0")[:3], atol=1e-3)


def test_the_run_folder(runs):
    folder = runs / "2"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["metrics"]) == {"builtin-dev", "builtin-test"}
    assert (results["world_size"], results["backend"]) == (2, "ddp")
    counted = {"steps", "epochs", "interruptions", "skipped_steps", "best_step", "planned_steps",
               "stopped_early_at"}  # fmt: skip
    assert {"seconds", "samples_per_second", "tokens_per_second", *counted} == set(results["train"])
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "samples_per_second", "tokens_per_second"} <= set(
        events(folder, "train")[0]
    )
    rates = [event["learning_rate"] for event in events(folder, "train")]
    assert rates[0] == 0
    assert max(rates) == rates[2] == 1e-3  # two steps of warmup, 10 % of 12 rounded up
    assert (folder / "config.yaml").is_file()
    predictions = pq.read_table(folder / "predictions" / "builtin-test.parquet").to_pandas()
    assert predictions["index"].tolist() == list(range(101))
    scores = predictions[[f"score_{name}" for name in ("entailment", "neutral", "contradiction")]].to_numpy()
    assert np.allclose(scores.sum(1), 1)
    accuracy = (scores.argmax(1) == predictions["label"]).mean()
    assert accuracy == pytest.approx(results["metrics"]["builtin-test"]["accuracy"])


def test_the_model_gives_our_scores_elsewhere(runs, tmp_path):
    """sentence_transformers.CrossEncoder and transformers.pipeline read the model and agree with crossrank predict."""
    from trainer.data.builtin import LABEL_NAMES, pairs

    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import pipeline

    rows = pairs("test")[:20]
    model = runs / "0" / "model"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    crossrank("predict", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    ours = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    scores = np.array([[row[f"score_{name}"] for name in LABEL_NAMES] for row in ours])

    encoder = sentence_transformers.CrossEncoder(str(model))
    theirs = encoder.predict([(r["premise"], r["hypothesis"]) for r in rows], apply_softmax=True)
    assert np.allclose(theirs, scores, atol=1e-5)
    assert [encoder.config.id2label[int(i)] for i in theirs.argmax(1)] == [row["prediction"] for row in ours]

    classify = pipeline("text-classification", str(model), top_k=None)
    for row, mine in zip(
        classify([{"text": r["premise"], "text_pair": r["hypothesis"]} for r in rows]), ours, strict=True
    ):
        assert {c["label"]: c["score"] for c in row} == pytest.approx(
            {name: mine[f"score_{name}"] for name in LABEL_NAMES}, abs=1e-5
        )


def test_predict_formats(runs, tmp_path):
    model = runs / "0" / "model"
    tabs = crossrank("predict", model, text="A dog sleeps.\tAn animal sleeps.\nA cat.\tA dog.\n").stdout.splitlines()
    lines = crossrank("predict", model, text='{"premise": "A cat.", "hypothesis": "A dog."}\n').stdout.splitlines()
    one, other = json.loads(tabs[1]), json.loads(lines[0])
    assert [*one] == [*other]
    assert one["prediction"] == other["prediction"]
    assert [*one.values()][3:] == pytest.approx([*other.values()][3:], abs=1e-5)
    (tmp_path / "in.csv").write_text("sentence1,sentence2\nA cat.,A dog.\n")
    crossrank("predict", model, "--input", tmp_path / "in.csv", "--output", tmp_path / "out.tsv")
    header, row = (tmp_path / "out.tsv").read_text().splitlines()
    scores = ["score_entailment", "score_neutral", "score_contradiction"]
    assert header.split("\t") == ["sentence1", "sentence2", "prediction", *scores]
    assert row.split("\t")[:3] == ["A cat.", "A dog.", other["prediction"]]


def test_what_is_there_is_not_overwritten(runs, tmp_path):
    model, data = runs / "0" / "model", tmp_path / "in.csv"
    data.write_text("premise,hypothesis,label\na,b,0\n")
    for options in (["predict", model, "--input", data, "--output", data],
                    ["evaluate", model, "--test_file", data, "--output_dir", runs / "0"]):  # fmt: skip
        result = crossrank(*options, check=False)
        assert result.returncode == 2
        assert "never overwritten" in result.stderr
    assert data.read_text().startswith("premise")


def test_places_that_cannot_be_written(runs, tmp_path):
    """Said before any work is done."""
    model, data = runs / "0" / "model", tmp_path / "in.csv"
    data.write_text("premise,hypothesis,label\na,b,0\n")
    for options in (["predict", model, "--input", data, "--output", tmp_path / "none" / "out.csv"],
                    ["evaluate", model, "--test_file", data, "--output_dir", data],
                    ["evaluate", model, "--test_file", data, "--label_names", "a,b,c"],
                    ["train", *SMALL, "--output_dir", data]):  # fmt: skip
        result = crossrank(*options, check=False)
        assert result.returncode == 2, result.said
        assert "Traceback" not in result.stderr


def test_a_run_that_went_wrong_says_so(tmp_path):
    result = crossrank("train", *SMALL, "--learning_rate", "1e30", "--output_dir", tmp_path / "run", check=False)
    assert result.returncode == 1
    assert "is not finite" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_best_model_is_kept(tmp_path):
    """A learning rate that wrecks the model at the end: the one that was best is what is left."""
    options = "--learning_rate 0.03 --lr_scheduler_type constant --warmup_ratio 0 --eval_strategy steps --eval_steps 2 "
    options += "--load_best_model_at_end --metric_for_best_model loss"
    crossrank("train", *SMALL, *options.split(), "--output_dir", tmp_path / "run")
    evaluations = [e["loss"] for e in events(tmp_path / "run", "eval") if e["split"] == "builtin-dev"]
    *during, final = evaluations
    assert len(during) == 6
    assert final == pytest.approx(min(during))
    assert final < during[-1]


def test_bf16(runs, tmp_path):
    crossrank("train", *SMALL, "--bf16", "--output_dir", tmp_path / "run", ranks=2)
    assert np.allclose(losses(tmp_path / "run"), losses(runs / "0"), atol=0.05)
    assert not np.allclose(losses(tmp_path / "run"), losses(runs / "0"), atol=1e-6)
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}


def test_a_run_is_never_overwritten(runs):
    before = (runs / "0" / "results.json").read_bytes()
    result = crossrank("train", *SMALL, "--output_dir", runs / "0", check=False)
    assert result.returncode == 2
    assert "holds a finished run" in result.stderr
    assert (runs / "0" / "results.json").read_bytes() == before


SHORT = [*SMALL, "--max_steps", "4", "--eval_strategy", "no"]


def test_a_micro_batch_that_does_not_fit_is_split(tmp_path):
    """A GPU's memory that holds ten pairs a forward, played by an error: the same losses from smaller forwards."""
    script = tmp_path / "small_gpu.py"
    script.write_text(
        "import sys, torch\nfrom trainer import __main__, train\n"
        "prepare, backward = train.prepare, train.PlainStep.backward\n"
        "def on_a_gpu(*args):\n"
        "    trainer = prepare(*args)\n    train.fit_micro_batches(trainer.plain, trainer.sampler)\n"
        "    return trainer\n"
        "def small(self, current, rows, last):\n"
        "    if len(rows) > 10:\n        raise torch.OutOfMemoryError\n"
        "    return backward(self, current, rows, last)\n"
        "train.prepare, train.PlainStep.backward = on_a_gpu, small\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    crossrank("train", *SHORT, "--output_dir", tmp_path / "whole")
    result = crossrank("train", *SHORT, "--output_dir", tmp_path / "split", script=script)
    assert "continuing with 8 pairs per forward" in result.stderr
    assert np.allclose(losses(tmp_path / "split"), losses(tmp_path / "whole"), rtol=0, atol=1e-6)


@pytest.mark.full
def test_compiled_layers_compute_the_same(tmp_path):
    """On one rank and on two, with dropout inside what is compiled."""
    options = [*SHORT, "--model_name_or_path", save_encoder(tmp_path / "encoder", "gte")]
    crossrank("train", *options, "--output_dir", tmp_path / "plain")
    for ranks in (0, 2):
        crossrank("train", *options, "--torch_compile", "--output_dir", tmp_path / str(ranks), ranks=ranks)
        assert np.allclose(losses(tmp_path / str(ranks)), losses(tmp_path / "plain"), rtol=0, atol=1e-5)


FAILING = """
import os, sys
from trainer import __main__, finish, loop, train
if os.environ["RANK"] == "{rank}":
    def fail(*args, **kwargs):
        raise {error}
    {where} = fail
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "where", ["train.load_splits", "finish.write_predictions", "loop.CrossEncoder.save", "loop.Schedule.__call__"]
)
def test_the_failing_ranks_error_is_printed_once(tmp_path, rank, where):
    """One rank alone fails, in whatever phase: its message once, no hang, and the job fails."""
    if rank == 1 and where in ("finish.write_predictions", "loop.CrossEncoder.save"):
        pytest.skip("only rank 0 writes")
    script = tmp_path / "failing.py"
    script.write_text(
        FAILING.format(rank=rank, where=where, error='UserError("no such luck")').replace(
            "from trainer import", "from trainer.base.errors import UserError\nfrom trainer import"
        )
    )
    options = [*SMALL, "--max_train_samples", "64", "--max_eval_samples", "30", "--max_test_samples", "30"]
    start = torchrun if (rank, where) == (1, "loop.Schedule.__call__") else crossrank
    result = start("train", *options, "--output_dir", tmp_path / "run", ranks=2, check=False, script=script)
    assert result.returncode != 0
    assert result.said.count("no such luck") == 1
    assert f"[rank {rank}]" in result.said


def test_mistakes_are_reported_once(tmp_path):
    """Before the ranks have met, too, which makes it the launcher's business."""
    for start, options, expected in (
        (crossrank, ["--backend", "single"], "cannot wire 2 ranks"),
        (crossrank, ["--train_file", tmp_path / "none.csv"], "no such file"),
        (torchrun, ["--lerning_rate", "1"], "did you mean"),
    ):
        result = start("train", *SMALL, *options, ranks=2, check=False)
        assert result.returncode != 0
        assert result.said.count(expected) == 1
        assert "crossrank:" in result.said


BAD_MODELS = {
    "no weights": "--init random",
    "no tokenizer": "tokenizer",
    "no folder": "no such folder",
    "too long": "512 positions",
    "truncated weights": "no weights that can be loaded",
    "no attention": "transformers cannot make this model",
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(case, tmp_path, minilm):
    import shutil

    folder = tmp_path / "model"
    if case != "no folder":
        shutil.copytree(minilm, folder)
    if case == "no weights":
        (folder / "model.safetensors").unlink()
    if case == "truncated weights":
        (folder / "model.safetensors").write_bytes((minilm / "model.safetensors").read_bytes()[:100_000])
    if case == "no tokenizer":
        for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
            (folder / file).unlink()
    extra = {"too long": ["--max_length", "600"], "no attention": ["--attn_implementation", "foo"]}.get(case, [])
    extra += ["--init", "random"] if case == "no attention" else []
    result = crossrank("train", *SMALL, "--model_name_or_path", folder, *extra, check=False)
    assert result.returncode == 2, result.said
    assert BAD_MODELS[case] in result.stderr
    assert "Traceback" not in result.stderr


def test_an_encoder_alone_is_no_classifier(minilm):
    result = crossrank("predict", minilm, text="A\tB\n", check=False)
    assert result.returncode == 2
    assert "not a trained classifier" in result.stderr


def test_a_trained_model_without_its_weights(runs, tmp_path):
    """The advice is one that predict has."""
    import shutil

    shutil.copytree(runs / "0" / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    result = crossrank("predict", tmp_path / "model", text="A\tB\n", check=False)
    assert result.returncode == 2
    assert "holds model.safetensors" in result.stderr
    assert "--init" not in result.stderr


def test_classes_in_another_order_keep_their_meaning(runs, tmp_path):
    """A trained head under other label orders: when training goes on, and when it is scored on numbered labels."""
    from trainer.data.builtin import LABEL_NAMES, pairs

    order = ["contradiction", "neutral", "entailment"]
    numbered = tmp_path / "dev.csv"
    rows = [row | {"label": order.index(LABEL_NAMES[row["label"]])} for row in pairs("dev")[:101]]
    numbered.write_text(
        "premise,hypothesis,label\n" + "".join(f"{r['premise']},{r['hypothesis']},{r['label']}\n" for r in rows)
    )
    model = runs / "0" / "model"
    crossrank("evaluate", model, "--validation_file", numbered, "--label_names", json.dumps(order),
              "--output_dir", tmp_path / "evaluated")  # fmt: skip
    scores = json.loads((tmp_path / "evaluated" / "results.json").read_text())["metrics"]["dev"]
    expected = json.loads((runs / "0" / "results.json").read_text())["metrics"]["builtin-dev"]
    assert scores["loss"] == pytest.approx(expected["loss"])
    crossrank("train", *SMALL, "--model_name_or_path", model, "--train_file", numbered, "--validation_file", numbered,
              "--label_names", json.dumps(order), "--eval_on_start", "--max_steps", "1", "--train_batch_size", "8",
              "--output_dir", tmp_path / "run")  # fmt: skip
    assert events(tmp_path / "run", "eval")[0]["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("env", "expected"),
    [({"WORLD_SIZE": "2"}, "WORLD_SIZE is set without RANK"), ({"RANK": "0"}, "RANK is set without WORLD_SIZE")],
)
def test_half_set_ranks(env, expected):
    result = crossrank("train", *SMALL, check=False, **env)
    assert result.returncode == 2
    assert expected in result.stderr


def test_help_and_unknown_verbs():
    assert "crossrank VERB" in crossrank("--help").stdout
    assert "--train_batch_size" in crossrank("train", "--help").stdout
    assert "MODEL_DIR" in crossrank("predict", "--help").stdout
    assert "did you mean 'train'" in crossrank("trian", check=False).stderr


@pytest.mark.parametrize("options", [[], ["--eval_strategy", "epoch", "--test_file", "TEST"]])
def test_without_a_dev_split_nothing_is_evaluated_while_it_trains(options, tmp_path):
    from trainer.data.builtin import pairs
    from trainer.report.read import read_run

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs("train")[:60]))
    options = [str(tmp_path / "train.jsonl") if option == "TEST" else option for option in options]
    result = crossrank("train", "--model_name_or_path", "builtin", "--train_file", tmp_path / "train.jsonl",
                       "--max_steps", "12", "--eval_steps", "5", "--train_batch_size", "8", *options,
                       "--track_emissions", "false", "--output_dir", tmp_path / "run")  # fmt: skip
    assert result.said.count("no dev split: nothing is evaluated while the run trains") == 1
    assert [event["step"] for event in events(tmp_path / "run", "eval")] == ([12] if options else [])
    assert list(read_run(tmp_path / "run").results["metrics"]) == (["train-test"] if options else [])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ("No final scores." in card) == ("metrics:" not in card) == (not options)
    for needs in (["--load_best_model_at_end"], ["--eval_on_start"], ["--early_stopping_patience", "1"]):
        result = crossrank("train", "--recipe", "demo", "--train_file", tmp_path / "train.jsonl", *needs, check=False)
        assert f"{needs[0][2:]} needs a dev split" in result.stderr


def test_a_batch_of_more_than_all_pairs_is_said(tmp_path):
    (tmp_path / "train.csv").write_text("premise,hypothesis,label\na,b,0\na cat,a dog,1\n")
    result = crossrank("train", "--model_name_or_path", "builtin", "--train_file", tmp_path / "train.csv",
                       "--max_steps", "1", "--eval_strategy", "no", "--train_batch_size", "500", *SMALL[-4:],
                       "--output_dir", tmp_path / "run")  # fmt: skip
    assert "a step has 2 pairs, all that there are: fewer than its batch of 500" in result.stderr
    assert "no dev split" not in result.stderr
