"""Before the ranks have met: what their launcher's variables say, and who else is at the port."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import Ranks, crossrank
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo

from trainer import meeting

RUN = ["train", "--recipe", "demo", "--max_steps", "1", "--track_emissions", "false"]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is no number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is empty"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "2(x2)", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is '2(x2)'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_variables_that_say_nothing(tmp_path, env, said):
    result = crossrank(*RUN, "--output_dir", tmp_path / "run", check=False, **env)
    assert result.returncode == 2
    assert said in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("crossrank: ")]) == 1
    assert "Traceback" not in result.stderr


@pytest.fixture
def other_program():
    """Listens, and never answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield str(sock.getsockname()[1])


def test_another_program_at_the_port(tmp_path, other_program):
    """One error, and all ranks end as soon as their launcher tells them to; long before ddp_timeout."""
    result = crossrank(*RUN, "--output_dir", tmp_path / "run", ranks=2, check=False, MASTER_PORT=other_program)
    assert result.returncode == 1
    assert result.stderr.count("crossrank: ") == 1
    assert f"cannot listen on 127.0.0.1:{other_program}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_ends_a_rank_that_waits_for_the_others(tmp_path, other_program, number, code):
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": other_program}
    script = tmp_path / "waiting.py"
    script.write_text(
        "import sys\nfrom trainer import __main__, meeting\nstore = meeting._store\n"
        "def said(*args):\n    print('waiting', flush=True)\n    return store(*args)\n"
        "meeting._store = said\nsys.exit(__main__.main(sys.argv[1:]))\n"
    )
    started = Ranks([*RUN, "--output_dir", tmp_path / "run"], 0, None, script, env)
    while "waiting" not in started.said:
        assert started.processes[0].is_alive(), started.said
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(started.processes[0].pid, number)
    assert started.wait().returncode == code


def test_a_rank_that_is_never_started(tmp_path):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(sock.getsockname()[1])
    result = crossrank(*RUN, "--ddp_timeout", "2", "--output_dir", tmp_path / "run", check=False, **env)
    assert result.returncode == 1
    assert f"the 2 ranks did not meet at 127.0.0.1:{env['MASTER_PORT']}" in result.stderr
    assert "Traceback" not in result.stderr


def test_being_stopped_is_not_why_a_failed_run_ended(tmp_path, monkeypatch):
    """Else its batch script would queue it again and again."""
    from trainer.__main__ import record_exit_code

    monkeypatch.setenv("CROSSRANK_EXIT_FILE", str(tmp_path / "exit"))
    for code, expected in ((85, "85"), (2, "2"), (85, "2"), (1, "1")):
        record_exit_code(code)
        assert (tmp_path / "exit").read_text() == expected


def test_nccl_waits_longer_than_gloo(monkeypatch):
    """A second gloo stands in for it, as what computes on the GPU."""

    def make(store, rank, size, timeout):
        return ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("instead", make, devices=["cuda"])
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_nccl_timeout", None)
    patience = timedelta(seconds=7)
    dist.init_process_group("cpu:gloo,cuda:instead", store=HashStore(), rank=0, world_size=1, timeout=patience)
    try:
        meeting.outlast_gloo(torch.device("cuda"), patience)
        group = dist.distributed_c10d._get_default_group()
        gloo, nccl = (group._get_backend(torch.device(kind)).options._timeout for kind in ("cpu", "cuda"))
        made_later = dist.distributed_c10d._get_default_timeout(dist.Backend.NCCL)
    finally:
        dist.destroy_process_group()
    assert gloo == patience
    assert nccl == made_later > patience + timedelta(seconds=30)  # enough to ask the others, and to say it
