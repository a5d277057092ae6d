"""`crossrank launch` without a cluster: commands, rendered scripts, bad input; tests/cluster has the real ones."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, events, losses

from launcher.command import TorchrunConfig, num_processes, torchrun
from launcher.devices import num_visible
from launcher.follow import describe, exit_code, parse
from launcher.sbatch import SlurmConfig, render, seconds
from launcher.sweep import Task
from trainer.base.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
DEMO = ["--recipe", "demo", "--output_dir", "runs/my run"]


def launch(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own, since launching replaces the process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, "-m", "crossrank", "launch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture
def gpus(tmp_path):
    """A PATH with a driver's tool that shows two GPUs."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: fake'\necho 'GPU 1: fake'\n")
    tool.chmod(0o755)
    return f"{tool.parent}:{os.environ['PATH']}"


RENDERED = {
    "torchrun": SlurmConfig(
        nodes=2, gpus_per_node=4, time="2-12", partition="gpu", account="nlp", qos="high", constraint="a100&ib",
        sbatch=["mem=64G", "exclusive"], job_name="allnli", log_dir="my logs", container="/images/cross rank.sif",
    ),
    "srun": SlurmConfig(nodes=2, nproc=2, ranks_by="srun", warning_signal="USR2", warning_seconds=300, job_name="cpu"),
    "seeds": SlurmConfig(seeds="0-4", gpus_per_node=1, job_name="sweep"),
    "sweep": SlurmConfig(seeds="0,7%2", grid=["learning_rate=1e-5,5e-5", "model_name_or_path=x"], gpus_per_node=1),
}  # fmt: skip


# Of a grid.
RUNS = [
    Task(
        f"learning_rate-{rate}/seed-{seed}",
        (f"--learning_rate={rate}", "--model_name_or_path=a b; 'c", f"--seed={seed}"),
        None,
    )
    for rate in ("1e-5", "5e-5")
    for seed in (0, 7)
]


def rendered(name: str) -> str:
    return render(RENDERED[name], DEMO, RUNS if name == "sweep" else ())


@pytest.mark.parametrize("name", RENDERED)
def test_rendering(name):
    """The golden files hold what is written into the scripts; the shared part is slurm/job.sh itself."""
    script = rendered(name)
    _, shared = (ROOT / "slurm" / "job.sh").read_text().split("\n", 1)
    assert script.count(shared) == 1
    assert script.replace(shared, "[slurm/job.sh]\n") == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck(tmp_path):
    scripts = [*(ROOT / "slurm").iterdir(), ROOT / ".ci" / "run"]
    for name in RENDERED:
        (tmp_path / name).write_text(rendered(name))
        scripts.append(tmp_path / name)
    # 2317: of functions that only a trap calls.
    command = ["shellcheck", "--external-sources", "--exclude=SC2317", *map(str, scripts)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "evil",
    ["a\n#SBATCH --uid=0", "a\nrm -rf x", "a;touch x", '"; touch x; "', "'$(touch x)'", "`touch x`", "a b", "a #x",
     "--wrap=x\n", "a\x00", "a\u2028b", "../x", "é\x85"],
)  # fmt: skip
def test_a_job_name_injects_nothing(evil):
    """It is refused wherever it is more than a plain name."""
    with pytest.raises(UserError, match="job_name"):
        SlurmConfig(job_name=evil)


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "log_dir", "sbatch"])
@pytest.mark.parametrize(
    "evil", ["a\n#SBATCH --uid=0", "a\nrm -rf x", 'a" --uid=0 "', "a'b", "a\\", "$(touch x)", "`x`", "a;b"]
)
def test_a_directive_injects_nothing(field, evil):
    value = [f"comment={evil}"] if field == "sbatch" else evil
    with pytest.raises(UserError, match="no place in an #SBATCH line"):
        render(SlurmConfig(**{field: value}), DEMO)


@pytest.mark.parametrize("name", ["mem 4", "-n", "a\nb", "", "$(x)=1"])
def test_an_option_of_sbatch_is_a_name(name):
    with pytest.raises(UserError, match=r"must look like mem=64G|none of them empty"):
        render(SlurmConfig(sbatch=[name]), DEMO)


EVIL = [
    "$(touch x)",
    "`touch x`",
    "a'b\"c",
    "a\nset -- oops\n#SBATCH --uid=0\ntouch x",
    "a;touch x",
    "*",
    "~",
    "\\",
    "",
]


def test_arguments_arrive_as_they_are(tmp_path):
    """bash itself reads the rendered script's values: nothing is run, split or expanded."""
    script = render(SlurmConfig(container="a'$(touch x)\nb"), EVIL)
    head = script[: script.index("# What the batch scripts")]
    result = subprocess.run(
        ["bash", "-c", head + 'printf "%s\\0" "$CROSSRANK_CONTAINER" "$@"'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.stdout.split("\0")[:-1] == ["a'$(touch x)\nb", *EVIL]
    assert not list(tmp_path.iterdir())
    # Slurm reads options down to the first command, and no further.
    lines = script.splitlines()
    assert "#SBATCH --uid=0" not in lines[: lines.index("set -euo pipefail")]


def option(name: str, *arguments: str) -> str:
    text = (ROOT / "slurm" / "job.sh").read_text()
    function = text[text.index("option() {") : text.index("# begin ARG")]
    return subprocess.run(["bash", "-c", function + 'option "$@"', "-", name, *arguments], capture_output=True,
                          text=True, env={"HOME": "/home/me"}).stdout  # fmt: skip


def test_the_shell_finds_the_run_folder():
    assert option("output_dir", "--recipe", "demo") == ""
    assert option("output_dir", "--output_dir", "a b", "--seed", "1") == "a b"
    assert option("output_dir", "--output-dir=a", "--output_dir=b=c") == "b=c"
    assert option("output_dir", "--output_dir=~/runs") == "/home/me/runs"
    assert option("seed", "--data_seed", "1", "--output_dir", "seed") == ""


def test_times():
    assert [seconds(time) for time in ("90", "10:30", "1:00:00", "2-12", "1-1:30", "1-00:00:10", "UNLIMITED")] == [
        5400, 630, 3600, 216_000, 91_800, 86_410, None,
    ]  # fmt: skip
    for wrong in ("", "1h", "1:2:3:4", "-5"):
        with pytest.raises(UserError):
            seconds(wrong)


BAD = {
    "slurm --time 1 -- train --recipe demo": "the time limit 1 is 60 s, and the warning comes 120 s before",
    "slurm --time soon -- train --recipe demo": "must look like 90 (minutes), 12:00:00 or 2-12",
    "slurm --gpus_per_node 2 --nproc 4 -- train --recipe demo": "nproc 4 is more than gpus_per_node 2",
    "slurm --nodes 0 -- train --recipe demo": "nodes must be above 0",
    "slurm --venv /nowhere -- train --recipe demo": "has no bin/activate",
    "slurm --seeds 1..3 -- train --recipe demo": "must look like 0-4",
    "slurm --seeds 0-2 -- train --recipe demo --seed 3": "leave out --seed",
    "local --seeds 4-0 -- train --recipe demo": "a range that ends before it begins",
    "local --seeds 1,0-3 -- train --recipe demo": "seed has the value 1, twice in the sweep",
    "slurm --seeds 0-2 --nodes 2 -- train --recipe demo": "add --ranks_by srun",
    "slurm --job_name a;b -- train --recipe demo": "job_name 'a;b' may hold",
    "slurm -- train --recipe dmo": "did you mean 'demo'",
    "slurm --partitoin x -- train --recipe demo": "did you mean '--partition'",
    "slrum -- train": "did you mean 'slurm'",
    "local --nproc 2": "end the command with -- train",
    "local -- predict x": "only `train` is launched",
    "local -- train --learning_rat 1": "did you mean '--learning_rate'",
    "torchrun --nnodes 2 -- train --recipe demo": "need --rdzv_endpoint HOST:PORT",
    "torchrun --rdzv_endpoint node1 -- train --recipe demo": "must be HOST:PORT",
    "torchrun --rdzv_endpoint node1:99999 -- train --recipe demo": "must be HOST:PORT",
    "local train --recipe demo": "put -- before train",
    "slurm --warning_seconds 70000 --time 2-0 -- train --recipe demo": "must be above 0 and below 65536",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(command, tmp_path, capsys):
    from trainer.__main__ import main

    assert main(["launch", *command.split()]) == 2
    error = capsys.readouterr().err
    assert BAD[command] in error
    assert len(error.splitlines()) == 1


def test_more_processes_than_gpus(gpus):
    result = launch("local", "--nproc", 3, "--dry-run", "--", "train", "--recipe", "demo", PATH=gpus)
    assert result.returncode == 2
    assert "nproc 3 is more than the 2 GPU(s) here" in result.stderr
    for env, nproc in (({}, 2), ({"CUDA_VISIBLE_DEVICES": "1"}, None), ({"CUDA_VISIBLE_DEVICES": ""}, None)):
        said = launch("local", "--dry-run", "--", "train", "--recipe", "demo", PATH=gpus, **env).stdout
        assert (f"--nproc-per-node={nproc}" in said) if nproc else ("torch.distributed.run" not in said)
    said = launch("local", "--nproc", 3, "--dry-run", "--", "train", *DEMO, PATH=gpus, CUDA_VISIBLE_DEVICES="").stdout
    assert "--nproc-per-node=3" in said
    assert shlex.split(said)[-5:] == ["train", *DEMO]


def test_what_cuda_sees():
    assert num_visible({}, 4) == 4
    seen = {"0,1": 2, "3": 1, "0,9,1": 1, "": 0, "-1": 0, "GPU-a,GPU-b": 2, "MIG-x": 1}
    assert {name: num_visible({"CUDA_VISIBLE_DEVICES": name}, 4) for name in seen} == seen
    assert num_visible({"CUDA_VISIBLE_DEVICES": "0,1"}, 0) == 0
    assert num_processes(None, 0) == 1


def test_torchruns_command():
    several = TorchrunConfig(nnodes=2, rdzv_endpoint="node1:29500", rdzv_id="run-1")
    assert torchrun(several, 4)[3:-1] == [
        "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29500", "--rdzv-id=run-1", "--nproc-per-node=4",
    ]  # fmt: skip
    assert torchrun(TorchrunConfig(), 4)[3:-1] == ["--standalone", "--nproc-per-node=4"]


def test_local_runs(tmp_path):
    """Two processes end as one does."""
    options = ["--recipe", "demo", "--max_steps", "5", "--logging_steps", "1", "--max_train_samples", "320",
               "--max_eval_samples", "30", "--max_test_samples", "30", "--track_emissions", "false", "--write_report",
               "false"]  # fmt: skip
    for nproc in (1, 2):
        result = launch("local", "--nproc", nproc, "--", "train", *options, "--output_dir", tmp_path / str(nproc))
        assert result.returncode == 0, result.stderr
        assert f"{nproc} rank(s)" in result.stderr
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), abs=1e-5)
    assert events(tmp_path / "1", "eval")


def test_without_slurm(tmp_path):
    """The script is printed, and what to do with it."""
    result = launch("slurm", "--", "train", *DEMO, cwd=tmp_path, PATH=str(tmp_path))
    assert result.returncode == 2
    assert "sbatch is not installed here" in result.stderr
    assert result.stdout.startswith("#!/usr/bin/env bash")
    assert "set -- --recipe demo --output_dir 'runs/my run'" in result.stdout
    assert not (tmp_path / "logs").exists()


def test_starts_with_few_imports_and_without_torch():
    code = (
        "import sys\n"
        "from trainer.__main__ import main\n"
        "code = main(['launch', 'slurm', '--dry-run', '--', 'train', '--recipe', 'demo'])\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "print(len(sys.modules), file=sys.stderr); sys.exit(code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    # What it costs is what it imports; torch alone brings thousands of modules.
    assert int(result.stderr) < 500


def test_how_a_job_stands():
    line = ("JobId=7 JobName=demo JobState=FAILED Reason=NonZeroExitCode Requeue=1 Restarts=1 ExitCode=2:0 "
            "NodeList=node[1-2] Command=(null) WorkDir=/a b/c StdOut=/a b/c/demo-7.out Power= ")  # fmt: skip
    record = parse(line)
    assert record["StdOut"] == "/a b/c/demo-7.out"
    assert describe("7", [record]) == "job 7: FAILED on node[1-2], restart 1"
    assert exit_code(record) == 2
    assert exit_code(record | {"ExitCode": "0:15", "JobState": "CANCELLED"}) == 143
    assert exit_code(record | {"ExitCode": "0:0", "JobState": "TIMEOUT"}) == 1
    assert exit_code(record | {"JobState": "COMPLETED", "ExitCode": "0:0"}) == 0


@pytest.mark.full
def test_scripts_are_in_a_wheel(tmp_path):
    """Built from a copy, as setuptools leaves its remains beside what it builds."""
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".venv", ".git", "runs", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--wheel-dir", tmp_path / "wheel", tmp_path / "source"]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    for path in (ROOT / "slurm").iterdir():
        assert (tmp_path / "installed" / "slurm" / path.name).read_text() == path.read_text()
    command = [sys.executable, "-m", "crossrank", "launch", "slurm", "--dry-run", "--", "train", "--recipe", "demo"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^set -- --recipe demo$", result.stdout, re.MULTILINE)


def test_local_ends_as_its_ranks_do(tmp_path):
    """Under torchrun, too: one line, and the ranks' own exit code."""
    rows = tmp_path / "rows.csv"
    rows.write_text("premise,hypothesis,label\na,b,0\nc,,1\n")
    start = ["local", "--nproc", 2, "--", "train", "--recipe", "demo"]
    result = launch(*start, "--train_file", rows, "--output_dir", tmp_path / "bad")
    assert result.returncode == 2
    assert "rows.csv, row 1: hypothesis is empty" in result.stderr
    assert "Traceback" not in result.stderr
    # Stopped on request: saved, and 85.
    command = [sys.executable, "-m", "crossrank", "launch", *map(str, start), "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=environment, cwd=ROOT)
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not losses(tmp_path / "run"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 85
    said = (tmp_path / "log").read_text()
    assert "start the same command again" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    "start", [["crossrank"], ["crossrank", "agent", "--standalone", "--nproc-per-node=2", "-m", "crossrank"]]
)
def test_stopped_while_it_starts(tmp_path, start, number, code):
    """In the seconds in which torch is loaded there is nothing to save; a job must still know that it may go on."""
    command = [sys.executable, "-m", *start, "train", "--recipe", "demo", "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    bit = 1 << (signal.SIGUSR1 - 1)  # Python catches SIGINT from the start
    while not int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16) & bit:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == code
    assert re.fullmatch(
        r"crossrank: (stopped by SIG\w+ before the (run|ranks) began.*)\n|crossrank: interrupted\n", error
    )
