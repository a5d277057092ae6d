"""What is asked of a plan beside the run's fields: on how many of which devices, joined by what."""

from dataclasses import dataclass

from trainer.base.errors import UserError
from trainer.base.fields import Fields, option
from trainer.plan.devices import Device, Link, find_device, find_link, table

BETWEEN = "ethernet100"  # nodes, unless something else is asked for
MOST_RANKS = 65_536


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Fields):
    """Plan"""

    nodes: int = option(1, above=0)
    """Machines."""
    gpus_per_node: int = option(1, above=0)
    """Ranks on each of them: its GPUs, or processes on a CPU."""
    device: str = option("cpu", path=True)
    """What each rank computes on: rtx3090, a100, h100, h200, cpu, or a file such as --measure writes."""
    link: str | None = option(None, path=True)
    """Between nodes, or with several ranks on one node between those: nvlink4, infiniband400x8, ethernet10 ..., a
    bandwidth such as 25Gbit, or a file; None = ethernet100 between nodes, and the device's own on one."""
    json: bool = False
    """Print the plan as JSON; docs/plan.md lists its keys."""
    picture: str | None = option(None, path=True)
    """File of the scaling curve, svg or png."""
    measure: str | None = option(None, path=True)
    """Measure this machine's CPU on the run's own model first, in about a minute, write a device file of this name, and
    plan with it."""
    price: float | None = option(None, above=0)
    """Price of one device for an hour, in any currency; of a CPU, of a machine."""


def link_names(asked: PlanConfig, device: Device) -> tuple[str, str]:
    """Inside a node, and between nodes, of which a plan of one node has more too: for its scaling."""
    if asked.link is not None and (asked.nodes > 1 or asked.gpus_per_node == 1):
        return device.link, asked.link
    return asked.link or device.link, BETWEEN


def links(asked: PlanConfig, device: Device) -> tuple[Link, Link]:
    """Of these names. Raises UserError."""
    file = None if asked.device in table()["devices"] else asked.device
    inner, outer = link_names(asked, device)
    return find_link(inner, file), find_link(outer, file)


def check(asked: PlanConfig) -> None:
    """What can be known before anything is read. Raises UserError."""
    if (ranks := asked.nodes * asked.gpus_per_node) > MOST_RANKS:
        raise UserError(f"nodes x gpus_per_node are {ranks:,} ranks; a plan is of at most {MOST_RANKS:,}")
    links(asked, find_device(asked.device)[0])
