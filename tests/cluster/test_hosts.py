"""torchrun across two hosts with a slow network between them, without Slurm."""

import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, crossrank, losses

from benchmarks import two_hosts

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--logging_steps", "1", "--dropout", "0.1", "--max_steps", "12", "--track_emissions", "false",
       "--write_report", "false"]  # fmt: skip

EXACT = [*RUN, "--exact_shards", "4"]


@pytest.fixture(scope="module")
def possible():
    if reason := two_hosts.missing():
        pytest.skip(reason)


@pytest.mark.full
@pytest.mark.parametrize(("nproc", "rate", "delay"), [(1, "200mbit", None), (2, "50mbit", "2ms")])
def test_two_hosts(possible, tmp_path, nproc, rate, delay):
    """The same command on both; the run is that of one process, bit for bit."""
    if delay and not two_hosts.has_netem():
        delay = None  # the limit of bandwidth remains
    command = [sys.executable, "-m", "crossrank", "launch", "torchrun", "--nnodes", "2", "--nproc", str(nproc),
               "--rdzv-endpoint", "host1:29500", "--", "train", *EXACT, "--output_dir", f"{tmp_path}/run"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with two_hosts.TwoHosts(rate, delay) as hosts:
        results = hosts.run([command, command], env)
    assert [result.returncode for result in results] == [0, 0], results
    assert f"{2 * nproc} rank(s), backend ddp" in results[0].stdout + results[1].stdout
    crossrank("train", *EXACT, "--output_dir", tmp_path / "local")
    assert losses(tmp_path / "run") == losses(tmp_path / "local")
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "local")]
    assert weights[0] == weights[1]


def test_a_host_without_a_name(tmp_path):
    """An address that nobody knows is an error at once."""
    result = crossrank("train", *RUN, "--output_dir", tmp_path / "run", check=False, RANK="0", WORLD_SIZE="2",
                       MASTER_ADDR="nosuch.invalid", MASTER_PORT="29500", LOCAL_RANK="0")  # fmt: skip
    assert result.returncode == 2
    assert "the host nosuch.invalid has no address here" in result.said


@pytest.mark.full
def test_two_hosts_are_asked_to_stop(possible, tmp_path):
    """SIGTERM to both agents: the ranks save the same step, and nobody waits for a host that has left."""
    command = [sys.executable, "-m", "crossrank", "launch", "torchrun", "--nnodes", "2",
               "--rdzv-endpoint", "host1:29500", "--", "train", *RUN, "--max_steps", "5000", "--num_train_epochs",
               "1000", "--eval_strategy", "no", "--output_dir", f"{tmp_path}/run"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with two_hosts.TwoHosts() as hosts, ThreadPoolExecutor() as pool:
        results = pool.submit(hosts.run, [command, command], env)
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 20:
            assert not results.done(), results.result()
            time.sleep(0.1)
        hosts.signal(signal.SIGTERM)
        said = "".join(result.stdout for result in results.result())
    saved = int(re.search(r"stopped at step (\d+) by SIGTERM", said)[1])
    assert (tmp_path / "run" / "checkpoints" / f"step-{saved:06}" / "manifest.json").exists()
