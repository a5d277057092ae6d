"""Energy: summed over nodes, carried over interruptions, never in the way of a run."""

import csv
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, crossrank, free_port

from trainer.config import LoggingConfig
from trainer.ranks import World
from trainer.run import energy
from trainer.run.energy import Meter, look_up_country, summarise

RUN = ["--recipe", "demo", "--max_train_samples", "330", "--max_eval_samples", "101", "--max_test_samples", "101",
       "--max_steps", "12", "--save_steps", "6", "--save_total_limit", "null", "--eval_strategy", "no",
       "--write_report", "false", "--country_iso_code", "FRA"]  # fmt: skip
ALONE = World(0, 1, 0, torch.device("cpu"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "emissions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def used(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["energy"]


def check_two_nodes(folder: Path) -> None:
    measured, total = rows(folder), used(folder)
    assert sorted(row["rank"] for row in measured) == ["0", "1"]
    assert all(float(row["energy_consumed"]) > 0 for row in measured)
    assert total["kwh"] == pytest.approx(sum(float(row["energy_consumed"]) for row in measured))
    assert total["co2_kg"] == pytest.approx(sum(float(row["emissions"]) for row in measured))
    assert total["hours"] == pytest.approx(float(next(r for r in measured if r["rank"] == "0")["duration"]) / 3600)
    assert total["kwh_per_1000_pairs"] == pytest.approx(total["kwh"] / (12 * 64 - 2 * 54) * 1000, rel=0.01)


def test_two_nodes_are_the_sum_of_each(tmp_path):
    """Ranks that are both the first of their node, as two machines' are."""
    crossrank("train", *RUN, "--output_dir", tmp_path / "run", ranks=2, LOCAL_RANK="0")
    check_two_nodes(tmp_path / "run")


@pytest.mark.full
def test_two_nodes_of_torchrun(tmp_path):
    """Two agents, each with a rank: what torchrun itself starts on two machines."""
    folder = tmp_path / "run"
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    train = ["-m", "crossrank", "train", *RUN, "--output_dir", str(folder)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    agents = [subprocess.Popen([*start, "--node-rank", str(node), *place, *train], env=env) for node in (0, 1)]
    assert [agent.wait() for agent in agents] == [0, 0]
    check_two_nodes(folder)


def test_one_node_has_one_tracker_and_a_resumed_run_has_both_stretches(tmp_path):
    folder = tmp_path / "run"
    crossrank("train", *RUN, "--output_dir", folder, ranks=2)
    assert [row["rank"] for row in rows(folder)] == ["0"]
    whole = used(folder)
    assert whole["country_iso_code"] == "FRA"
    assert whole["co2_kg"] < 0.1 * whole["kwh"]  # nuclear power; the world's average is 0.475
    # As it was when it died after step 6.
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    shutil.rmtree(folder / "model")
    (folder / "results.json").unlink()
    saved = json.loads((folder / "checkpoints" / "step-000006" / "state.json").read_text())["totals"]["energy"]
    crossrank("train", *RUN, "--output_dir", folder)
    first, second = rows(folder)
    assert float(first["energy_consumed"]) == saved[0]["energy_consumed"] > 0
    assert used(folder)["kwh"] == pytest.approx(saved[0]["energy_consumed"] + float(second["energy_consumed"]))
    assert used(folder)["hours"] == pytest.approx((saved[0]["duration"] + float(second["duration"])) / 3600)


def test_off(tmp_path):
    crossrank("train", *RUN, "--track_emissions", "false", "--output_dir", tmp_path / "run", ranks=2)
    assert used(tmp_path / "run") is None
    assert not (tmp_path / "run" / "emissions.csv").exists()


def meter(**fields) -> Meter:
    return Meter(LoggingConfig(**fields), ALONE)


def test_a_look_up_that_hangs_holds_nothing_up(monkeypatch):
    """The meter is made, and the run could start, while the look-up still waits."""
    asked, released = threading.Event(), threading.Event()

    def hang(url):
        asked.set()
        released.wait()
        return "DEU", None

    monkeypatch.setattr(energy, "look_up_country", hang)
    made = meter()
    asked.wait()
    monkeypatch.setattr(energy, "PATIENCE", 0.01)
    assert made.rows()[0]["failed"] == "codecarbon has not started"
    released.set()
    monkeypatch.setattr(energy, "PATIENCE", None)
    assert made.rows()[0]["country_iso_code"] == "DEU"
    made.close()


GPUS = """
import json, sys
from codecarbon import emissions_tracker
from codecarbon.core import gpu
from trainer import __main__
from trainer.run import energy
energy.PATIENCE = None
energy.gpu_uuid = lambda world: f"{world.rank + 2}a-bc"  # each rank sees one: the driver's third, and its fourth
class Devices:
    device_count = 5
    def get_gpu_static_info(self):
        return [{"uuid": f"GPU-{i}a-bc", "gpu_index": i} for i in range(5)]
gpu.AllGPUDevices = Devices
start = emissions_tracker.OfflineEmissionsTracker.start
def said(self):
    print("measures", self._gpu_ids, flush=True)
    return start(self)
emissions_tracker.OfflineEmissionsTracker.start = said
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_nodes_tracker_measures_the_gpus_of_all_its_ranks(tmp_path):
    """Also where a task sees only its own, as under srun --gpus-per-task=1."""
    script = tmp_path / "gpus.py"
    script.write_text(GPUS)
    run = [*RUN, "--output_dir", tmp_path / "run"]
    result = crossrank("train", *run, ranks=2, script=script, CUDA_VISIBLE_DEVICES="0")
    assert result.stdout.count("measures") == 1
    assert "measures [2, 3]" in result.stdout


def test_a_gpu_that_the_tracker_cannot_see(monkeypatch, said):
    from codecarbon.core import gpu

    monkeypatch.setattr(gpu.AllGPUDevices, "get_gpu_static_info", lambda self: [{"uuid": "GPU-a", "gpu_index": 3}])
    assert energy.seen(["a", "b"]) == [3]
    assert "1 of this node's 2 GPUs cannot be seen" in said[0]


def test_signal_handlers_stay(monkeypatch, said):
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(name) for name in names]
    monkeypatch.setattr(energy, "PATIENCE", None)
    made = meter(country_iso_code="FRA")
    assert made.rows()[0]["energy_consumed"] >= 0
    made.close()
    assert [signal.getsignal(name) for name in names] == before


@pytest.mark.parametrize(("country", "reason"), [("XXX", "does not know the country XXX"), (None, "is not known")])
def test_never_a_wrong_country_in_silence(country, reason, monkeypatch, said):
    """No network, or a country that does not exist: the world's average, and a word about it."""
    monkeypatch.setattr(energy, "PATIENCE", None)
    made = meter(country_iso_code=country)
    row = made.rows()[0]
    made.close()
    assert row["country_iso_code"] is None
    assert row["country_source"] == "world average"
    assert reason in said[0]
    assert row["emissions"] == pytest.approx(0.475 * row["energy_consumed"], rel=1e-3)


class Place(http.server.BaseHTTPRequestHandler):
    answer = b""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b'{"country_code3": "fra", "region": "Bretagne"}', ("FRA", "bretagne")),
        (b"<html>log in to this network</html>", (None, None)),
        (b'{"country": 1}', (None, None)),
    ],
)
def test_the_country_of_an_address(answer, expected, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(Place, "answer", answer)
    with http.server.HTTPServer(("127.0.0.1", 0), Place) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert look_up_country(f"http://127.0.0.1:{server.server_port}/") == expected
        server.shutdown()
    assert look_up_country(f"http://127.0.0.1:{server.server_port}/") == (None, None)  # nobody there


def test_what_codecarbon_raises_ends_no_run(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    monkeypatch.setattr(energy, "PATIENCE", None)
    made = meter()
    (row,) = made.rows()
    made.close()
    assert row["failed"].startswith("ModuleNotFoundError")
    assert summarise([row], 100) is None


def test_a_node_that_could_not_be_measured_is_counted():
    good = {"node": "a", "rank": 0, "energy_consumed": 2.0, "emissions": 1.0, "duration": 3600.0, "cpu_energy": 1.5,
            "gpu_energy": 0.0, "ram_energy": 0.5, "estimated": False, "country_iso_code": "FRA",
            "country_source": "country_iso_code"}  # fmt: skip
    summary = summarise([good, {"node": "b", "rank": 8, "failed": "NVMLError"}, good | {"estimated": True}], 4000)
    assert (summary["kwh"], summary["co2_kg"], summary["hours"]) == (4.0, 2.0, 2.0)
    assert summary["kwh_per_1000_pairs"] == 1.0
    assert summary["unmeasured_stretches"] == 1
    assert summary["estimated"] is True
    assert summary["nodes"] == {"a": {"kwh": 4.0}}
