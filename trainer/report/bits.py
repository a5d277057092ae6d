"""Whether two runs are the same to the last bit, from their folders: by their weights' SHA-256, or their losses."""

from typing import Any

from trainer.report.read import Run


def compared(run: Run, other: Run) -> str:
    """In words: "same bits", or where the two part."""
    hashes = [own.results.get("model_sha256") for own in (run, other)]
    if hashes[0] is not None and hashes[0] == hashes[1]:
        return "same bits"
    ours, theirs = _logged(run), _logged(other)
    # A line is a mean over the steps since the line before, so those are the same or not to be compared.
    shared = [place for place in ours if place in theirs]
    for before, step in shared:
        mine, its = ours[before, step], theirs[before, step]
        if mine != its:
            where = f"at step {step}" if step == before + 1 else f"between steps {before + 1} and {step}"
            differing = ", ".join(f"{name} {mine[name]} and {its[name]}" for name in mine if mine[name] != its[name])
            return f"they part {where}: {differing}"
    if not shared:
        return "they have logged no steps in common"
    last = f"every loss and gradient norm that both have logged is the same, up to step {shared[-1][1]}"
    return f"{last}, but not the weights" if None not in hashes else last


def _logged(run: Run) -> dict[tuple[int, int], dict[str, Any]]:
    """Loss and gradient norm of each line, by the last step of the line before and its own."""
    lines, before = {}, 0
    for event in run.of("train"):
        lines[before, event["step"]] = {name: event.get(name) for name in ("loss", "grad_norm")}
        before = event["step"]
    return lines
