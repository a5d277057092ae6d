"""Whole runs that learn one score in place of classes, and their model in sentence_transformers and transformers."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import crossrank, events, losses, weights_equal

from trainer import api
from trainer.base.errors import UserError
from trainer.cli import parse_train
from trainer.config import ModelConfig
from trainer.model.loading import load_for_training, load_trained
from trainer.report.page import page
from trainer.report.read import read_run
from trainer.report.write import report, write_report
from trainer.score import tables

OBJECTIVES = ("binary_cross_entropy", "mse")
# 90 pairs in steps of 32: the last one of an epoch has 26.
RUN = ["--model_name_or_path", "builtin", "--train_batch_size", "32", "--per_device_train_batch_size", "10",
       "--num_train_epochs", "4", "--learning_rate", "3e-4", "--warmup_ratio", "0.2", "--dropout", "0.1",
       "--max_grad_norm", "0.5", "--logging_steps", "1", "--eval_on_start", "--eval_steps", "3", "--save_steps", "3",
       "--save_total_limit", "null", "--track_emissions", "false", "--write_report", "false"]  # fmt: skip


def rows(count: int, objective: str, seed: int) -> list[dict]:
    """The score is how often a word occurs, or whether it does so three times, which one label of seven denies."""
    made = []
    for place in range(count):
        times = place % 6
        words = ["old"] * times + ["men"] * (5 - times)
        random.Random(seed * 1000 + place).shuffle(words)
        label = times / 5 if objective == "mse" else int((times > 2) != (place % 7 == 0))
        made.append({"premise": "Two men are running.", "hypothesis": " ".join(words), "label": label,
                     "source": "ab"[place // 6 % 2]})  # fmt: skip
    return made


def options(folder: Path, objective: str) -> list[str]:
    given = ["--objective", objective]
    for field, (name, size) in {"train_file": ("train", 90), "validation_file": ("dev", 30),
                                "test_file": ("test", 24)}.items():  # fmt: skip
        path = folder / f"{objective}-{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(size, objective, len(name))))
        given += [f"--{field}", str(path)]
    return [*given, *(["--pos_weight", "1.5"] if objective == "binary_cross_entropy" else [])]


@pytest.fixture(scope="module", params=OBJECTIVES)
def run(request, tmp_path_factory) -> tuple[str, list[str], Path]:
    """Objective, options and folder of a run on one process."""
    folder = tmp_path_factory.mktemp("runs")
    given = [*RUN, *options(folder, request.param)]
    api.train(parse_train([*given, "--output_dir", str(folder / "run")]))
    return request.param, given, folder / "run"


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_it_learns(run):
    objective, _, folder = run
    main = "spearman" if objective == "mse" else "average_precision"
    before, *during = [event for event in events(folder, "eval") if event["split"] == f"{objective}-dev"]
    best = max(during[:4], key=lambda event: event[main])
    assert before[main] < 0.6
    assert best[main] > 0.75
    assert losses(folder)[-1] < losses(folder)[0]
    assert (results(folder)["train"]["best_step"], during[-1][main]) == (best["step"], best[main])


def test_the_model_gives_our_scores_elsewhere(run, tmp_path):
    """CrossEncoder's predict and evaluators, transformers' pipeline, and our own verbs, on the same folder."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder import evaluation
    from transformers import pipeline

    objective, _, folder = run
    found = rows(24, objective, 4)
    pairs, labels = [(row["premise"], row["hypothesis"]) for row in found], [row["label"] for row in found]
    saved = pq.read_table(folder / "predictions" / f"{objective}-test.parquet").to_pydict()
    assert np.allclose(saved["label"], labels)
    ours = api.predict(folder / "model", pairs)
    assert ours.shape == (24,)
    assert np.allclose(ours, saved["score"], rtol=0, atol=1e-6)

    encoder = sentence_transformers.CrossEncoder(str(folder / "model"), device="cpu")
    assert np.allclose(encoder.predict(pairs), ours, rtol=0, atol=1e-6)
    kind = evaluation.CrossEncoderCorrelationEvaluator
    if objective == "binary_cross_entropy":
        kind = evaluation.CrossEncoderClassificationEvaluator
    theirs = kind([list(pair) for pair in pairs], labels, write_csv=False)(encoder)
    final = results(folder)["metrics"][f"{objective}-test"]
    assert {name: final[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)

    classify = pipeline("text-classification", str(folder / "model"), device="cpu")
    said = classify([{"text": a, "text_pair": b} for a, b in pairs])
    assert [one["score"] for one in said] == pytest.approx(ours, abs=1e-5)
    assert {one["label"] for one in said} == {"LABEL_0"}

    file = tmp_path / f"{objective}-test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    again = api.evaluate(folder / "model", test_file=str(file), output_dir=str(tmp_path / "scores"))
    assert again == {f"{objective}-test": final}
    assert {own["num_samples"] for own in final["by_source"].values()} == {12}
    assert api.predict(folder / "model", []).shape == (0,)


def test_two_ranks_and_after_a_kill(run, tmp_path):
    """Two ranks have one process's losses; what a dead run of theirs has left goes on to the same bits."""
    objective, given, folder = run
    crossrank("train", *given, "--output_dir", tmp_path / "whole", ranks=2)
    assert np.allclose(losses(tmp_path / "whole"), losses(folder), rtol=0, atol=1e-5)
    weights_equal(tmp_path / "whole", folder, within=1e-4)
    if objective == "mse":
        return
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("checkpoints/step-000009", "checkpoints/step-000012"):
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again" / "results.json").unlink()
    assert "resuming at step 6" in crossrank("train", *given, "--output_dir", tmp_path / "again", ranks=2).said
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")
    for file in ("model/model.safetensors", "checkpoints/step-000012/tensors.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


STATIC, BF16 = ["--step_form", "static"], ["--bf16", "true"]


@pytest.mark.parametrize(("more", "within"), [(STATIC, 1e-6), ([*STATIC, *BF16], 0.05)], ids=["fp32", "bf16"])
def test_static_steps(run, tmp_path, more, within):
    """Whose batches have pairs that only fill up."""
    objective, given, folder = run
    if objective == "mse" and "bf16" in str(more):
        return  # only the last line of a loss is another one
    same = [*given, *more, "--eval_strategy", "no", "--eval_on_start", "false", "--max_steps", "12"]
    api.train(parse_train([*same, "--output_dir", str(tmp_path / "run")]))
    assert np.abs(np.array(losses(tmp_path / "run")) - losses(folder)).max() < within
    assert json.loads((tmp_path / "run" / "about.json").read_text())["step_form"] == "static"


def test_exact_steps(run, tmp_path):
    """Two ranks of shards, which the last batch fills with fewer pairs."""
    objective, given, folder = run
    if objective == "mse":
        crossrank("train", *given, "--exact_shards", "4", "--output_dir", tmp_path / "run", ranks=2)
        assert np.allclose(losses(tmp_path / "run"), losses(folder), rtol=0, atol=1e-5)


def test_the_card(run):
    """Every part of it, of one score, which is not defined on one of the splits."""
    objective, _, folder = run
    path = folder / "results.json"
    before = path.read_text()
    found = json.loads(before)
    found["metrics"][f"{objective}-test"]["pearson" if objective == "mse" else "auc"] = None
    path.write_text(json.dumps(found))
    text = write_report(folder).read_text()
    path.write_text(before)
    loss, kind, score = "BinaryCrossEntropyLoss", "Classification", "AUC"
    if objective == "mse":
        loss, kind, score = "MSELoss", "Correlation", "Pearson"
    for part in (
        f"losses.html#{loss.lower()})",
        f"#### Cross Encoder {kind}\n",
        "Number of Output Labels:** 1 label\n",
        "scores = model.predict(pairs)\nprint(scores.shape)\n# (5,)",
    ):
        assert part in text
    assert text.count(f"name: {score}\n") == 1


def test_a_head_of_one_output_is_kept(run, tmp_path, said):
    """As that of another cross-encoder's of one score; one of classes is drawn anew, and said."""
    _, given, folder = run
    config = parse_train([*given, "--model_name_or_path", str(folder / "model"), "--seed", "7"])
    kept, trained = load_for_training(config, ()), load_trained(ModelConfig(model_name_or_path=str(folder / "model")))
    assert kept.objective == trained.objective == config.objective
    assert (kept.model.classifier.weight == trained.model.classifier.weight).all()
    settings = trained.model.config
    settings.id2label, settings.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    other = type(trained.model)(settings)
    other.save_pretrained(tmp_path / "classes")
    trained.tokenizer.save_pretrained(tmp_path / "classes")
    assert not said
    config = parse_train([*given, "--model_name_or_path", str(tmp_path / "classes")])
    assert load_for_training(config, ()).num_classes == 1
    assert said == [f"{tmp_path / 'classes'}: its config.json has the classes a, b, c; the head is drawn anew for one "
                    "score"]  # fmt: skip


@pytest.mark.parametrize(
    ("activation", "problem_type", "beside", "objective"),
    [
        ("torch.nn.modules.activation.Sigmoid", None, None, "binary_cross_entropy"),
        ("torch.nn.modules.linear.Identity", None, None, "mse"),
        (None, None, None, "binary_cross_entropy"),
        (None, "regression", None, "mse"),
        (None, None, "torch.nn.modules.linear.Identity", "mse"),
        ("torch.nn.modules.activation.Tanh", None, None, None),
        ("mine.Sigmoid", None, None, None),
    ],
)
def test_what_a_folder_says(run, tmp_path, activation, problem_type, beside, objective):
    """As CrossEncoder reads it, and a regression of transformers'."""
    folder = tmp_path / "model"
    shutil.copytree(run[2] / "model", folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"sentence_transformers": activation and {"activation_fn": activation}, "problem_type": problem_type}
    (folder / "config.json").write_text(json.dumps(settings))
    if beside:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": beside}))
    if objective:
        assert load_trained(ModelConfig(model_name_or_path=str(folder))).objective == objective
        return
    with pytest.raises(UserError, match="knows torch's Sigmoid and Identity"):
        load_trained(ModelConfig(model_name_or_path=str(folder)))


@pytest.fixture(scope="module", params=OBJECTIVES)
def undefined(request, tmp_path_factory) -> tuple[str, Path]:
    """Objective and folder of a run whose dev and test sets have one label, or target, 0."""
    objective, folder = request.param, tmp_path_factory.mktemp("undefined")
    given = [*RUN, "--max_steps", "10", *options(folder, objective)]
    for name in ("dev", "test"):
        file = folder / f"{objective}-{name}.jsonl"
        file.write_text("".join(json.dumps(row | {"label": 0}) + "\n" for row in rows(12, objective, 1)))
    api.train(parse_train([*given, "--metric_for_best_model", "loss", "--output_dir", str(folder / "run")]))
    return objective, folder / "run"


def test_reports_of_what_is_not_defined(undefined, tmp_path):
    """Card, page, comparison and table show a -, wherever a score would stand."""
    objective, folder = undefined
    card, page = write_report(folder).read_text(), (folder / "report.html").read_text()
    main = "spearman" if objective == "mse" else "average_precision"
    assert f"| {main}" in card
    assert "**-**" not in card
    assert "<b>-</b><span>" in page
    assert "Not defined where all pairs have the same label" in page
    evaluations = [line for line in card.splitlines() if line.count("|") == 7 and "Epoch" not in line]
    assert sum("**" in line for line in evaluations) == 1  # the best by its loss
    report([str(folder), str(shutil.copytree(folder, tmp_path / "other"))], str(tmp_path / "compared"))
    assert f"{objective}-test" in (tmp_path / "compared" / "README.md").read_text()
    metrics = results(folder)["metrics"]
    header, line, *_ = tables(metrics).splitlines()
    assert dict(zip(header.split(), line.split(), strict=True))[main] == "-"


def test_errors_need_a_threshold(undefined):
    """Nothing is predicted of a set without positives, so nothing is wrong there; of numbers all are off."""
    objective, folder = undefined
    (errors,) = results(folder)["errors"].values()
    text = page(read_run(folder))
    if objective == "mse":
        assert len(errors) == 10
        return
    assert errors == []
    assert "Every pair is right" not in text
    assert text.count("No pair has label 1, so there is no threshold") == 3
    assert re.search(r">0 4\d%, 1 5\d%<", text)  # of the training split
    assert ">0 100%, 1 0%<" in text


def test_a_test_set_of_one_label(run, tmp_path, said):
    """What is not defined is null, and said; the rest is there."""
    objective, _, folder = run
    file = tmp_path / "same.jsonl"
    file.write_text("".join(json.dumps(row | {"label": 1}) + "\n" for row in rows(6, objective, 1)))
    found = api.evaluate(folder / "model", test_file=str(file), output_dir=str(tmp_path / "scores"))["same-test"]
    undefined = {name for name, value in found.items() if value is None}
    assert undefined == ({"spearman", "pearson"} if objective == "mse" else {"auc"})
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["metrics"]["same-test"] == found
    assert any(line.startswith("same-test: no ") and "not defined" in line for line in said)
