"""Follows a job until it has ended: its log as it grows, and below it one line on how the job stands."""

import re
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from trainer.base.errors import TrainingFailed

ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "PREEMPTED",
    "NODE_FAIL",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
)
PATIENCE = 120.0  # seconds without an answer of slurmctld, which may be restarted meanwhile
Record = dict[str, str]


def follow(job: str) -> int:
    """Returns the job's exit code, the first that is not 0 of an array. A requeued job has not ended."""
    said: dict[str, int] = {}
    seen: dict[str, Record] = {}  # Slurm forgets a task of an array some minutes after its end
    standing = ""
    try:
        with tqdm(bar_format="{desc}", disable=None, dynamic_ncols=True) as line:
            while True:
                seen |= {record["JobId"]: record for record in show(job)}
                records = list(seen.values())
                for record in records:
                    copy_log(record["StdOut"], said)
                if line.disable and standing != (standing := describe(job, records)):
                    print(standing, file=sys.stderr, flush=True)
                line.set_description_str(f"{describe(job, records)}, {records[0]['RunTime']}")
                if all(record["JobState"] in ENDED for record in records):
                    break
                time.sleep(1)
    except KeyboardInterrupt:
        print(f"crossrank: job {job} continues; `scancel {job}` ends it", file=sys.stderr)
        raise
    return next((code for code in map(exit_code, records) if code), 0)


def show(job: str) -> list[Record]:
    """What Slurm knows of the job, or of each task of an array."""
    started = time.monotonic()
    while True:
        result = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True)
        if result.returncode == 0:
            return [parse(line) for line in result.stdout.splitlines() if line.strip()]
        if time.monotonic() - started > PATIENCE:
            raise TrainingFailed(f"Slurm no longer answers for job {job}: {result.stderr.strip()}")
        time.sleep(2)


def parse(line: str) -> Record:
    """`Key=value` pairs; a value may hold spaces. The first of a name counts."""
    pairs = re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", line)
    return dict(reversed(pairs))


def copy_log(name: str, said: dict[str, int]) -> None:
    """Prints what has been added to a log since it was last looked at."""
    path = Path(name)
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(said.get(name, 0))
        text = file.read()
    complete = text[: text.rfind(b"\n") + 1]  # a line is printed when it is complete
    said[name] = said.get(name, 0) + len(complete)
    if complete:
        tqdm.write(complete.decode(errors="replace"), file=sys.stdout, end="")
        sys.stdout.flush()


def describe(job: str, records: list[Record]) -> str:
    states = [record["JobState"] for record in records]
    if len(records) > 1:
        return f"job {job}: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    record = records[0]
    place = f" on {record['NodeList']}" if record.get("NodeList", "(null)") not in ("", "(null)") else ""
    reason = f" ({record['Reason']})" if states[0] == "PENDING" else ""
    restarts = f", restart {record['Restarts']}" if record["Restarts"] != "0" else ""
    return f"job {job}: {states[0]}{reason}{place}{restarts}"


def exit_code(record: Record) -> int:
    """0 only for success; 128 + the signal that ended the job, as in a shell."""
    if record["JobState"] == "COMPLETED":
        return 0
    code, _, signal = record["ExitCode"].partition(":")
    return int(code) or (128 + int(signal) if int(signal or 0) else 1)
