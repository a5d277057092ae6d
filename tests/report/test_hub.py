"""The upload, against a stand-in that speaks the hub's API over HTTP."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, free_port

from trainer.base.errors import TrainingFailed, UserError
from trainer.cli import parse_train
from trainer.report import hub

TOKEN = "hf_" + "s3cr3t" * 5
RUN = ["--recipe", "demo", "--max_train_samples", "128", "--max_eval_samples", "20", "--max_test_samples", "20",
       "--max_steps", "2", "--track_emissions", "false", "--push_to_hub", "--hub_model_id", "me/nli"]  # fmt: skip


class Hub(http.server.BaseHTTPRequestHandler):
    """Creates repositories, takes commits, keeps what it was sent."""

    protocol_version = "HTTP/1.1"

    def answer(self, value: object, code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        seen = self.server.seen
        seen["authorization"].add(self.headers.get("Authorization"))
        if self.server.refuse:
            self.answer({"error": "You don't have the rights"}, 403)
        elif self.path == "/api/repos/create":
            seen["created"] = json.loads(body)
            self.answer({"url": f"http://127.0.0.1:{self.server.server_port}/me/nli", "name": "me/nli", "id": "me/nli"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    seen["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": "http://127.0.0.1/me/nli/commit/1"})
        else:
            self.answer({"errors": [], "warnings": []})  # it also checks the card's metadata

    def do_GET(self) -> None:
        self.answer(
            {"id": "me/nli", "modelId": "me/nli", "siblings": [], "sha": "0" * 40, "private": self.server.private}
        )

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as made:
        made.private = True
        made.seen, made.refuse = {"files": {}, "authorization": set(), "created": None}, False
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def train(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess:
    """A process that has not yet read where the hub is."""
    command = [sys.executable, "-m", "crossrank", "train", *RUN, *options, "--output_dir", str(folder)]
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings | env)


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_model_and_card_are_uploaded_and_no_token_is_left(server, tmp_path):
    folder = tmp_path / "run"
    result = train(folder, "--hub_private_repo", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    assert result.returncode == 0, result.stderr
    created = server.seen["created"]
    assert created.get("visibility") == "private" or created["private"] is True  # the client's versions differ
    files = {str(p.relative_to(folder / "model")): p.read_bytes() for p in (folder / "model").rglob("*") if p.is_file()}
    assert server.seen["files"] == files
    assert b'CrossEncoder("me/nli")' in files["README.md"]
    assert server.seen["authorization"] == {f"Bearer {TOKEN}"}
    assert TOKEN not in result.stdout + result.stderr
    assert TOKEN.encode() not in written(folder)


def test_without_network_one_error_after_the_model_is_on_disk(tmp_path):
    result = train(tmp_path / "run", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("crossrank: ")]
    assert f"the model is complete in {tmp_path / 'run' / 'model'}" in error
    assert f"hf upload me/nli {tmp_path / 'run' / 'model'}" in error
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr
    assert (tmp_path / "run" / "results.json").is_file()
    assert (tmp_path / "run" / "model" / "README.md").is_file()


PUSH = """
import sys
from pathlib import Path
from trainer.report import hub
from trainer.cli import parse_train
from trainer.base.errors import TrainingFailed
try:
    hub.push(parse_train(sys.argv[2:]), Path(sys.argv[1]))
except TrainingFailed as error:
    print(error)
"""


@pytest.mark.parametrize("trouble", ["refused", "offline", "public"])
def test_an_upload_that_fails(trouble, server, tmp_path):
    """Also where a repository that should be private exists and is public."""
    server.refuse, server.private = trouble == "refused", trouble != "public"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("a card")
    settings = {"HF_HUB_OFFLINE": "1" if trouble == "offline" else "0", "PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
    env = os.environ | settings | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    command = [sys.executable, "-c", PUSH, str(tmp_path), *RUN, "--hub_private_repo"]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    reason = {"refused": "403", "offline": "HF_HUB_OFFLINE is set", "public": "it exists and is public"}[trouble]
    assert reason in result.stdout, result.stderr
    assert "could not be uploaded to me/nli" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    assert server.seen["files"] == {}


def test_a_token_in_an_error_is_hidden(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def fail(*args, **kwargs):
        raise OSError(f"bad header: Bearer {TOKEN}")

    monkeypatch.setattr(hub.HfApi, "create_repo", fail)
    with pytest.raises(TrainingFailed) as caught:
        hub.push(parse_train(RUN), tmp_path)
    assert "bad header: Bearer ***" in str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "white space", "-x", "a..b"])
def test_names_that_the_hub_does_not_allow(name, tmp_path):
    with pytest.raises(UserError, match="hub_model_id"):
        hub.repository(parse_train([*RUN[:-1], name]), tmp_path)


def test_a_push_needs_a_card():
    with pytest.raises(UserError, match="write_report"):
        parse_train([*RUN, "--write_report", "false"])
