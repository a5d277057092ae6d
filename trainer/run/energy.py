"""The energy of a run, by codecarbon: one tracker a node, summed over nodes, carried over interruptions.

Everything of codecarbon happens in a thread of its own: importing and starting it takes seconds, a look-up of the
country may hang, and none of it may hold up or end a run. It measures the node, with all that runs there. Where the
processor's counters can't be read it takes the processor's load and its rated power, and always the memory's size: that
is marked as an estimate.
"""

import csv
import logging
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trainer.base.environment import offline
from trainer.base.errors import first_line
from trainer.base.files import replacing
from trainer.base.log import log
from trainer.config import LoggingConfig
from trainer.ranks import World

PATIENCE = 5.0  # seconds that a reading may take; it takes a hundredth of one
WORLD_AVERAGE = "world average"


class Meter:
    """This node's tracker, on local rank 0; on other ranks, and where nothing is to be tracked, it does nothing.

    A row describes one node over one stretch of the run, from a start to an interruption or the end: codecarbon's own
    fields, and `node`, `estimated`, `country_source`. A node that could not be measured has a row of only `failed`.
    """

    def __init__(self, config: LoggingConfig, world: World) -> None:
        self.config, self.world = config, world
        self.gpus = gpus_of_node(world) if config.track_emissions else []
        self.tracker: Any = None
        self.row: dict[str, Any] = {"failed": "codecarbon has not started"}
        self.thread: ThreadPoolExecutor | None = None
        if config.track_emissions and world.local_rank == 0:
            self.thread = ThreadPoolExecutor(1, "energy")
            self.thread.submit(self._guarded, self._start)

    def rows(self) -> list[dict[str, Any]]:
        """What every node has used in this stretch so far, on rank 0; elsewhere nothing. Every rank takes part."""
        if not self.config.track_emissions:
            return []
        row = None
        if self.thread is not None:
            with suppress(TimeoutError):  # then the reading before that is the best there is
                self.thread.submit(self._guarded, self._read).result(PATIENCE)
            row = {"node": platform.node(), "rank": self.world.rank, **self.row}
        return list(filter(None, self.world.gather_values(row) or []))

    def close(self) -> None:
        if self.thread is not None:
            self.thread.submit(self._guarded, lambda: self.tracker and self.tracker.stop())
            self.thread.shutdown(wait=False)

    def _guarded(self, work: Callable[[], object]) -> None:
        """An error of codecarbon's leaves a row that says so."""
        try:
            work()
        except Exception as error:  # drivers, sensors and files of any machine: no failure of the run
            self.row = self.row if "energy_consumed" in self.row else {"failed": first_line(error)}

    def _start(self) -> None:
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        country, region, source = self._place()
        found = seen(self.gpus)
        gpus: dict[str, Any] = {"gpu_ids": found} if found else {}
        # Several trackers may run on a machine: then codecarbon neither locks nor replaces signal handlers.
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            region=region,
            output_methods=[],
            output_handlers=[Keep(self)],
            allow_multiple_runs=True,
            tracking_mode="machine",
            log_level="critical",
            **gpus,
        )
        self.row = {"country_source": source}
        self.tracker.start()
        self._read()

    def _read(self) -> None:
        if self.tracker is not None:
            self.tracker.flush()

    def _place(self) -> tuple[str | None, str | None, str]:
        """(country, region, how we know); without a country codecarbon takes the world's average."""
        from codecarbon.input import DataSource

        country, region, source = self.config.country_iso_code, None, "country_iso_code"
        if country is None:
            (country, region), source = look_up_country(DataSource().geo_js_url), "address of this machine"
        if country in DataSource().get_global_energy_mix_data():
            return country, region, source
        reason = f"codecarbon does not know the country {country}" if country else "the country is not known"
        log.warning(f"{reason}: emissions are computed with the world's average; set --country_iso_code")
        return None, None, WORLD_AVERAGE


def gpus_of_node(world: World) -> list[str]:
    """UUIDs of the GPUs that this node's ranks compute on. Every rank takes part.

    Left to itself codecarbon measures those in CUDA_VISIBLE_DEVICES: of a task of srun --gpus-per-task=1 only its own.
    """
    uuids = world.broadcast(world.gather_values(gpu_uuid(world)))
    [own] = [node for node in world.nodes() if world.rank in node]
    return sorted({uuids[rank] for rank in own} - {None})


def gpu_uuid(world: World) -> str | None:
    """None on a CPU."""
    return str(torch.cuda.get_device_properties(world.device).uuid) if world.device.type == "cuda" else None


def seen(uuids: list[str]) -> list[int]:
    """The GPUs' numbers as the driver counts them here; codecarbon itself would not find one by its UUID."""
    if not uuids:
        return []
    from codecarbon.core.gpu import AllGPUDevices

    known = {str(gpu["uuid"]).removeprefix("GPU-"): gpu["gpu_index"] for gpu in AllGPUDevices().get_gpu_static_info()}
    found = [known[uuid] for own in uuids if (uuid := own.removeprefix("GPU-")) in known]
    if len(found) < len(uuids):
        log.warning(f"{len(uuids) - len(found)} of this node's {len(uuids)} GPUs cannot be seen by the rank that "
                    "measures: their energy is missing")  # fmt: skip
    return sorted(found)


class Keep:
    """Takes what the tracker puts out. codecarbon asks for these four methods."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def out(self, total: Any, delta: Any) -> None:
        source = self.meter.row.get("country_source")
        estimated = not counts_energy(self.meter.tracker)
        self.meter.row = {**total.values, "country_source": source, "estimated": estimated}

    def live_out(self, total: Any, delta: Any) -> None:
        pass

    def task_out(self, data: Any, experiment_name: str) -> None:
        pass

    def exit(self) -> None:
        pass


def counts_energy(tracker: Any) -> bool:
    """Whether the processor's energy is read from counters, not computed from its load."""
    kinds = [getattr(part, "_mode", type(part).__name__) for part in tracker._hardware if hasattr(part, "_model")]
    return bool(kinds) and not {"cpu_load", "constant"} & set(kinds)


def look_up_country(url: str) -> tuple[str | None, str | None]:
    """(three-letter code, region) of this machine's address; None, None without network or where HF_HUB_OFFLINE is set.

    codecarbon's own look-up takes Canada where it fails.
    """
    if offline():
        return None, None
    import requests

    try:
        place = requests.get(url, timeout=1).json()
        return str(place["country_code3"]).upper(), str(place.get("region") or "").lower() or None
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def summarise(rows: list[dict[str, Any]], num_pairs: int) -> dict[str, Any] | None:
    """The sum over `rows`, all nodes' and stretches'; hours are rank 0's. None where nothing was measured.

    Returns:
        kwh (and of it cpu_kwh, gpu_kwh, ram_kwh), co2_kg (kg of CO2 equivalent), hours, both for 1,000 of `num_pairs`
        training pairs, estimated, country_iso_code (None = the world's average), and what each node has used.
    """
    measured = [row for row in rows if "energy_consumed" in row]
    if not measured:
        return None

    def total(name: str, rows: list[dict[str, Any]] = measured) -> float:
        return float(sum(row[name] for row in rows))

    by_node: dict[str, list[dict[str, Any]]] = {}
    for row in measured:
        by_node.setdefault(row["node"], []).append(row)
    first = [row for row in measured if row["rank"] == 0] or measured[:1]
    summary = {
        "kwh": total("energy_consumed"),
        "co2_kg": total("emissions"),
        "hours": total("duration", first) / 3600,
        **{f"{part}_kwh": total(f"{part}_energy") for part in ("cpu", "gpu", "ram")},
    }
    per_thousand = {f"{name}_per_1000_pairs": summary[name] / max(1, num_pairs) * 1000 for name in ("kwh", "co2_kg")}
    return {
        **summary,
        **per_thousand,
        "estimated": any(row["estimated"] for row in measured),
        "unmeasured_stretches": len(rows) - len(measured),
        "country_iso_code": first[-1]["country_iso_code"],
        "country_source": first[-1]["country_source"],
        "nodes": {node: {"kwh": total("energy_consumed", own)} for node, own in by_node.items()},
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """emissions.csv with codecarbon's columns and ours: a row a node and stretch."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path, durable=False) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
