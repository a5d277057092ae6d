"""The card, pictures and report.html that a run leaves behind, from its folder alone."""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, crossrank
from huggingface_hub import ModelCard
from run_folders import DEMO, EVIL, Elements, edited

from trainer.base.errors import UserError
from trainer.cli import parse_train
from trainer.metrics import interval
from trainer.report.bits import compared
from trainer.report.card import thinned
from trainer.report.facts import command
from trainer.report.markdown import code, escape, table
from trainer.report.plots import smooth
from trainer.report.read import read_run
from trainer.report.write import report, write_report


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    crossrank("train", *DEMO, "--bf16", "--output_dir", folder, ranks=2)
    return folder


@pytest.fixture(scope="module")
def nli(tmp_path_factory, allnli) -> Path:
    """The reference run's recipe on the hub's first rows, with a tiny model for six steps."""
    folder = tmp_path_factory.mktemp("nli") / "run"
    files = {"train": "train_first3000_hub_order", "validation": "dev", "test": "test"}
    crossrank("train", "--recipe", "allnli-100k", "--model_name_or_path", "builtin", "--max_steps", "6",
              # Own files drop what the recipe says of its data; here they are those very data.
              "--dataset_name", "sentence-transformers/all-nli", "--max_eval_samples", "1000",
              "--label_names", "entailment,neutral,contradiction",
              *(word for name, file in files.items() for word in (f"--{name}_file", allnli / f"{file}.parquet")),
              "--max_test_samples", "100", "--logging_steps", "2", "--eval_steps", "3", "--country_iso_code", "FRA",
              "--output_dir", folder)  # fmt: skip
    return folder


def headings(text: str) -> list[str]:
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if re.match(r"#+ ", line)]


def shape(value):
    """Keys and kinds, without the values."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def hyperparameters(text: str, heading: str) -> dict[str, str]:
    part = text.split(f"#### {heading}")[1].split("###")[0]
    return dict(re.findall(r"^- `(\w+)`: (.*)$", part, re.MULTILINE))


def test_the_card_has_what_the_reference_has(nli, tmp_path):
    seed = SHARED / "seed" / "model_card.md"
    if not seed.is_file():
        pytest.skip("the reference card is not beside the checkout")

    def on_its_machine(about):
        about["model"] |= {"base": "distilbert/distilroberta-base", "hub_id": "distilbert/distilroberta-base"}
        about["model"]["revision"] = "fb53ab8802853c8e4fbdbcd0529f21fc6f459b2b"
        about["hardware"] |= {"gpu": "NVIDIA GeForce RTX 3090", "gpus": 1}

    folder = edited(nli, tmp_path / "run", "about.json", on_its_machine)
    ours, theirs = ModelCard.load(write_report(folder)), ModelCard.load(seed)

    mine, wanted = ours.data.to_dict(), theirs.data.to_dict()
    assert shape(mine["model-index"]) == shape(wanted["model-index"])
    assert shape(mine["co2_eq_emissions"]) == shape(wanted["co2_eq_emissions"])
    assert mine["co2_eq_emissions"]["hardware_used"] == wanted["co2_eq_emissions"]["hardware_used"]
    for field in ("base_model", "datasets", "language", "library_name", "metrics", "pipeline_tag"):
        assert mine[field] == wanted[field], field
    tags = {tag for tag in wanted["tags"] if not tag.startswith("dataset_size")}
    assert {*tags, "dataset_size:3000"} <= set(mine["tags"])
    for own, other in zip(ours.data.eval_results, theirs.data.eval_results, strict=True):
        names = ("task_type", "task_name", "dataset_type", "dataset_name", "metric_type", "metric_name")
        assert [getattr(own, name) for name in names] == [getattr(other, name) for name in names]

    found = iter(headings(ours.text))
    assert all(heading in found for heading in headings(theirs.text))  # all of them, in their order
    same = ("| details |", "| type    |", "| **f1_macro**", "* Dataset: [all-nli]", "* Columns:", "* Loss:",
            "- **Base model:**", "- **Model Type:**", "- **Number of Output Labels:** 3 labels", "- **Language:** en",
            "    - [all-nli]", "model = CrossEncoder(", "# (5, 3)", "- **GPU Model**: 1 x NVIDIA GeForce RTX 3090",
            "- **On Cloud**: No", "- **CPU Model**", "- **RAM Size**", "- **Energy Consumed**", "- **Carbon Emitted**",
            "- **Hours Used**", "- Python:", "- PyTorch:", "- Transformers:", "- Datasets:", "- Tokenizers:",
            "* Size: 1,000 evaluation samples", "<!-- - **License:** Unknown -->")  # fmt: skip
    for beginning in same:
        lines = [
            [x for x in card.text.splitlines() if x.strip().startswith(beginning.strip())] for card in (ours, theirs)
        ]
        assert len(lines[0]) == len(lines[1]) > 0, beginning
    # The first thousand rows are theirs, and so is every cell of the statistics and the samples.
    for line in theirs.text.splitlines():
        if line.strip().startswith(("| details", "| <code>", "| type")):
            assert line in ours.text.splitlines()
    for line in re.findall(r"^    \['.*$", theirs.text, re.MULTILINE):
        assert line in ours.text
    logs = "| Epoch | Step | Training Loss | Validation Loss | AllNLI-dev_f1_macro | AllNLI-test_f1_macro |"
    for card in (ours, theirs):
        assert logs in re.sub(" +", " ", card.text)

    mine, wanted = (hyperparameters(card.text, "All Hyperparameters") for card in (ours, theirs))
    # Steps are this test's, epochs a number with a point; label_names means columns there, and its first evaluation
    # was not the trainer's; settings that are not given are {} there.
    others = {"max_steps", "num_train_epochs", "label_names", "eval_on_start", "tf32", "hub_private_repo",
              "lr_scheduler_kwargs"}  # fmt: skip
    common = (mine.keys() & wanted.keys()) - others
    assert len(common) > 20
    assert {name: mine[name] for name in common} == {name: wanted[name] for name in common}
    mine, wanted = (hyperparameters(card.text, "Non-Default Hyperparameters") for card in (ours, theirs))
    assert {"bf16", "warmup_ratio"} <= mine.keys() & wanted.keys()


def test_the_same_folder_gives_the_same_card(demo, tmp_path):
    """What the run wrote, written again elsewhere: byte for byte."""
    shutil.copytree(
        demo, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "README.md", "plots", "*.html")
    )
    crossrank("report", tmp_path / "copy")
    for file in ("model/README.md", "report.html", "model/plots/training.svg", "model/plots/training.png"):
        assert (tmp_path / "copy" / file).read_bytes() == (demo / file).read_bytes(), file


def test_the_printed_scores_are_the_models(demo, monkeypatch):
    pytest.importorskip("sentence_transformers")
    text = (demo / "model" / "README.md").read_text()
    program = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1].replace(
        "path/to/model", str(demo / "model")
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    shown = "\n".join(line.removeprefix("# ") for line in program.splitlines() if re.match(r"# [(\[ ]", line))
    numbers = [np.array(re.findall(r"\d+\.?\d*", part), float) for part in (printed.getvalue(), shown)]
    assert len(numbers[0]) == 2 + 5 * 3
    assert np.allclose(*numbers, atol=2e-4)


def test_what_the_card_says_beyond_the_reference(demo):
    text = (demo / "model" / "README.md").read_text()
    results = json.loads((demo / "results.json").read_text())
    scores = results["metrics"]["builtin-test"]
    assert scores["fp32"]["f1_macro"] == pytest.approx(scores["f1_macro"], abs=0.05)
    assert f"| {round(scores['fp32']['f1_macro'], 4)}" in text
    for source in scores["by_source"]:
        assert f"| {source}" in text
    assert "- **Ranks:** 2, backend ddp, 32 pairs a step" in text
    assert "torchrun --nproc-per-node 2 -m crossrank train" in text
    assert str(demo) not in text  # nobody's business
    for name in ("training", "lengths", "scores-builtin-dev", "scores-builtin-test"):
        assert f"(plots/{name}.png)" in text
        assert (demo / "model" / "plots" / f"{name}.png").stat().st_size > 10_000
        assert "<svg" in (demo / "model" / "plots" / f"{name}.svg").read_text()


def test_the_interval_is_the_bootstraps():
    """One draw of the confusion matrix's cells is a draw of pairs."""
    from sklearn.metrics import confusion_matrix, f1_score

    random = np.random.default_rng(1)
    truth = random.integers(0, 3, 400)
    said = np.where(random.random(400) < 0.7, truth, random.integers(0, 3, 400))
    drawn = [random.integers(0, 400, 400) for _ in range(1000)]
    expected = np.quantile([f1_score(truth[rows], said[rows], average="macro") for rows in drawn], [0.025, 0.975])
    assert interval(confusion_matrix(truth, said).tolist()) == pytest.approx(tuple(expected), abs=0.008)


def test_the_command_on_the_card_starts_the_same_run(tmp_path):
    """From own files in folders: their paths, and each split by the name of its own file."""
    from trainer.data.builtin import LABEL_NAMES, pairs

    (tmp_path / "data").mkdir()
    for name in ("train6k", "dev"):
        rows = [
            {**row, "label": LABEL_NAMES[row["label"]]} for row in pairs("train" if name == "train6k" else "dev")[:60]
        ]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model_name_or_path", "builtin", "--train_file", str(tmp_path / "data" / "train6k.jsonl"),
             "--validation_file", str(tmp_path / "data" / "dev.jsonl"), "--max_steps", "2", "--train_batch_size", "16",
             "--label_names", '["entailment", "neutral", "contradiction"]', "--track_emissions", "false"]  # fmt: skip
    crossrank("train", *given, "--output_dir", tmp_path / "run")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    shown = re.search(r"^crossrank train .*$", card, re.MULTILINE)[0]
    assert str(tmp_path) not in card
    shown = shown.replace("/path/to", str(tmp_path / "data"))
    assert parse_train(shlex.split(shown)[2:]) == parse_train(given)
    assert re.search(r"### Evaluation Dataset\s+#### dev.jsonl", card)
    assert re.search(r"### Training Dataset\s+#### train6k.jsonl", card)


def test_the_command_has_no_folder_of_its_maker(demo):
    run = read_run(demo)
    config = run.config | {"train_file": "/home/alice/nli/data/train.csv", "model_name_or_path": "/models/base",
                           "validation_file": "../dev.csv",
                           "test_file": ["rte=/home/alice/rte.csv", "/home/alice/nli/hans.csv"]}  # fmt: skip
    about = run.about | {"world_size": 8, "num_nodes": 2, "working_folder": "/home/alice/nli"}
    words = command(dataclasses.replace(run, config=config, about=about))
    assert words.startswith(
        "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 4 -m crossrank train "
    )
    for expected in (
        "--train_file data/train.csv ",
        "--model_name_or_path /path/to/base ",
        "--validation_file ../dev.csv ",
        "--test_file rte=/path/to/rte.csv,hans.csv ",
    ):
        assert expected in words
    assert "alice" not in words


def test_reports_that_mean_something_else(demo, tmp_path):
    before = (demo / "report.html").read_bytes()
    (tmp_path / "link").symlink_to(demo)
    other = shutil.copytree(demo, tmp_path / "other")
    for folders, target, expected in (
        ([demo, demo], None, "is given twice"),
        ([demo, other, tmp_path / "link"], None, "link is given twice"),
        ([demo], tmp_path / "x", "--output_dir is for the comparison"),
        ([demo, other], demo, "holds config.yaml"),
        ([demo, other], demo / "model", "holds config.json"),
    ):
        with pytest.raises(UserError, match=expected):
            report([*map(str, folders)], target and str(target))
    assert (demo / "report.html").read_bytes() == before


def test_an_unfinished_run_says_so(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "results.json").unlink()
    path = write_report(tmp_path / "run")
    card = ModelCard.load(path, ignore_metadata_errors=True)
    assert path == tmp_path / "run" / "README.md"  # there is no model to describe
    assert "> Unfinished run. It stands at step 24" in card.text
    assert "No final scores." in card.text
    assert "model-index" not in card.data.to_dict()
    assert not (tmp_path / "run" / "model").exists()


def test_damaged_metrics_are_left_out_and_counted(demo, tmp_path, said):
    shutil.copytree(demo, tmp_path / "run")
    whole = len(read_run(demo).events)
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"event": "train", "step": 25\n[]\n{"event": "eval"}\n\xff\xfe\n{"event": "train", "step": "x"}\nnull\n'
        )
    run = read_run(tmp_path / "run")
    assert (len(run.events), run.damaged) == (whole, 6)
    report([str(tmp_path / "run")], None)
    assert "6 damaged lines" in said[0]
    assert "6 damaged lines of metrics.jsonl are left out" in (tmp_path / "run" / "model" / "README.md").read_text()


DAMAGED = {
    "about.json": ["{}", "[]", "null", '{"data": []}', "[" * 100_000],
    "results.json": ['{"metrics":', "{}", "[]", '{"metrics": {}}'],
    "config.yaml": ["", "{}", "[]", "seed: ["],
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_named(file, demo, tmp_path):
    shutil.copytree(demo, tmp_path / "run")
    for text in DAMAGED[file]:
        (tmp_path / "run" / file).write_text(text)
        with pytest.raises(UserError, match=rf"/{file}"):
            report([str(tmp_path / "run")], None)


def test_what_people_have_written_is_kept(demo, tmp_path, said):
    run, target = tmp_path / "run", tmp_path / "compared"
    shutil.copytree(demo, run)
    card = run / "model" / "README.md"
    before = card.read_text()
    assert write_report(run) == card
    assert card.read_text() == before
    card.write_text(before.replace("**Model Type:**", "**Kind:**"))
    for _ in range(2):
        assert write_report(run) == run / "model" / "README-2.md"
    assert "**Kind:**" in card.read_text()
    assert (run / "model" / "README-2.md").read_text() == before
    assert f"{card} is not as crossrank has written it, and is kept" in said[0]
    for _ in range(2):
        report([str(demo), str(run)], str(target))
    for name in ("README.md", "report.html"):
        shutil.rmtree(target)
        target.mkdir()
        (target / name).write_text("mine")
        with pytest.raises(UserError, match=f"holds {name}, .*is kept"):
            report([str(demo), str(run)], str(target))
        assert (target / name).read_text() == "mine"


@pytest.mark.parametrize("damage", ["no run", "model folder", "no about", "bad results", "bad predictions"])
def test_what_cannot_be_reported(damage, demo, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(demo, folder)
    if damage == "no run":
        folder = tmp_path / "empty"
        folder.mkdir()
    if damage == "model folder":
        folder = folder / "model"
    if damage == "no about":
        (folder / "about.json").unlink()
    if damage == "bad results":
        (folder / "results.json").write_text('{"metrics":')
    if damage == "bad predictions":  # a picture less
        (folder / "predictions" / "builtin-dev.parquet").write_bytes(b"PAR1")
        write_report(folder)
        return
    expected = {"no run": "no config.yaml", "model folder": "one above", "no about": "about.json"}.get(
        damage, "damaged"
    )
    result = crossrank("report", folder, check=False)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_no_emissions(demo, tmp_path):
    folder = edited(demo, tmp_path / "run", "results.json", lambda results: results.update(energy=None))
    card = ModelCard.load(write_report(folder))
    assert "### Environmental Impact\nNot measured." in card.text
    assert "co2_eq_emissions" not in card.data.to_dict()


def test_hostile_text_is_only_text(tmp_path):
    """Texts, class names and columns with all that Markdown and HTML know: tables hold, nothing comes alive."""
    labels = ["<b>yes</b>|`no`", "$x_1$ **other**"]
    rows = [{"p|<i>": text, "hypothesis": f"{text} {i}", "label": labels[i % 2]} for i, text in enumerate(EVIL * 4)]
    data = tmp_path / "evil<img src=x>.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    crossrank("train", "--model_name_or_path", "builtin", "--train_file", data, "--validation_file", data,
              "--premise_column", "p|<i>", "--label_names", json.dumps(labels), "--max_steps", "2",
              "--max_length", "64",
              "--logging_steps", "1", "--track_emissions", "false", "--output_dir", tmp_path / "run")  # fmt: skip
    path = tmp_path / "run" / "model" / "README.md"
    card = ModelCard.load(path)
    assert path.stat().st_size < 40_000
    assert "datasets" not in card.data.to_dict()
    assert "language" not in card.data.to_dict()
    assert card.text.count("```") == 2 * 4  # no text has ended a block, or begun one
    outside_code = re.sub(r"^```\w+\n.*?^```", "", card.text, flags=re.DOTALL | re.MULTILINE)
    for harmful in ("<script", "<b>yes", "<img", "javascript:alert(1))", "<i>", "\u202e", "\x07"):
        assert harmful not in outside_code, harmful
    for block in re.findall(r"(?:^ *\|.*\n)+", card.text, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block[:300]
    text = (tmp_path / "run" / "report.html").read_text()
    page = Elements(text)
    assert not {"script", "img", "iframe", "a"} & page.found
    assert not page.addresses
    for harmful in ("<b>yes", "<i>", "\u202e", "\x07"):
        assert harmful not in text, harmful
    for shown in ("&lt;b&gt;yes&lt;/b&gt;", "$x_1$ **other**"):
        assert shown in text, shown
    assert len(text) < 120_000


def test_escapes():
    assert escape("a|b\nc") == "a&#124;b<br>c"
    assert escape("snake_case and _this_") == "snake_case and &#95;this&#95;"
    assert escape("y" * 400) == "y" * 300 + "..."
    assert code("<a>") == "<code>&#60;a&#62;</code>"
    assert table(["a", "b"], [["1", "2"]], "lc").splitlines() == ["| a   | b   |", "|:----|:---:|", "| 1   | 2   |"]


def test_long_logs_are_thinned_but_for_evaluations():
    rows = [["0", str(i), "1.0", "-", "0.5" if i % 500 == 0 else "-"] for i in range(5000)]
    kept = list(thinned(rows))
    assert len(kept) <= 210
    assert [row for row in kept if row[4] != "-"] == rows[::500]


def test_smoothing_keeps_a_level():
    assert np.allclose(smooth(np.full(50, 3.0), past=0.9), 3.0)


def test_several_runs_are_compared(demo, tmp_path):
    """Two seeds are one group, with mean and spread; another learning rate is another."""
    others = {"seed": ["--seed", "1"], "rate": ["--learning_rate", "3e-4"]}
    for name, options in others.items():
        crossrank("train", *DEMO, "--bf16", *options, "--track_emissions", "false", "--write_report", "false",
                  "--output_dir", tmp_path / name)  # fmt: skip
    said = crossrank("report", demo, tmp_path / "seed", tmp_path / "rate", "--output_dir", tmp_path / "out").said
    assert " beside " not in said
    text = (tmp_path / "out" / "README.md").read_text()
    values = [
        json.loads((f / "results.json").read_text())["metrics"]["builtin-test"]["f1_macro"]
        for f in (demo, tmp_path / "seed")
    ]
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in text
    assert "learning_rate 0.001" in text
    assert "learning_rate 0.0003" in text
    assert "3 runs in 2 groups" in text
    page = Elements((tmp_path / "out" / "report.html").read_text())
    assert page.ids == ["fields", "scores", "differences", "curves", "runs"]
    assert "Bit for bit" not in text
    assert page.classes.count("band") == 6  # of the group of two, in each panel
    assert re.search(r"\| learning_rate +\| 0.001 +\| 0.0003 +\|", text)
    assert re.search(r"\| builtin-test +\| learning_rate 0.0003 +\| learning_rate 0.001 +\| 101 ", text)


def test_two_runs_to_the_last_bit(demo, tmp_path):
    """Beside the first run of the same seed, whatever the backend; two runs are beside each other in any case."""
    shutil.copytree(demo, tmp_path / "same")
    shutil.copytree(demo, tmp_path / "another")
    crossrank("train", *DEMO, "--bf16", "--seed", "1", "--track_emissions", "false", "--write_report", "false",
              "--output_dir", tmp_path / "seed")  # fmt: skip
    again = edited(tmp_path / "seed", tmp_path / "again", "results.json", lambda results: None)
    digest = hashlib.sha256((demo / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((demo / "results.json").read_text())["model_sha256"] == digest
    assert f"- **SHA-256 of the weights:** <code>{digest}</code>" in (demo / "model" / "README.md").read_text()
    lines = [json.loads(line) for line in (demo / "metrics.jsonl").read_text().splitlines()]
    changed = [line | {"grad_norm": 1.0} if line["step"] >= 7 and "grad_norm" in line else line for line in lines]
    (tmp_path / "another" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    (tmp_path / "another" / "results.json").unlink()
    folders = [str(folder) for folder in (demo, tmp_path / "same", tmp_path / "seed", again, tmp_path / "another")]
    config = (demo / "config.yaml").read_text()
    (tmp_path / "another" / "config.yaml").write_text(config.replace("\nbackend: auto\n", "\nbackend: fsdp\n"))
    assert read_run(tmp_path / "another").config["backend"] != read_run(demo).config["backend"]
    crossrank("report", *folders, "--output_dir", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"same +\| run +\| same bits", text)
    assert re.search(r"again +\| seed +\| same bits", text)
    assert not re.search(r"seed +\| run +\|", text)
    assert re.search(r"another +\| run +\| they part at step 7: grad_norm 1.0 and", text)
    said = crossrank("report", demo, tmp_path / "seed", "--output_dir", tmp_path / "out").said
    assert f"{tmp_path / 'seed'} beside {demo}: they part at step 1: loss " in said


def test_runs_that_logged_other_steps(demo):
    run = read_run(demo)
    lines = [dict(event) for event in run.of("train")]
    sparse = dataclasses.replace(run, results={}, events=lines[9::10])
    assert compared(run, sparse) == "they have logged no steps in common"
    other = dataclasses.replace(run, results=run.results | {"model_sha256": "x"})
    last = "every loss and gradient norm that both have logged is the same, up to step 24"
    assert compared(run, other) == f"{last}, but not the weights"
    assert compared(run, dataclasses.replace(run, results={})) == last
    changed = [event | {"loss": 0.0} if event["step"] == 20 else event for event in lines[9::10]]
    assert compared(sparse, dataclasses.replace(sparse, events=changed)).startswith("they part between steps 11 and 20")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    return found or pytest.skip("there is no Chromium here")


def test_the_page_opens_in_a_browser(demo, browser, tmp_path):
    """Its charts are drawn, in their colours, and nothing is wider than a phone but what scrolls by itself."""
    from matplotlib.image import imread

    shot = tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [browser, *flags, "--window-size=1000,9000", f"--screenshot={shot}", (demo / "report.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert shot.is_file(), result.stderr
    pixels = imread(shot)[..., :3]
    blue = (np.abs(pixels - np.array([11, 111, 184]) / 255) < 0.05).all(-1)  # the curves' and bars' colour
    assert blue.sum() > 5000
    # A copy that may measure itself, in a frame: a window is never as narrow.
    text = (demo / "report.html").read_text().replace("default-src 'none'", "script-src 'unsafe-inline'")
    script = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth], '*')</script></body>"
    (tmp_path / "measured.html").write_text(text.replace("</body>", script))
    (tmp_path / "frame.html").write_text("<title></title><script>onmessage = e => document.title = e.data</script>"
                                         "<iframe src=measured.html width=420 height=900></iframe>")  # fmt: skip
    narrow = [browser, *flags, "--virtual-time-budget=4000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(narrow, capture_output=True, text=True).stdout
    width, needed = map(int, re.search(r"<title>(\d+),(\d+)</title>", dom).groups())
    assert needed <= width == 420


def test_a_report_that_fails_leaves_the_run_whole(tmp_path):
    """A folder where a picture should go: the run is done all the same, and says how to get its report."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\nfrom trainer import __main__\nfrom trainer.report import write as report\n"
        "def fail(*args):\n    raise ZeroDivisionError('no ink')\n"
        "report.draw = fail\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    result = crossrank("train", *DEMO, "--track_emissions", "false", "--output_dir", tmp_path / "run", script=script)
    assert "no report was written (ZeroDivisionError: no ink); crossrank report" in result.stderr
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_folder_that_cannot_be_written(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model" / "plots")
    (tmp_path / "run" / "model" / "plots").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the report"):
        write_report(tmp_path / "run")
