"""Which checkpoint a run continues from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.checkpoint.format import LATEST, load_newest, parse, read
from utils.config.schema import RunConfig, same_on_all_workers
from utils.distributed.comm import Comm
from utils.errors import UserError


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that has been read.

    Attributes:
        path: The file.
        content: What it holds.
        flag: What has named the file, for messages.
    """

    path: Path
    content: dict[str, Any]
    flag: str = "--resume"


def find_checkpoint(
    run: RunConfig, folder: Path, options: Mapping[str, Any], comm: Comm
) -> LoadedCheckpoint | None:
    """Return the checkpoint to continue from; None without --resume or for a fresh auto run.

    Rank 0 finds and reads it and the others get the same bytes, so that no two workers can see
    different files. A job that has been started again after a failure continues from what it has
    saved.

    Args:
        run: Names the checkpoint.
        folder: The run folder.
        options: The options of this run, which tell whether a checkpoint is its own.
        comm: The engine.

    Raises:
        UserError: The checkpoint cannot be used.
        PeerFailed: On the other ranks, where rank 0 could not use it.
    """
    chosen: list[LoadedCheckpoint] = []

    def choose() -> bytes:
        found = _own_checkpoint(run, folder, options) if comm.restart_count() else None
        found = found or _named_checkpoint(run, folder)
        if found is None:
            return b""
        path, raw, content = found
        chosen.append(LoadedCheckpoint(path, content))
        return os.fsencode(path) + b"\0" + raw

    name, _, raw = comm.broadcast_bytes(choose).partition(b"\0")
    if not name:
        return None
    if chosen:
        return chosen[0]
    path = Path(os.fsdecode(name))
    return LoadedCheckpoint(path, parse(raw, path, "--resume", run.trust_checkpoint))


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


def _own_checkpoint(run: RunConfig, folder: Path, options: Mapping[str, Any]) -> Found | None:
    """Return what this very job has saved before it failed: a run with the same options."""
    found = load_newest(folder, run.trust_checkpoint)
    return found if found and are_same_options(found[2].get("options"), options) else None


def are_same_options(recorded: Any, options: Mapping[str, Any]) -> bool:
    """Return whether options that a file holds are those of this run, on whatever worker."""
    return isinstance(recorded, dict) and same_on_all_workers(recorded) == same_on_all_workers(
        options
    )
