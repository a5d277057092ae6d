"""Two hosts that do not exist, and a real network between them: namespaces, a veth pair, limits on it.

Each host has its own name, network and /etc/hosts. Needs root and iproute2; the delay needs a kernel with netem.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("host1", "host2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def missing() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "iproute2 is not installed"
    probe = subprocess.run(["ip", "netns", "add", f"probe-{os.getpid()}"], capture_output=True)
    subprocess.run(["ip", "netns", "del", f"probe-{os.getpid()}"], capture_output=True)
    return "this machine allows no network namespaces" if probe.returncode else None


class TwoHosts:
    """`rate` as tc writes it, such as 100mbit; `delay` of each way, such as 1ms. A context manager."""

    def __init__(self, rate: str | None = None, delay: str | None = None) -> None:
        self.rate, self.delay = rate, delay
        self.spaces = [f"crossrank-{os.getpid()}-{name}" for name in NAMES]
        self.folder = Path(tempfile.mkdtemp(prefix="crossrank-hosts-"))
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> TwoHosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        shutil.rmtree(self.folder)

    def _make(self) -> None:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        for space in self.spaces:
            _do("ip", "netns", "add", space)
        _do(
            "ip",
            "link",
            "add",
            "wire",
            "netns",
            self.spaces[0],
            "type",
            "veth",
            "peer",
            "wire",
            "netns",
            self.spaces[1],
        )
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            _do("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "wire")
            for device in ("wire", "lo"):
                _do("ip", "-n", space, "link", "set", device, "up")
            self._limit(space)

    def _limit(self, space: str) -> None:
        add = ["tc", "-n", space, "qdisc", "add", "dev", "wire"]
        if self.delay is not None:
            rate = ["rate", self.rate] if self.rate else []
            _do(*add, "root", "netem", "delay", self.delay, *rate)
        elif self.rate is not None:
            _do(*add, "root", "tbf", "rate", self.rate, "burst", "64kb", "latency", "50ms")

    def run(self, commands: list[list[str]], env: dict[str, str]) -> list[subprocess.CompletedProcess]:
        """Runs one command on each host at the same time, and waits for both."""
        self.started = []
        # Into files: a pipe that nobody reads yet would stop its host, and so the other one.
        logs = [(self.folder / f"{name}.log").open("w+") for name in NAMES]
        for space, name, command, log in zip(self.spaces, NAMES, commands, logs, strict=True):
            enter = ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "bash", "-euc", ENTER, "-", name]
            whole = [*enter, str(self.folder / "hosts"), *command]
            self.started.append(subprocess.Popen(whole, env=env, stdout=log, stderr=subprocess.STDOUT))
        results = []
        for command, process, log in zip(commands, self.started, logs, strict=True):
            code = process.wait()
            log.seek(0)
            results.append(subprocess.CompletedProcess(command, code, log.read(), ""))
            log.close()
        return results

    def signal(self, number: int) -> None:
        """Sends a signal to the command on each host."""
        for process in self.started:
            process.send_signal(number)


def has_netem() -> bool:
    """Whether the kernel can delay packets."""
    try:
        with TwoHosts(delay="1ms"):
            return True
    except subprocess.CalledProcessError:
        return False


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
