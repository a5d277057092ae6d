"""A grid of runs: which ones, in which folders, what is refused, and one after the other on this machine."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, crossrank, losses

from launcher import sbatch, sweep
from launcher.preflight import main as preflight
from launcher.sbatch import SlurmConfig, render
from launcher.sweep import SweepConfig, in_turn, tasks
from trainer.__main__ import main
from trainer.base.errors import UserError
from trainer.base.record import record, recorded
from trainer.cli import parse_train
from trainer.run.folder import write_config

DEMO = ["--recipe", "demo"]
GRID = ["learning_rate=1e-5,5e-5", "train-batch-size=32,64"]


def folders(*grid: str, seeds: str | None = None, arguments: list[str] = DEMO) -> list[str]:
    return [run.folder for run in tasks(SweepConfig(grid=list(grid) or None, seeds=seeds), arguments)]


def test_every_combination_is_a_run():
    runs = tasks(SweepConfig(grid=GRID, seeds="0-4:2,7%3"), DEMO)
    assert len(runs) == 2 * 2 * 4
    assert [run.folder for run in runs[:5]] == [
        *(f"learning_rate-1e-5,train_batch_size-32/seed-{seed}" for seed in (0, 2, 4, 7)),
        "learning_rate-1e-5,train_batch_size-64/seed-0",
    ]
    assert runs[4].options == ("--learning_rate=1e-5", "--train_batch_size=64", "--seed=0")
    assert (runs[4].config.learning_rate, runs[4].config.train_batch_size, runs[4].config.seed) == (1e-5, 64, 0)
    assert folders("learning_rate=1e-5") == ["learning_rate-1e-5"]
    assert folders(seeds="3,1") == ["seed-3", "seed-1"]
    assert [run.options for run in tasks(SweepConfig(), DEMO)] == [()]


def test_folders_have_safe_names():
    """Whatever the values are, and one each."""
    assert folders("model_name_or_path=a/b,a b,../c,$(x),é,~") == [
        f"model_name_or_path-{name}" for name in ("a-b", "a-b-2", "c", "x", "value", "value-2")
    ]
    (long,) = folders(f"model_name_or_path=/{'a' * 300}/end")
    assert long.endswith("a-end")
    assert len(long) < 100


def test_values_that_hold_commas_are_json():
    lora = ["--recipe", "demo", "--lora_r", "4"]
    (one, both) = tasks(SweepConfig(grid=['lora_target_modules=[["query"],"query,value"]']), lora)
    assert one.config.lora_target_modules == ["query"]
    assert both.config.lora_target_modules == ["query", "value"]
    assert both.folder == "lora_target_modules-query-value"
    assert folders("dropout=none,0.1", "bf16=true,false")[0] == "dropout-none,bf16-true"


BAD = {
    ("learning_rat=1",): "unknown field of the grid 'learning_rat'; did you mean 'learning_rate'",
    ("lr=1",): "did you mean 'learning_rate'",
    ("learning_rate",): "must look like learning_rate=1e-5,5e-5",
    ("learning_rate=1e-5,5e-5 train_batch_size=32,64",): "each has a --grid of its own",
    ("learning_rate=1e-5,5e-5;train_batch_size=32,64",): "each has a --grid of its own",
    ("learning_rate=1e-5,fast",): "learning_rate must be a number, got 'fast'",
    ("learning_rate=1e-5,",): "learning_rate must be a number, got ''",
    ("learning_rate=1e-5,0.00001",): "1e-5 and 0.00001, which are the same, twice",
    ("max_steps=5,5",): "max_steps has the value 5, twice",
    ("max_steps=5", "max_steps=6"): "max_steps is in the grid twice",
    ("seed=1,2",): "seeds have an option of their own: --seeds 0-4",
    ("output_dir=a,b",): "each run has its own folder in --output_dir",
    ("run_name=a,b",): "run_name cannot be in the grid",
    ("resume_from_checkpoint=auto,none",): "each run resumes by itself",
    ("save_steps=5,10",): "save_steps cannot be in the grid: runs that differ only in it learn the same",
    ("push_to_hub=true",): "push_to_hub cannot be in the grid",
    ("max_steps=-1,0",): "of the sweep, --max_steps=0: max_steps must be positive",
    (
        "exact_shards=2,64",
        "train_batch_size=128,32",
    ): "--exact_shards=64 --train_batch_size=32: exact_shards 64 is more",
    ("data_seed=" + ",".join(map(str, range(1002))),): "more than 1001 runs",
}


@pytest.mark.parametrize("grid", BAD)
def test_a_bad_grid(grid, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "slurm", *(f"--grid={text}" for text in grid), "--", "train", *DEMO]) == 2
    error = capsys.readouterr().err
    assert BAD[grid] in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_grid_and_its_arguments(tmp_path):
    for arguments, expected in (
        (["--learning_rate", "1"], "learning_rate is in the grid and among the arguments"),
        (["--learning-rate=1"], "learning_rate is in the grid and among the arguments"),
        (["--train_batch_siz", "1"], "did you mean '--train_batch_size'"),
        (["--output_dir", str(tmp_path)], "is a run's folder; the sweep needs one of its own"),
    ):
        (tmp_path / "about.json").touch()
        with pytest.raises(UserError, match=expected):
            folders(*GRID, arguments=[*DEMO, *arguments])
    with pytest.raises(UserError, match="more than 1001 runs"):
        folders(seeds="0-99999999999")


def test_the_working_folder_is_no_sweeps(tmp_path, monkeypatch):
    """Where no folder is named the sweep makes its own, whatever lies here."""
    (tmp_path / "about.json").touch()
    monkeypatch.chdir(tmp_path)
    assert folders("learning_rate=1e-5") == ["learning_rate-1e-5"]


def test_a_run_of_another_config_is_not_this_one(tmp_path, monkeypatch, capsys):
    """Nothing is started or queued beside it, and a task of a script that was kept does not take it for its own."""
    folder = tmp_path / "sw" / "learning_rate-1e-5" / "seed-1"
    folder.mkdir(parents=True)
    (tmp_path / "a.csv").touch()

    def refused(*arguments: str) -> str:
        given = [*DEMO, *arguments]
        try:
            folders("learning_rate=2e-5,1e-5", seeds="0-1", arguments=[*given, "--output_dir", str(tmp_path / "sw")])
            expected = ""
        except UserError as error:
            expected = str(error)
        own = [*given, "--learning_rate=1e-5", "--seed=1", "--output_dir", str(folder)]
        assert preflight([str(folder), *own]) == (2 if expected else 0)
        assert expected in capsys.readouterr().err
        return expected

    environment = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environment | {"MASTER_PORT": "0"}).items():
        monkeypatch.setenv(name, value)
    (folder / "results.json").write_text("{}")
    assert f"{folder} holds results.json, but no about.json" in refused()
    (folder / "about.json").write_text("{}")
    assert f"{folder} holds results.json, but no config.yaml" in refused()
    write_config(folder, parse_train([*DEMO, "--learning_rate", "1e-5", "--seed", "1", "--output_dir", str(folder)]))
    assert not refused()
    assert not refused("--save_steps", "7", "--unpad", "false")
    assert "holds a finished run of another config (num_train_epochs: saved " in refused("--num_train_epochs", "7")
    assert "train_file: saved None, now " in refused("--train_file", str(tmp_path / "a.csv"))
    (folder / "results.json").unlink()
    assert not refused()
    assert f"{folder} holds an unfinished run of another config (max_length: " in refused("--max_length", "7")


def test_the_list_of_runs(tmp_path):
    """A damaged one is found before anything is queued, and what cannot be read is told from what cannot be written."""
    record(tmp_path / "sw", ["a", "b"])
    record(tmp_path / "sw", ["c", "b"])
    assert recorded(tmp_path / "sw") == ["a", "b", "c"]
    for text in ('{"runs": 5}', '{"runs": "abc"}', '{"runs": [5]}', "{}", "[]", "{", "\xff"):
        (tmp_path / "sw" / "sweep.json").write_bytes(text.encode("latin-1"))
        for do in (
            lambda: record(tmp_path / "sw", ["a"]),
            lambda: folders("learning_rate=1e-5", arguments=[*DEMO, "--output_dir", str(tmp_path / "sw")]),
        ):
            with pytest.raises(UserError, match=r"sweep\.json is damaged: .*; remove it"):
                do()
    with pytest.raises(UserError, match=r"cannot write .*sweep\.json/sweep\.json: "):
        record(tmp_path / "sw" / "sweep.json", ["a"])


def test_what_a_config_leaves_out_is_said_once(said, tmp_path):
    folders(*GRID, arguments=[*DEMO, "--train_file", str(tmp_path / "a.csv")])
    assert len(said) == 1
    assert "left out, since recipe demo is of other data" in said[0]


def test_as_many_runs_as_slurm_takes(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\necho 'MaxArraySize            = 3'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert sbatch.max_runs() == 3
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert sbatch.max_runs() == sweep.MAX_RUNS
    with pytest.raises(UserError, match="more than 3 runs"):
        tasks(SweepConfig(grid=GRID), DEMO, most=3)


def test_a_task_reads_its_own_line(tmp_path):
    """bash itself: each number of the array gives its run's folder and options, as they are."""
    values = ["a b", "$(touch x)", "it's", "*", "--seed=1"]
    options = SlurmConfig(grid=["model_name_or_path=" + json.dumps(values), "learning_rate=1e-5,2e-5"])
    runs = tasks(options, DEMO)
    script = render(options, [*DEMO, "--output_dir", "out"], runs)
    assert "#SBATCH --array=0-9\n" in script
    # Without what needs a job: the head, and what comes between the shared part and the job step.
    part = script[script.index("case ${SLURM_ARRAY") : script.index('\nbegin "$@"')]
    shared = script[script.index("option() {") : script.index("# begin ARG")]
    head = script[script.index("set -- ") : script.index("# What the batch scripts")]
    for number, run in enumerate(runs):
        code = f'fail() {{ exit 9; }}\n{shared}{head}{part}printf "%s\\0" "$@"'
        result = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, cwd=tmp_path,
                                env={"SLURM_ARRAY_TASK_ID": str(number), "HOME": "/"})  # fmt: skip
        own = [*DEMO, "--output_dir", "out", *run.options, "--output_dir", f"out/{run.folder}"]
        assert result.stdout.split("\0")[:-1] == own, result.stderr
    assert subprocess.run(["bash", "-euc", code], env={"SLURM_ARRAY_TASK_ID": "10", "HOME": "/"}).returncode == 9
    assert not list(tmp_path.iterdir())


def program(folder: Path, code: int) -> list[str]:
    """Notes that it has run, and finishes as a run does."""
    text = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(); (p / 'results.json').touch(); exit({code})"
    return [sys.executable, "-c", text]


def test_in_turn(tmp_path, capfd):
    """One after the other; what fails stops no other, and what is finished is left alone."""
    handlers = {name: signal.getsignal(name) for name in signal.valid_signals()}
    try:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "results.json").touch()
        commands = {
            str(tmp_path / name): program(tmp_path / name, code) for name, code in zip("abc", (3, 0, 0), strict=True)
        }
        assert in_turn(commands) == 1
        said = capfd.readouterr().err
        assert f"run 2 of 3 is finished: {tmp_path / 'b'}\n" in said
        assert said.splitlines()[-1] == f"crossrank: {tmp_path / 'a'} ended with exit code 3"
        assert in_turn(commands) == 0
    finally:
        for name, handler in handlers.items():
            if handler is not None and name not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(name, handler)


def test_asked_to_stop(tmp_path):
    """The run is told, once, and none follows it; the exit code is its own."""
    run = "trap 'echo told; kill $!; exit 85' TERM; echo ready; sleep 60 & wait"
    commands = {name: ["bash", "-c", run] for name in "ab"}
    code = f"import sys; from launcher.sweep import in_turn; sys.exit(in_turn({commands}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "told\n"
    assert process.returncode == 85


@pytest.mark.parametrize(("further", "expected"), [(["c"], 128 + signal.SIGTERM), ([], 0)])
def test_stopped_too_late(tmp_path, further, expected):
    """The run ends well all the same: it is no success while others are left, and those that are finished are not."""
    run = "trap 'touch results.json; kill $!; exit 0' TERM; echo ready; sleep 60 & wait"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").touch()
    commands = {str(tmp_path / name): ["bash", "-c", run] for name in ["a", "b", *further]}
    code = f"import sys; from launcher.sweep import in_turn; sys.exit(in_turn({commands}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == ""
    assert process.returncode == expected


def test_a_config_files_folder_is_not_the_sweeps(tmp_path, capsys, monkeypatch):
    """It is that of an earlier run, as a rule; the scripts of Slurm do not use it either."""
    (tmp_path / "config.yaml").write_text("output_dir: earlier\nrun_name: mine\n")
    monkeypatch.chdir(tmp_path)
    start = [
        "launch",
        "local",
        "--grid",
        "learning_rate=1e-5",
        "--dry_run",
        "--",
        "train",
        *DEMO,
        "--config",
        "config.yaml",
    ]
    assert main(start) == 0
    assert re.search(r" --output_dir runs/mine-[\d-]+/learning_rate-1e-5$", capsys.readouterr().out)


def test_the_commands_of_a_local_sweep(tmp_path, capsys, monkeypatch):
    start = ["launch", "local", "--nproc", "1", *(f"--grid={text}" for text in GRID), "--seeds", "0-1"]
    assert main([*start, "--dry_run", "--", "train", *DEMO, "--output_dir", str(tmp_path / "my sweep")]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8
    assert lines[0][1:] == [
        str(ROOT / "crossrank.py"), "train", *DEMO, "--output_dir", str(tmp_path / "my sweep"), "--learning_rate=1e-5",
        "--train_batch_size=32", "--seed=0", "--output_dir",
        str(tmp_path / "my sweep" / "learning_rate-1e-5,train_batch_size-32" / "seed-0"),
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_local_sweep(tmp_path):
    """Real runs: stopped in the first, which saves; `report` says so; the same command again goes through."""
    run = ["--max_train_samples", "64", "--max_eval_samples", "30", "--max_test_samples", "30", "--max_steps", "300",
           "--train_batch_size", "8", "--track_emissions", "false", "--write_report", "false", "--logging_steps",
           "1"]  # fmt: skip
    start = [sys.executable, "-m", "crossrank", "launch", "local", "--nproc", "1", "--grid", "learning_rate=1e-4,1e-3",
             "--", "train", *DEMO, *run, "--output_dir", str(tmp_path / "sweep")]  # fmt: skip
    first = tmp_path / "sweep" / "learning_rate-1e-4"
    process = subprocess.Popen(start, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (first / "metrics.jsonl").exists() or not losses(first):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stopped at step" in process.communicate()[1]
    assert process.returncode == 85
    assert [path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()] == [first.name]
    said = crossrank("report", tmp_path / "sweep", "--output_dir", tmp_path / "report").said
    assert "0 of 2 runs are finished; unfinished: learning_rate-1e-4; not begun: learning_rate-1e-3" in said
    assert subprocess.run(start, cwd=ROOT).returncode == 0
    assert len(losses(first)) == 300
    said = crossrank("report", tmp_path / "sweep", "--output_dir", tmp_path / "report").said
    assert "finished" not in said
