"""Which checkpoint a run continues from, and what has led to it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint.format import LATEST, load_newest, parse, read
from utils.config.schema import WITHOUT_EFFECT, RunConfig
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.runtime.provenance import STARTS


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that has been read.

    Attributes:
        path: The file.
        content: What it holds.
        flag: What has named the file, for messages.
        own: Whether this very job has saved it, before it failed and was started again.
    """

    path: Path
    content: dict[str, Any]
    flag: str = "--resume"
    own: bool = False


def find_checkpoint(run: RunConfig, folder: Path, comm: Comm) -> LoadedCheckpoint | None:
    """Return the checkpoint to continue from; None without --resume or for a fresh auto run.

    Rank 0 finds and reads it and the others get the same bytes, so that no two workers can see
    different files. A job that has been started again after a failure continues from what it has
    itself saved, and as long as that is nothing, does what its flags say.

    Args:
        run: Names the checkpoint.
        folder: The run folder.
        comm: The engine.

    Raises:
        UserError: The checkpoint cannot be used.
        PeerFailed: On the other ranks, where rank 0 could not use it.
    """
    chosen: list[LoadedCheckpoint] = []

    def choose() -> bytes:
        restarted = comm.may_be_restarted()
        found = _own_checkpoint(run, folder, comm.job) if restarted else None
        found = found or _named_checkpoint(run, folder)
        if found is None:
            return b""
        path, raw, content = found
        # A file that --resume names may have become the job's own, too.
        own = restarted and content.get("job") == comm.job
        chosen.append(LoadedCheckpoint(path, content, own=own))
        return b"\0".join([b"own" if own else b"named", os.fsencode(path), raw])

    message = comm.broadcast_bytes(choose)
    if not message:
        return None
    if chosen:
        return chosen[0]
    kind, name, raw = message.split(b"\0", 2)
    path = Path(os.fsdecode(name))
    content = parse(raw, path, "--resume", run.trust_checkpoint)
    return LoadedCheckpoint(path, content, own=kind == b"own")


Found = tuple[Path, bytes, dict[str, Any]]


def _named_checkpoint(run: RunConfig, folder: Path) -> Found | None:
    """Return what --resume names."""
    if not run.resume:
        return None
    if run.resume == "auto":
        found = load_newest(folder, run.trust_checkpoint)
        if found is None and run.evaluate:
            raise UserError(
                f"--resume auto: {folder / LATEST} does not exist; name a file to evaluate"
            )
        return found
    path = Path(run.resume)
    raw = read(path)
    return path, raw, parse(raw, path, "--resume", run.trust_checkpoint)


def _own_checkpoint(run: RunConfig, folder: Path, job: str) -> Found | None:
    """Return what this very job has saved before it failed."""
    try:
        found = load_newest(folder, run.trust_checkpoint)
    except UserError:  # All are damaged, and nobody can tell whose they were: the flags decide.
        return None
    return found if found and found[2].get("job") == job else None


def earlier_starts(
    loaded: LoadedCheckpoint | None, start: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the starts that have led to the weights of a run and differ from the present one.

    The checkpoint is what knows them: a start that trained nothing has left none, and one whose
    epochs are trained again is not in the one that the run goes back to.

    Args:
        loaded: The checkpoint that the run goes on from, if any.
        start: What the checkpoints of this run will say of the present start.

    Returns:
        What the checkpoints of each have said by the names in STARTS, oldest first, each once. A
        file that is no checkpoint of a run counts as a start without options, by its name, and so
        does one that --start-epoch goes on from at another epoch than its own.
    """
    if loaded is None:
        return []
    content, file = loaded.content, {"options": {}, "file": loaded.path.name}
    known = content.get("earlier")
    starts = [*known] if isinstance(known, list) else []
    starts.append({name: content.get(name) for name in STARTS})
    if start["options"].get("start_epoch") is not None and not loaded.own:
        starts.append(file)
    seen, found = [_essence(_as_plain(start))], []
    for one in starts:
        plain = _as_plain(one) or file
        if (essence := _essence(plain)) not in seen:
            seen.append(essence)
            found.append(plain)
    return found


def _as_plain(start: Any) -> dict[str, Any]:
    """Return a start that another process has described, made of JSON's types; {} for nonsense."""
    try:
        plain = json.loads(json.dumps(start, default=repr, skipkeys=True))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(plain, dict) or not isinstance(plain.get("options"), dict):
        return {}
    return plain


def _essence(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a start another training, or says where it was trained."""
    options = {k: v for k, v in start["options"].items() if k not in WITHOUT_EFFECT}
    return {**start, "options": options}
