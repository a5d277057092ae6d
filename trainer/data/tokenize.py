"""From the texts of a split to its tokens: by all ranks that share the cache, or in memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer.base.arrays import smallest
from trainer.base.errors import UserError
from trainer.base.files import naming, remove_remains
from trainer.data.pairs import Pairs, Spooled, Texts
from trainer.data.stored import Check, locked, no_room, nothing, prune, reopened, store, stored
from trainer.data.team import Team
from trainer.data.tokens import Encoder, Tokens, nothing_of, of_stored

# Pairs from which on all ranks of a team tokenise: below, that takes less time than to tell them.
MANY = 1 << 16
ROWS = 1 << 22  # lengths that are in memory at once
PARTS = ("ids", "types", "lengths")


def tokenize(
    pairs: Pairs,
    encoder: Encoder,
    team: Team,
    name: str,
    verify: bool = False,
    progress: bool = False,
    check: Check = nothing,
) -> Tokens:
    """The tokens of a split, from the team's cache if it has them. Every rank of the team takes part.

    Args:
        name: of the split; a run says each once.
        verify: whether to look for damage in a large cache, too.
        check: called now and then; it may raise to stop.

    Raises UserError, on every rank of the team, where the cache cannot be written, or a pair has no token.
    """
    with ExitStack() as stack:
        plan = team.once(f"tokens of {name}", lambda: _plan(pairs, encoder, team, verify, check, stack), check)
        path = Path(plan["path"])
        if not plan["found"]:
            _build(pairs, encoder, path, team, name, progress, check)
        return of_stored(reopened(path))


def _plan(pairs: Pairs, encoder: Encoder, team: Team, verify: bool, check: Check, stack: ExitStack) -> dict[str, Any]:
    """Where the tokens are, and whether they are there; if not, nobody else builds them until `stack` is closed."""
    assert isinstance(pairs.texts, Spooled)
    sources = [spool.sha256 for spool in pairs.texts.spools]
    digest = hashlib.sha256(json.dumps([encoder.digest.hexdigest(), sources]).encode())
    for array in (pairs.row, pairs.label, *([] if pairs.values is None else [pairs.values])):
        digest.update(np.ascontiguousarray(array).data)
    path = team.folder / "tokens" / digest.hexdigest()[:32]
    found = stored(path, verify) is not None
    if not found:
        stack.enter_context(locked(path, check))
        found = stored(path, verify, quiet=True) is not None
    if not found:
        for spool in pairs.texts.spools:
            spool.verify()
    return {"path": str(path), "found": found}


def _build(pairs: Pairs, encoder: Encoder, path: Path, team: Team, name: str, progress: bool, check: Check) -> None:
    """Every member writes its share beside `path`, and the first one joins them there."""
    work = Path(team.once(f"work on {name}", lambda: _work_folder(path), check))
    together = len(pairs) >= MANY and len(team.members) > 1
    members = team.members if together else team.members[:1]
    problem: str | None = None
    try:
        if team.world.rank in members:
            # Pairs that lie side by side, as many of them to each.
            number, count = members.index(team.world.rank), len(members)
            own_pairs = range(len(pairs) * number // count, len(pairs) * (number + 1) // count)
            try:
                with naming(work):
                    _write_share(pairs, encoder, own_pairs, work, team.world.rank, progress, check)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = str(no_room(team.folder, error))
        problems = team.each(f"share of {name}", problem, check) if together else [problem]
        team.once(f"end of {name}", lambda: _join(pairs, encoder, path, work, members, problems), check)
    finally:
        if team.leads:
            shutil.rmtree(work, ignore_errors=True)


def _work_folder(path: Path) -> str:
    """An empty one, of a name that the next one who builds `path` clears if this process is killed."""
    work = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(path)
    work.mkdir()
    return str(work)


def _write_share(
    pairs: Pairs, encoder: Encoder, own: range, work: Path, rank: int, progress: bool, check: Check
) -> None:
    """The tokens of pairs `own` as files, and what is known of them."""
    files = {name: (work / f"{name}.{rank}").open("wb") for name in PARTS}
    share = Share(encoder)
    with bar(len(own), progress) as shown:
        for arrays in share.tokens(pairs, own, check, shown.update):
            for name, array in zip(PARTS, arrays, strict=True):
                files[name].write(array.tobytes())
    for file in files.values():
        file.close()
    (work / f"facts.{rank}").write_text(json.dumps(share.facts()))


def bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, desc="tokenising", unit="pair", delay=3, disable=None if progress else True)


class Share:
    """Tokenises pairs, and keeps what has to be known of all of them."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.used = np.zeros(encoder.num_ids, dtype=bool)
        self.num_cut, self.num_tokens, self.longest, self.largest_type = 0, 0, 0, 0

    def tokens(
        self, pairs: Texts | Pairs, own: range, check: Check, done: Callable[[int], object]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Token numbers, types and lengths of pairs `own`, some at a time."""
        row = own.start
        for encoded in self.encoder.chunks(pairs if isinstance(pairs, Texts) else pairs.texts, own.start, own.stop):
            ids, types, lengths = self._joined(encoded)
            if 0 in lengths:
                raise nothing_of(pairs, row + int(np.argmin(lengths)))
            yield ids, types, lengths
            row += len(encoded)
            done(len(encoded))
            check()

    def _joined(self, encoded: list[tuple[np.ndarray, np.ndarray, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, types = (np.concatenate([own[place] for own in encoded]) for place in (0, 1))
        lengths = np.array([len(own) for own, _, _ in encoded], np.int32)
        self.used[ids] = True
        self.num_cut += sum(cut for _, _, cut in encoded)
        self.num_tokens += len(ids)
        self.longest = max(self.longest, int(lengths.max()))
        self.largest_type = max(self.largest_type, int(types.max(initial=0)))
        return ids, types, lengths

    def facts(self) -> dict[str, Any]:
        """As JSON, for who joins the shares."""
        return {
            "used": np.flatnonzero(self.used).tolist(),
            **{name: getattr(self, name) for name in ("num_cut", "num_tokens", "longest", "largest_type")},
        }


def _join(
    pairs: Pairs, encoder: Encoder, path: Path, work: Path, members: list[int], problems: list[str | None]
) -> None:
    """Writes the folder `path`. Raises UserError for the first of the members' problems."""
    if problem := next(filter(None, problems), None):
        raise UserError(problem)
    shares = [json.loads((work / f"facts.{rank}").read_text()) for rank in members]
    kind = smallest(sum(share["num_tokens"] for share in shares))
    small = smallest(max(share["longest"] for share in shares))
    offsets, short = work / "offsets", work / "short"
    with offsets.open("wb") as file, short.open("wb") as shorter:
        file.write(np.zeros(1, kind).tobytes())
        end = 0
        for part in _numbers([work / f"lengths.{rank}" for rank in members]):
            ends = end + np.cumsum(part, dtype=np.int64)
            end = int(ends[-1])
            file.write(ends.astype(kind).tobytes())
            shorter.write(part.astype(small).tobytes())
    files: dict[str, Any] = {"offsets": (kind, [offsets]), "lengths": (small, [short])}
    files["ids"] = (encoder.kind, [work / f"ids.{rank}" for rank in members])
    if largest_type := max(share["largest_type"] for share in shares):
        files["types"] = (np.uint8, [work / f"types.{rank}" for rank in members])
    used = np.unique(np.concatenate([np.array(share["used"], np.int32) for share in shares]))
    facts = {"num_cut": sum(share["num_cut"] for share in shares), "fingerprint": encoder.fingerprint(pairs),
             "largest_type": largest_type}  # fmt: skip
    store(path, {"used": used}, facts, files)
    prune(path.parent)


def _numbers(parts: list[Path]) -> Iterator[np.ndarray]:
    for part in parts:
        with part.open("rb") as file:
            while len(found := np.fromfile(file, np.int32, ROWS)):
                yield found


def in_memory(texts: Texts | Pairs, encoder: Encoder) -> Tokens:
    """The same of few pairs, without a file, and without a fingerprint. One that has no token stays, with none."""
    flat = [
        one
        for part in encoder.chunks(texts if isinstance(texts, Texts) else texts.texts, 0, len(texts))
        for one in part
    ]
    ids = np.concatenate([np.empty(0, encoder.kind), *(ids for ids, _, _ in flat)])
    types = np.concatenate([np.empty(0, np.uint8), *(own for _, own, _ in flat)])
    offsets = np.cumsum([0, *(len(ids) for ids, _, _ in flat)])
    return Tokens.of(ids, offsets, types, sum(cut for _, _, cut in flat), "")
