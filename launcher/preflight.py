"""On every node, before a job's ranks start: what would otherwise fail late, or train something else.

    srun --ntasks-per-node=1 python -m crossrank preflight RUN_FOLDER [arguments of crossrank train]

The nodes meet in the run folder itself: each leaves a report there and reads the others'. So a folder that is not
shared, or a node with another copy of the code, is found before hours are computed. Exit code 2: something is wrong.
"""

import importlib.metadata
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from launcher.devices import num_present
from launcher.sweep import check_run
from trainer.base.environment import check_host
from trainer.base.errors import UserError
from trainer.base.files import write_json
from trainer.cli import parse_train
from trainer.run.versions import ROOT, code_hash, git_state, versions

# Seconds from what a node says last to its end. srun ends the step as soon as a task fails, and what slurmstepd has not
# sent on by then is lost.
UNTIL_HEARD = 1.0
PATIENCE = 60.0  # seconds; network file systems show new files some seconds late
Report = dict[str, Any]


def main(argv: list[str]) -> int:
    folder, *arguments = argv
    node, num_nodes = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
    try:
        if node == 0:
            check_run(Path(folder), parse_train(arguments))
            check_port(int(os.environ["MASTER_PORT"]))
        check_host(os.environ["MASTER_ADDR"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        report = {
            "host": socket.gethostname(),
            "gpus": check_gpus(),
            "visible": visible,
            "code": code_hash(),
            "versions": installed(),
        }
        reports = exchange(Path(folder), node, num_nodes, report)
        check_same(report, reports[0])
    except UserError as error:
        print(f"crossrank: [{socket.gethostname()}] error: {error}", file=sys.stderr, flush=True)
        time.sleep(UNTIL_HEARD)
        return 2
    if node == 0:
        describe(reports, Path(folder))
    return 0


def check_port(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(f"port {port}, where the ranks are to meet, cannot be used: {error.strerror}") from None


def check_gpus() -> int:
    """The GPUs that Slurm gave this job here. All of them must be there, else ranks would compute on the CPU."""
    given, present = int(os.environ.get("SLURM_GPUS_ON_NODE", 0)), num_present()
    if present < given:
        raise UserError(f"Slurm gave {given} GPU(s), but nvidia-smi shows {present}; have the node repaired, and keep "
                        f"away from it with --exclude={socket.gethostname()}")  # fmt: skip
    return given


def installed() -> dict[str, str]:
    try:
        return versions()
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed for {sys.executable}; set CROSSRANK_VENV or "
                        "CROSSRANK_CONTAINER, see the batch script") from None  # fmt: skip


def exchange(folder: Path, node: int, num_nodes: int, report: Report) -> list[Report]:
    """Every node's report, by way of the run folder. Raises UserError where that is not shared, or not writable."""
    meeting = folder / f".preflight-{os.environ['SLURM_JOB_ID']}"
    try:
        meeting.mkdir(parents=True, exist_ok=True)
        write_json(meeting / str(node), report)
    except OSError as error:
        raise UserError(f"cannot write to output_dir {folder.absolute()}: {error.strerror}") from None
    started = time.monotonic()
    files = [meeting / str(other) for other in range(num_nodes)]
    while missing := [file.name for file in files if not file.exists()]:
        if time.monotonic() - started > PATIENCE:
            raise UserError(f"output_dir {folder.absolute()} is not shared: nothing of node(s) {', '.join(missing)} "
                            "is seen in it; choose one on a file system that all nodes mount")  # fmt: skip
        time.sleep(0.1)
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def check_same(report: Report, first: Report) -> None:
    """Ranks with other code or other packages would compute another run."""
    if report["code"] != first["code"]:
        raise UserError(f"the code in {ROOT} is not that of {first['host']}; install the same version on all nodes")
    differing = {name: version for name, version in report["versions"].items() if version != first["versions"][name]}
    if differing:
        theirs = {name: first["versions"][name] for name in differing}
        raise UserError(
            f"the packages {differing} differ from {theirs} on {first['host']}; install the same on all nodes"
        )


def describe(reports: list[Report], folder: Path) -> None:
    git = git_state()
    commit = f"commit {git['commit']}{' with changes' if git['dirty'] else ''}" if git else "no git checkout"
    packages = ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items())
    print(f"crossrank in {ROOT}, {commit}, code {reports[0]['code'][:12]}; {packages}")
    for report in reports:
        gpus = f"{report['gpus']} GPU(s) (CUDA_VISIBLE_DEVICES={report['visible']})" if report["gpus"] else "no GPU"
        print(f"{report['host']}: the same code, {gpus}, shares {folder.absolute()}", flush=True)
