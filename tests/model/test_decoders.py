"""Decoders as classifiers, as they are published: no padding token, no head, a tokenizer that pads on the left."""

import json

import numpy as np
import pytest
from conftest import crossrank, losses, weights_equal
from families import save_encoder
from test_loading import change_config

from trainer.api import evaluate, predict
from trainer.data.builtin import LABEL_NAMES, pairs

RUN = ["--recipe", "demo", "--max_train_samples", "60", "--train_batch_size", "16", "--max_eval_samples", "10",
       "--max_test_samples", "40", "--max_steps", "4", "--logging_steps", "1", "--learning_rate", "0.01",
       "--eval_strategy", "no", "--track_emissions", "false", "--write_report", "false", "--max_length",
       "64"]  # fmt: skip
PAIRS = [(row["premise"], row["hypothesis"]) for row in pairs("test")[:40]]
PAIRS.append((" ".join(premise for premise, _ in PAIRS), "Cats sleep."))  # cut to 64 tokens

JOINING = ("gpt2", "qwen2", "qwen3")  # their tokenizers add no token to a pair


def save_decoder(folder, family):
    """As its makers publish it."""
    save_encoder(folder, family)
    change_config(folder, "tokenizer_config.json", pad_token=None, padding_side="left")
    if family in JOINING:
        change_config(folder, "tokenizer.json", post_processor=None)
    assert json.loads((folder / "config.json").read_text()).get("pad_token_id") is None
    return folder


def scores_elsewhere(model) -> list[np.ndarray]:
    """(pairs, classes) by sentence_transformers and by a pipeline, both in batches."""
    from sentence_transformers import CrossEncoder
    from transformers import pipeline

    classify = pipeline("text-classification", str(model), top_k=None, batch_size=16)
    rows = classify([{"text": a, "text_pair": b} for a, b in PAIRS], truncation=True)
    by_name = ({c["label"]: c["score"] for c in row} for row in rows)
    return [CrossEncoder(str(model)).predict(PAIRS, apply_softmax=True),
            np.array([[row[name] for name in LABEL_NAMES] for row in by_name])]  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gemma"])
def test_from_its_folder_to_scores(family, tmp_path):
    """The end of text is the padding token, pairs of a batch do not see each other, and everyone gets our scores."""
    pytest.importorskip("sentence_transformers")
    run = [*RUN, "--model_name_or_path", save_decoder(tmp_path / family, family)]
    said = crossrank("train", *run, "--output_dir", tmp_path / "run").stderr
    assert "its tokenizer has no padding token of the model's; '[SEP]' is taken" in said
    assert ("puts nothing between the two texts" in said) == (family in JOINING)
    model = tmp_path / "run" / "model"
    files = {name: json.loads((model / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")}
    assert (files["config"]["pad_token_id"], files["tokenizer_config"]["padding_side"]) == (3, "right")

    ours = predict(model, PAIRS)
    assert np.abs(ours - ours.mean(0)).max() > 1e-3
    assert np.abs(predict(model, PAIRS, per_device_eval_batch_size=1) - ours).max() < 1e-5
    for theirs in scores_elsewhere(model):
        assert np.abs(theirs - ours).max() < 1e-5
    results = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["builtin-test"]
    again = evaluate(model, dataset_name="builtin", max_test_samples=40)["builtin-test"]
    assert again["loss"] == pytest.approx(results["loss"], abs=1e-6)


@pytest.mark.parametrize(("family", "backend"), [("llama", "zero3"), ("gemma", "fsdp")])
def test_two_ranks_give_the_same_run(family, backend, tmp_path):
    """All of it trained, without dropout."""
    if backend == "zero3":
        pytest.importorskip("deepspeed")
    wiring = ["--deepspeed", backend] if backend == "zero3" else ["--backend", backend]
    run = [*RUN, "--model_name_or_path", save_decoder(tmp_path / family, family), "--output_dir"]
    crossrank("train", *run, tmp_path / "one")
    crossrank("train", *run, tmp_path / "two", *wiring, ranks=2)
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-5)
    weights_equal(tmp_path / "two", tmp_path / "one", within=1e-4)


def test_no_token_for_padding(tmp_path):
    """One line with the fix."""
    folder = save_decoder(tmp_path / "llama", "llama")
    change_config(folder, "tokenizer_config.json", eos_token=None)
    result = crossrank("train", *RUN, "--model_name_or_path", folder, "--output_dir", tmp_path / "run", check=False)
    assert result.returncode == 2
    assert "set pad_token in tokenizer_config.json" in result.stderr
    assert "Traceback" not in result.stderr
