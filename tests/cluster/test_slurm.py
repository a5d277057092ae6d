"""Jobs on a real Slurm, through the project's own batch scripts: see fake_slurm.py for the nodes."""

import os
import signal
from pathlib import Path

import fake_slurm
import numpy as np
import pytest
import torch
from conftest import crossrank, events, losses
from safetensors.torch import load_file

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "1", "--dropout", "0.1", "--eval_strategy", "no", "--save_strategy", "no",
       "--track_emissions", "false", "--write_report", "false"]  # fmt: skip
SHORT = [*RUN, "--max_steps", "12"]
LONG = [*RUN, "--max_steps", "120", "--save_strategy", "steps", "--save_steps", "25"]
# An evaluation of a few seconds after step 5.
EVALUATING = [*RUN, "--max_steps", "10", "--eval_strategy", "steps", "--eval_steps", "5", "--max_eval_samples", "400",
              "--per_device_eval_batch_size", "1"]  # fmt: skip
BY_TORCHRUN = ["slurm/train.sbatch"]
BY_SRUN = ["slurm/train_srun.sbatch"]
full = pytest.mark.full


@pytest.fixture(scope="module")
def cluster(token_cache):
    if reason := fake_slurm.missing():
        pytest.skip(reason)
    with fake_slurm.Cluster(nodes=2, gpus=2) as cluster:
        (cluster.work / "slurm").symlink_to(fake_slurm.ROOT / "slurm")
        yield cluster


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Runs without Slurm, to compare with."""
    made: dict[tuple, Path] = {}

    def run(options: list[str], ranks: int = 0) -> Path:
        key = (*options, ranks)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("local") / "run"
            crossrank("train", *options, "--output_dir", made[key], ranks=ranks)
        return made[key]

    return run


def steps_of(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b'"event": "train"') if file.exists() else 0


def assert_same_run(folder: Path, reference: Path) -> None:
    """Bit for bit."""
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, reference))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(folder) == losses(reference)
    assert events(folder, "eval") == events(reference, "eval")


def ranks_of(job: fake_slurm.Job) -> dict[int, int]:
    """Process numbers, as seen from outside, of a job's ranks."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pairs = [pair.partition("=") for pair in (process / "environ").read_bytes().decode().split("\0")]
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        env = {name: value for name, _, value in pairs}
        # torchrun and srun have the same words further back.
        if env.get("SLURM_JOB_ID") == job.number and b"crossrank" in command[1:4] and b"python" in command[0]:
            found[int(env.get("RANK", env["SLURM_PROCID"]))] = int(process.name)
    return found


def test_two_nodes_by_launch(cluster, local):
    """Two nodes of two ranks, submitted and followed by `crossrank launch slurm --wait`."""
    folder = cluster.work / "launched"
    result = cluster.crossrank("launch", "slurm", "--nodes", 2, "--gpus-per-node", 2, "--log-dir", "my logs", "--wait",
                               "--job-name", "two-nodes", "--", "train", *SHORT, "--output_dir", folder)  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 rank(s), backend ddp" in result.stdout
    for node in ("node1", "node2"):
        assert f"{node}: the same code, 2 GPU(s) (CUDA_VISIBLE_DEVICES=0,1), shares {folder}" in result.stdout
    assert "commit " in result.stdout or "no git checkout" in result.stdout
    assert "torch 2" in result.stdout
    assert "COMPLETED" in result.stderr
    (log,) = (cluster.work / "my logs").iterdir()
    assert log.name.startswith("two-nodes-")
    assert log.read_text() == result.stdout
    assert np.allclose(losses(folder), losses(local(SHORT)), rtol=0, atol=1e-5)
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".exit", ".preflight"))]


@pytest.mark.parametrize(
    "gpus", ["--gpus-per-task=1", pytest.param("--gpus-per-node=2", marks=full), pytest.param("", marks=full)]
)
def test_two_nodes_by_srun(cluster, local, gpus):
    """One task a rank; they find each other through Slurm's variables. Bit for bit the run of one process."""
    folder, exact = cluster.work / f"srun{gpus}", [*SHORT, "--exact_shards", "4"]
    job = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=2", *filter(None, [gpus]), *BY_SRUN, *exact, "--output_dir", folder
    )
    assert job.wait() == "0:0", job.log
    assert "4 rank(s), backend ddp" in job.log
    assert_same_run(folder, local(exact))


def preempted(cluster, job: fake_slurm.Job, folder: Path, step: int, name: str = "USR1") -> None:
    """Warns the job after `step`, and waits until it has been queued again and is done."""
    job.wait_for(lambda: steps_of(folder) >= step)
    job.signal(name)
    assert job.wait() == "0:0", job.log
    assert f"by SIG{name}" in job.log
    assert "exit code 85" in job.log
    assert "REQUEUE " in job.log
    assert "restart 1," in job.log
    assert job.show()["Restarts"] == "1"


@pytest.mark.parametrize(
    ("script", "name"),
    [(BY_TORCHRUN, "USR1"), pytest.param(BY_SRUN, "USR1", marks=full), pytest.param(BY_TORCHRUN, "USR2", marks=full)],
)
def test_warned_while_it_trains(cluster, local, script, name):
    """The time limit's warning: all ranks save the same step, the job is queued again and ends as if left alone."""
    folder = cluster.work / f"warned-{len(script[0])}-{name}"
    tasks = ["--nodes=2", "--gpus-per-node=1"]
    job = cluster.sbatch(*tasks, *script, *LONG, "--output_dir", folder)
    preempted(cluster, job, folder, 20, name)
    assert "stopped at step" in job.log
    assert "resuming at step" in job.log
    assert_same_run(folder, local(LONG, ranks=2))


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=full)])
def test_warned_while_it_evaluates(cluster, local, nodes):
    folder = cluster.work / f"evaluating-{nodes}"
    job = cluster.sbatch(f"--nodes={nodes}", *BY_SRUN, *EVALUATING, "--output_dir", folder)
    preempted(cluster, job, folder, 5)
    assert "stopped at step 5 by" in job.log
    assert_same_run(folder, local(EVALUATING, ranks=0 if nodes == 1 else 2))


@full
def test_warned_before_it_starts(cluster):
    """In the preflight: there is nothing to save, and no rank is started any more."""
    job = cluster.sbatch(*BY_SRUN, *SHORT, "--output_dir", cluster.work / "starting")
    job.wait_for(lambda: "START" in job.log)
    job.signal("USR1")
    assert job.wait() == "0:0", job.log
    assert job.show()["Restarts"] == "1"
    assert job.log.count("rank(s), backend") == 1


def test_cancelled_is_cancelled(cluster):
    """scancel lets the ranks save, and the job is not queued again; the same command goes on."""
    folder = cluster.work / "cancelled"
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", *BY_TORCHRUN, *LONG, "--output_dir", folder)
    job.wait_for(lambda: steps_of(folder) >= 10)
    cluster.run("scancel", job.number)
    job.wait()
    cluster.wait_until_idle()
    assert job.state == "CANCELLED", job.log
    assert job.show()["Restarts"] == "0"
    assert "REQUEUE " not in job.log
    saved = [int(path.name[5:]) for path in folder.glob("checkpoints/step-*")]
    assert max(saved) == steps_of(folder)  # not a step was lost


@full
@pytest.mark.parametrize(("victim", "script"), [("node1", BY_TORCHRUN), ("node2", BY_TORCHRUN), ("node2", BY_SRUN)])
def test_a_node_dies(token_cache, local, victim, script):
    """Slurm queues the job again when it misses the node, and the run goes on from its last checkpoint.

    Slurm misses it late, as it does by default (300 s): the ranks that are left have failed long before.
    """
    if reason := fake_slurm.missing():
        pytest.skip(reason)
    with fake_slurm.Cluster(patience=80) as cluster:
        (cluster.work / "slurm").symlink_to(fake_slurm.ROOT / "slurm")
        folder = cluster.work / "crash"
        job = cluster.sbatch("--nodes=2", "--ntasks-per-node=1", *script, *LONG, "--output_dir", folder)
        job.wait_for(lambda: list(folder.glob("checkpoints/step-*")))
        cluster.kill_node(victim)
        job.wait_for(lambda: job.show()["Restarts"] == "1")
        cluster.start_node(victim)
        assert job.wait() == "0:0", job.log
        assert "resuming at step" in job.log
        assert_same_run(folder, local(LONG, ranks=2))


def test_an_array_of_seeds(cluster, local):
    folder = cluster.work / "seeds"
    job = cluster.sbatch("--array=42,7", "slurm/seeds.sbatch", *SHORT, "--output_dir", folder)
    assert job.wait() == "0:0", job.log
    cluster.wait_until_idle()
    assert_same_run(folder / "seed-42", local(SHORT))
    assert losses(folder / "seed-7") != losses(folder / "seed-42")
    logs = sorted(path.name for path in cluster.work.glob("seeds-*.out"))
    assert logs == [f"seeds-{job.number}_{seed}.out" for seed in (42, 7)]


def test_a_grid_and_its_report(cluster):
    """Four points as one array, by launch; the same command again leaves what is finished; one table over them."""
    folder, tiny = cluster.work / "grid", [*RUN, "--max_steps", "3", "--max_eval_samples", "30"]
    command = ["launch", "slurm", "--grid", "learning_rate=1e-4,1e-3", "--grid", "train_batch_size=16,32", "--seeds",
               "7", "--wait", "--", "train", *tiny, "--output_dir", folder]  # fmt: skip
    result = cluster.crossrank(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    points = [f"learning_rate-{rate},train_batch_size-{size}" for rate in ("1e-4", "1e-3") for size in (16, 32)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*points, "sweep.json"])
    assert all(len(losses(folder / point / "seed-7")) == 3 for point in points)
    assert len({tuple(losses(folder / point / "seed-7")) for point in points}) == 4
    (folder / points[2]).rename(cluster.work / "away")
    said = crossrank("report", folder, "--output_dir", cluster.work / "before").said
    assert f"3 of 4 runs are finished; not begun: {points[2]}/seed-7" in said
    (cluster.work / "away").rename(folder / points[2])
    result = cluster.crossrank(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("finished before: ") == 4
    assert "finished" not in crossrank("report", folder, "--output_dir", cluster.work / "report").said
    table = (cluster.work / "report" / "README.md").read_text()
    assert "4 runs in 4 groups" in table
    for rate in ("0.0001", "0.001"):
        for size in (16, 32):
            assert f"| learning_rate {rate}, global_batch_size {size} " in table


def test_a_bad_option_never_reaches_the_queue(cluster):
    result = cluster.crossrank("launch", "slurm", "--", "train", "--recipe", "demo", "--learning_rat", "1")
    assert result.returncode == 2
    assert "did you mean '--learning_rate'" in result.stderr
    assert not cluster.run("squeue", "-h").stdout


def test_slurm_refuses(cluster):
    result = cluster.crossrank("launch", "slurm", "--partition", "nosuch", "--", "train", "--recipe", "demo")
    assert result.returncode == 2
    assert "Slurm refused the job" in result.stderr
    assert "invalid partition" in result.stderr


@pytest.mark.parametrize("script", [BY_TORCHRUN, pytest.param(BY_SRUN, marks=full)])
def test_a_rank_fails(cluster, script):
    """Its error is in the job's log, once, and its exit code is the job's, even through torchrun."""
    rows = cluster.work / "rows.csv"
    rows.write_text("premise,hypothesis,label\na,b,0\nc,,1\n")
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", *script, *SHORT, "--train_file", rows,
                         "--output_dir", cluster.work / "failing")  # fmt: skip
    assert job.wait() == "2:0", job.log
    assert job.state == "FAILED"
    assert job.log.count("rows.csv, row 1: hypothesis is empty") == 1
    assert "[rank " in job.log
    assert "Traceback" not in job.log
    assert "REQUEUE " not in job.log


@full
@pytest.mark.parametrize("script", [BY_TORCHRUN, BY_SRUN])
def test_a_rank_is_killed(cluster, script):
    """As by the kernel, when memory is short: the whole job ends at once, with an error, and is not queued again."""
    folder = cluster.work / f"killed-{len(script[0])}"
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", *script, *LONG, "--output_dir", folder)
    job.wait_for(lambda: steps_of(folder) >= 10)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    assert job.wait() != "0:0"
    assert job.state == "FAILED", job.log
    if script == BY_TORCHRUN:
        assert "rank 1 on node2 was killed by SIGKILL" in job.log
    assert "Traceback" not in job.log
    assert job.show()["Restarts"] == "0"


def test_preflight_finds_a_missing_gpu(cluster):
    cluster.show_gpus("node2", 1)
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=2", *BY_TORCHRUN, *SHORT, "--output_dir", cluster.work / "few")
    assert job.wait() == "2:0", job.log
    cluster.show_gpus("node2", 2)
    assert "[node2] error: Slurm gave 2 GPU(s), but nvidia-smi shows 1" in job.log
    assert "rank(s)" not in job.log


def test_preflight_finds_a_bad_option(cluster):
    """Of those who submit the script by themselves."""
    job = cluster.sbatch(*BY_TORCHRUN, "--recipe", "dmo")
    assert job.wait() == "2:0", job.log
    assert "did you mean 'demo'" in job.log


def test_preflight_finds_other_code(cluster):
    """node2 sees another version of one file."""
    other = cluster.folder / "other.py"
    other.write_text((fake_slurm.ROOT / "trainer" / "metrics.py").read_text() + "\n")
    cluster.on_node("node2", "mount", "--bind", other, fake_slurm.ROOT / "trainer" / "metrics.py")
    try:
        job = cluster.sbatch("--nodes=2", *BY_TORCHRUN, *SHORT, "--output_dir", cluster.work / "other")
        assert job.wait() == "2:0", job.log
    finally:
        cluster.on_node("node2", "umount", fake_slurm.ROOT / "trainer" / "metrics.py")
    assert f"[node2] error: the code in {fake_slurm.ROOT} is not that of node1" in job.log


@full
def test_preflight_finds_a_folder_that_is_not_shared(cluster):
    own = cluster.work / "own"
    own.mkdir()
    cluster.on_node("node2", "mount", "-t", "tmpfs", "tmpfs", own)
    try:
        job = cluster.sbatch("--nodes=2", *BY_TORCHRUN, *SHORT, "--output_dir", own / "run")
        assert job.wait() == "2:0", job.log
    finally:
        cluster.on_node("node2", "umount", own)
    assert f"output_dir {own}/run is not shared" in job.log
