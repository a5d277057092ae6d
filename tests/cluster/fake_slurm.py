"""A real Slurm of nodes that do not exist: munged, slurmctld, and one slurmd for each node in namespaces of its own.

A node has its own host name, its own address on the loopback interface, its own /etc/hosts and process numbers; killing
its `unshare` is a crash of the node. Everything lies in one private folder, which SLURM_CONF names; no file of the
system is touched. Needs root and Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")

CONF = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={patience}
KillWait=5
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,sched_min_interval=0,batch_sched_delay=0,default_queue_depth=100
JobRequeue=1
EnforcePartLimits=ALL
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=4 RealMemory=4000 Gres=gpu:h100:{gpus} "
    "State=UNKNOWN\n"
)
PARTITION = "PartitionName=ci Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
# The node's init: it must outlive slurmd's forks, and let no signal but KILL end the node half-way. A slurmd that has
# crashed, as 22.05 may where two jobs begin at once ("unaligned tcache chunk"), is started again, as by systemd, and
# leaves no image of its memory in the working folder.
NODE_INIT = """\
ulimit -c 0
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
slurmd -D -N "$1" &
trap 'asked=1; kill -TERM $!' TERM INT
while true; do
    wait $!
    kill -0 $! 2>/dev/null && continue
    [ -z "$asked" ] || break
    sleep 1
    slurmd -D -N "$1" &
done
"""
# The driver's tool, showing what the node of its caller has.
NVIDIA_SMI = """\
#!/bin/sh
for i in $(seq 0 $(($(cat "{folder}/gpus.$(hostname)") - 1))); do echo "GPU $i: fake"; done
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "only root can start nodes in namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)"
    if subprocess.run(["unshare", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "this machine allows no namespaces"
    return None


class Cluster:
    """`nodes` nodes of four CPUs and `gpus` GPUs, dead when silent for `patience` seconds. A context manager."""

    def __init__(self, nodes: int = 2, gpus: int = 2, patience: int = 20) -> None:
        self.names = [f"node{i + 1}" for i in range(nodes)]
        self.gpus, self.patience = gpus, patience
        self.folder = Path(tempfile.mkdtemp(prefix="crossrank-slurm-"))
        self.work = self.folder / "work"
        self.daemons: list[subprocess.Popen] = []
        self.nodes: dict[str, subprocess.Popen] = {}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = environment | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path, "PYTHONPATH": str(ROOT)}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.daemons:
            self.run("scancel", "--user", "root", check=False)
        for process in [*self.nodes.values(), *reversed(self.daemons)]:
            # An unshare ignores TERM, and takes its node down when it dies.
            process.send_signal(signal.SIGKILL if process in self.nodes.values() else signal.SIGTERM)
            process.wait()
        for name in self.names:
            for folder in sorted(Path("/sys/fs/cgroup/freezer").glob(f"slurm_{name}/**/"), reverse=True):
                with suppress(OSError):  # a process that is still dying keeps it
                    folder.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        for name in ("munge", "run", "log", "state", "fd", "bin", "work"):
            (self.folder / name).mkdir(mode=0o755)
        self.folder.chmod(0o755)
        (self.folder / "munge.key").touch(0o600)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        for i in range(self.gpus):
            subprocess.run(["mknod", self.folder / "fd" / f"gpu{i}", "c", "1", "3"], check=True)
        host, port = socket.gethostname().split(".")[0], _free_ports(1 + len(self.names))
        addresses = {name: f"127.0.0.{11 + i}" for i, name in enumerate(self.names)}
        # Where there are only version 2 cgroups, 22.05 wants systemd; then signals reach fewer processes than really.
        proctrack = "cgroup" if Path("/sys/fs/cgroup/freezer").is_dir() else "linuxproc"
        conf = CONF.format(host=host, folder=self.folder, port=port[0], proctrack=proctrack, patience=self.patience)
        for name, number in zip(self.names, port[1:], strict=True):
            conf += NODE.format(name=name, address=addresses[name], port=number, gpus=self.gpus)
            self.show_gpus(name, self.gpus)
        (self.folder / "slurm.conf").write_text(conf + PARTITION)
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu Type=h100 File={self.folder}/fd/gpu[0-{self.gpus - 1}]\n"
        )
        (self.folder / "cgroup.conf").write_text(CGROUP)
        (self.folder / "node.sh").write_text(NODE_INIT)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        smi = self.folder / "bin" / "nvidia-smi"
        smi.write_text(NVIDIA_SMI.format(folder=self.folder))
        smi.chmod(0o755)

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key",
            f"--socket={munge}/munge.socket", f"--pid-file={munge}/munged.pid", f"--log-file={munge}/munged.log",
            f"--seed-file={munge}/munged.seed", "--num-threads=2",
        )  # fmt: skip
        while not (munge / "munge.socket").exists():
            time.sleep(0.05)
        self._daemon("slurmctld", "-D", "-c")
        for name in self.names:
            self.start_node(name)
        self.wait_until_idle()

    def _daemon(self, *command: str) -> subprocess.Popen:
        output = (self.folder / "log" / f"{command[0]}.out").open("a")
        process = subprocess.Popen(command, env=self.env, stdout=output, stderr=output, start_new_session=True)
        self.daemons.append(process)
        return process

    def start_node(self, name: str) -> None:
        command = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "bash",
                   str(self.folder / "node.sh"), name, str(self.folder)]  # fmt: skip
        output = (self.folder / "log" / f"{name}.out").open("a")
        self.nodes[name] = subprocess.Popen(command, env=self.env, stdout=output, stderr=output, start_new_session=True)

    def kill_node(self, name: str) -> None:
        """A crash: every process of the node is gone at once."""
        self.nodes[name].kill()
        self.nodes[name].wait()

    def show_gpus(self, name: str, count: int) -> None:
        """What the driver of a node is to show."""
        (self.folder / f"gpus.{name}").write_text(str(count))

    def on_node(self, name: str, *command: object) -> None:
        """Runs a command in a node's own view of the file system."""
        first = Path(f"/proc/{self.nodes[name].pid}/task/{self.nodes[name].pid}/children").read_text().split()[0]
        self.run("nsenter", "--target", first, "--mount", "--pid", *map(str, command))

    def wait_until_idle(self) -> None:
        while self.run("sinfo", "-h", "-o", "%D %t", check=False).stdout.strip() != f"{len(self.names)} idle":
            for process in [*self.daemons, *self.nodes.values()]:
                assert process.poll() is None, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        return "".join(f"== {path.name}\n{path.read_text()}" for path in sorted((self.folder / "log").iterdir()))

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.env | env, cwd=self.work, capture_output=True, text=True, check=check)

    def sbatch(self, *arguments: object, **env: str) -> Job:
        """Submits a script of the project, from the folder where all jobs of this cluster run."""
        result = self.run("sbatch", "--parsable", *map(str, arguments), check=False, **env)
        assert result.returncode == 0, result.stderr
        return Job(self, result.stdout.strip())

    def crossrank(self, *arguments: object, **env: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "crossrank", *map(str, arguments), check=False, **env)


class Job:
    def __init__(self, cluster: Cluster, number: str) -> None:
        self.cluster, self.number = cluster, number

    def show(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        line = self.cluster.run("scontrol", "-o", "show", "job", self.number).stdout.splitlines()[0]
        return dict(pair.split("=", 1) for pair in line.split(" ") if "=" in pair)

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    @property
    def log(self) -> str:
        path = Path(self.show()["StdOut"])
        return path.read_text() if path.exists() else ""

    def signal(self, name: str) -> None:
        """As the time limit's warning comes: to the batch shell alone."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.number)

    def wait_for(self, condition) -> None:
        """Until it holds; fails where the job has ended before."""
        while not condition():
            assert self.state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.log
            time.sleep(0.1)

    def wait(self) -> str:
        """Until the job has ended. Returns its exit code, as `code:signal`."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
        while (now := self.show())["JobState"] not in ended:
            time.sleep(0.2)
        return now["ExitCode"]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
