"""A plan as a table for the terminal, and as a picture of its scaling."""

from pathlib import Path
from typing import Any

from trainer.base.files import replacing


def size(value: float) -> str:
    """Bytes."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """As a person reads it."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def table(plan: dict[str, Any]) -> str:
    """The plan in words."""
    return "\n".join([*_what(plan), "", *_memory(plan), "", *_step(plan), "", *_whole(plan), "", *_scaling(plan), "",
                      *_choice(plan)])  # fmt: skip


def _what(plan: dict[str, Any]) -> list[str]:
    model, data, run = plan["model"], plan["data"], plan["run"]
    form, few = "unpadded" if model["unpadded"] else "padded", run["batch"] < run["ranks"]
    return [
        f"{model['name']}: {model['parameters']:,} parameters, {model['trained']:,} trained, {form}",
        f"{data['pairs']:,} pairs of {data['mean_tokens']:.1f} tokens, the longest {data['longest']}",
        f"{run['ranks']} rank(s) on {run['nodes']} node(s), {run['device']}; {run['backend']}, "
        f"{run['step_form']} steps",
        f"{run['steps']:,} steps of {run['batch']:,} pairs, {run['micro_batch']} a forward at most"
        + (f"; fewer than ranks, of which {run['ranks'] - run['batch']:,} have none" if few else ""),
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    own = plan["memory"]
    fits = "fits" if own["fits"] else "DOES NOT FIT"
    most = own["largest_micro_batch"]
    pairs = "none" if most is None else f"{most} pair(s)"
    if most is not None and most >= -(-plan["run"]["batch"] // plan["run"]["ranks"]):
        pairs += ", all that a rank has of a step"
    lines = [f"memory of a rank: {size(own['total'])} of {size(own['limit'])}: {fits}"]
    lines += [f"  {name:<18}{size(own[name]):>10}" for name in ("process", "state", "activations", "slack")]
    return [*lines, f"  largest micro-batch that fits: {pairs}"]


def _step(plan: dict[str, Any]) -> list[str]:
    own, total = plan["step"], plan["step"]["seconds"]
    filled = "" if plan["run"]["step_form"] == "plain" else ", those that fill up shapes included"
    lines = [f"a step: {duration(total)}, {own['flops'] / 1e9:,.0f} GFLOP of products over all ranks{filled}"]
    lines += [f"  {name:<18}{duration(part):>10}{part / total:7.1%}" for name, part in own["parts"].items() if part > 0]
    if own["sent_bytes"]:
        lines.append(f"  a rank sends {size(own['sent_bytes'])} in {duration(own['sent_seconds'])}, of which the "
                     f"backward hides {duration(own['hidden_seconds'])}")  # fmt: skip
    return lines


def _whole(plan: dict[str, Any]) -> list[str]:
    own = plan["seconds"]
    exact = f", again in fp32 {duration(own['fp32'])}" if own["fp32"] else ""
    test = f", test {duration(own['test'])}" if own["test"] else ""
    cost = "" if plan["cost"] is None else f", cost {plan['cost']:,.2f}"
    return [
        f"the run: {duration(own['total'])}: training {duration(own['training'])}, evaluation "
        f"{duration(own['evaluation'])} (dev {duration(own['one_dev'])} each{test}{exact})",
        f"  without start, checkpoints and report; {plan['device_hours']:.3g} device hours, "
        f"{plan['energy_kwh']:.3g} kWh{cost}",
    ]


def _scaling(plan: dict[str, Any]) -> list[str]:
    inside, between = plan["run"]["links"]
    lines = [f"scaling; {inside} inside a node, {between} between nodes",
             "  ranks      step   pairs/s  efficiency   batch  tokens a rank: mean, slowest   sent a step"]  # fmt: skip
    for own in plan["scaling"]:
        lines.append(
            f"{own['ranks']:>7}{duration(own['step_seconds']):>10}{own['pairs_per_second']:>10,.0f}"
            f"{own['efficiency']:>12.0%}{own['batch']:>8,}{own['mean_tokens']:>21,.0f}"
            f"{own['slowest_tokens']:>9,.0f}{size(own['sent_bytes']):>14}" + ("" if own["fits"] else "  does not fit")
        )
    return lines


def _choice(plan: dict[str, Any]) -> list[str]:
    own = plan["choice"]
    if own["backend"] is None:
        return [f"choose: {own['reason']}"]
    return [f"choose: {own['options']}: {own['reason']}"]


def draw(plan: dict[str, Any], path: Path) -> None:
    """The scaling curve, as svg or png by the file's name."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    own = plan["scaling"]
    ranks = [world["ranks"] for world in own]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot(ranks, [world["pairs_per_second"] for world in own], "o-", color="#4878a8", label="planned")
    ideal = own[0]["pairs_per_second"]
    left.plot(ranks, [rank * ideal for rank in ranks], ":", color="#999999", label="ideal")
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="pairs/s", title=plan["run"]["device"])
    left.legend()
    right.plot(ranks, [100 * world["efficiency"] for world in own], "o-", color="#4878a8", label="efficiency")
    even = [100 * world["mean_tokens"] / world["slowest_tokens"] for world in own]
    right.plot(ranks, even, "s--", color="#b0603c", label="mean tokens / slowest rank's")
    right.set(xscale="log", xlabel="ranks", ylabel="%", ylim=(0, 105))
    right.legend()
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)
