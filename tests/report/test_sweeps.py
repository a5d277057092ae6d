"""`crossrank report` over a folder of runs: which are found, how they are grouped and called, what is missed."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import crossrank
from run_folders import edited

from trainer.base.errors import UserError
from trainer.report.compare import grouped, score_tables, spread
from trainer.report.read import read_run
from trainer.report.sweeps import runs_in, titles
from trainer.report.write import report

RATES, SEEDS = ("1e-05", "5e-05"), (2, 10)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    crossrank("train", "--recipe", "demo", "--max_train_samples", "32", "--max_eval_samples", "30",
              "--max_test_samples", "30", "--train_batch_size", "16", "--max_steps", "2", "--logging_steps", "1",
              "--track_emissions", "false", "--write_report", "false", "--output_dir", folder)  # fmt: skip
    return folder


def copy(run: Path, target: Path, **fields: object) -> Path:
    """A run with other values in its config."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("model", "checkpoints"))
    text = (target / "config.yaml").read_text()
    for name, value in fields.items():
        text, count = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    (target / "config.yaml").write_text(text)
    return target


@pytest.fixture
def sweep(one, tmp_path) -> Path:
    for rate in RATES:
        for seed in SEEDS:
            copy(one, tmp_path / "sweep" / f"learning_rate-{rate}" / f"seed-{seed}", learning_rate=rate, seed=seed)
    return tmp_path / "sweep"


def test_the_runs_below_a_folder(sweep, one):
    expected = [sweep / f"learning_rate-{rate}" / f"seed-{seed}" for rate in RATES for seed in SEEDS]
    assert runs_in(sweep) == (expected, [])
    assert runs_in(sweep / "learning_rate-1e-05") == (expected[:2], [])
    assert runs_in(one) == ([one], [])  # with a model, and a checkpoint
    assert runs_in(sweep.parent / "nothing") == ([sweep.parent / "nothing"], [])
    with pytest.raises(UserError, match="is not a run folder"):
        report([str(sweep.parent)], None)  # three levels above


def test_a_sweep_is_compared(sweep, tmp_path, said):
    report([str(sweep)], str(tmp_path / "report"))
    text = (tmp_path / "report" / "README.md").read_text()
    assert "4 runs in 2 groups" in text
    for rate in RATES:
        rows = re.findall(rf"^\| learning_rate {rate} +\| builtin-\w+ +\| 2 .*$", text, re.MULTILINE)
        assert [row.count("±") for row in rows] == [5, 5]  # four scores and the loss
        for seed in SEEDS:
            assert f"| learning_rate-{rate}/seed-{seed} " in text
    assert not any("finished" in line for line in said)
    page = (tmp_path / "report" / "report.html").read_text()
    for shown in (text, page):
        assert "None of it says how much depends on the seed where a group has but one" in shown
        assert "each resample draws the seeds, too" in shown
        assert "equal" in shown  # all are copies of one run


def test_unfinished_and_missing_runs_are_said(sweep, tmp_path, said):
    (sweep / "learning_rate-1e-05" / "seed-2" / "results.json").unlink()
    shutil.rmtree(sweep / "learning_rate-5e-05" / "seed-10")
    (sweep / "learning_rate-5e-05" / "seed-10").mkdir()  # it has died before its first step
    runs = [f"learning_rate-{rate}/seed-{seed}" for rate in RATES for seed in (*SEEDS, 11)]
    (sweep / "sweep.json").write_text(json.dumps({"runs": runs}))
    report([str(sweep)], str(tmp_path / "report"))
    expected = ("2 of 6 runs are finished; unfinished: learning_rate-1e-05/seed-2; not begun: "
                "learning_rate-1e-05/seed-11, learning_rate-5e-05/seed-10, learning_rate-5e-05/seed-11")  # fmt: skip
    assert said[0] == expected
    assert f"\n\n**{expected}.**\n\n" in (tmp_path / "report" / "README.md").read_text()
    for run in runs:
        shutil.rmtree(sweep / run, ignore_errors=True)
    with pytest.raises(UserError, match="no run has begun yet; 6 are to come"):
        report([str(sweep)], None)
    (sweep / "sweep.json").write_text("[]")
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        report([str(sweep)], None)


def test_groups_are_named_by_what_differs(one, tmp_path):
    """All of it, in fewer letters where there is no room."""
    values = {"learning_rate": "1.0e-05", "weight_decay": "0.01", "warmup_ratio": "0.06", "max_grad_norm": "0.5"}
    runs = [read_run(one), read_run(copy(one, tmp_path / "a", learning_rate="1.0e-05"))]
    runs.append(read_run(copy(one, tmp_path / "b", **values)))
    assert [name for name, _ in grouped(runs[:2])][1] == "learning_rate 1e-05"
    names = [name for name, _ in grouped(runs)]
    assert "lr 1e-05, wd 0.01, mgn 0.5, wr 0.06" in names
    assert len(set(names)) == 3
    assert titles(runs) == ["run", "a", "b"]


def test_each_objective_has_its_own_scores(one, tmp_path):
    """A table each, so that none is wide and full of dashes; of one objective there is no heading more."""
    own = {"loss": 0.1, "spearman": 0.8123, "pearson": 0.8, "num_samples": 30}
    folder = copy(one, tmp_path / "numbers", objective="mse")
    edited(folder, folder, "about.json", lambda about: about["model"].update(objective="mse"))
    edited(folder, folder, "results.json", lambda results: results.update(metrics={"builtin-test": own}))
    tables = score_tables(grouped([read_run(one), read_run(folder)]))
    assert [table.header[3:] for table in tables.values()] == [
        ["F1 Macro", "F1 Micro", "F1 Weighted", "Accuracy", "Loss"], ["Spearman", "Pearson", "Loss"]]  # fmt: skip
    assert [len(table.rows) for table in tables.values()] == [2, 1]
    assert tables["mse"].rows[0][2:] == ["1", "0.8123", "0.8000", "0.1000"]
    report([str(one), str(folder)], str(tmp_path / "report"))
    assert "\n### Objective `mse`\n\n| Group " in (tmp_path / "report" / "README.md").read_text()
    assert "<h3>Objective mse</h3>" in (tmp_path / "report" / "report.html").read_text()


def test_runs_without_a_score_are_not_passed_over():
    assert spread([0.5, None, 0.7]) == "0.6000 ± 0.1414 (2 of 3)"
    assert spread([0.5, None]) == "0.5000 (1 of 2)"
    assert (spread([None, None]), spread([0.5])) == ("-", "0.5000")
