"""The run folder: its name, and the claim that keeps two runs from writing into it."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from models import model_arguments
from utils.checkpoint.format import BEST, DAMAGED, LATEST, PREVIOUS
from utils.checkpoint.history import keep_newer, settle_best
from utils.checkpoint.resume import LoadedCheckpoint
from utils.checkpoint.train_state import TrainState
from utils.config.args import parse_args
from utils.config.recipes import load_recipes
from utils.config.schema import ModelConfig, RunConfig
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.files import (
    FolderInUse,
    check_writable,
    clear_leftovers,
    lock_folder,
    unlock_folder,
)
from utils.runtime.provenance import write_args

# What a run leaves in its folder, args.json apart.
_FILES = (LATEST, PREVIOUS, DAMAGED, BEST, "log.txt", "metrics.jsonl", "log.png")


def run_name(arch: str, arguments: Mapping[str, object]) -> str:
    """Return the folder name of a run: its recipe's, or one made of what its network differs in.

    Args:
        arch: The architecture.
        arguments: The arguments that are given to its factory.
    """
    own = model_arguments(arch)

    def network(given: Mapping[str, object]) -> dict[str, object]:
        # Checkpointed activations change no result.
        return {**own, **given, "checkpoint_activations": None}

    for recipe in load_recipes().values():
        model = parse_args(recipe.flags).model
        if model.arch == arch and network(model.arguments()) == network(arguments):
            return recipe.name
    parts = [f"_{name}_{value}" for name, value in arguments.items() if own.get(name) != value]
    return re.sub(r"[^\w.-]", "_", arch + "".join(parts))


def run_folder(run: RunConfig, model: ModelConfig, dataset: str) -> Path:
    """Return where the files go: --checkpoint, the folder of --resume FILE, or a derived name."""
    if run.checkpoint:
        return Path(run.checkpoint)
    if run.resume and run.resume != "auto":
        return Path(run.resume).parent
    return Path("checkpoints") / dataset / run_name(model.arch, model.arguments())


@contextmanager
def claim_run_dir(
    folder: Path,
    run: RunConfig,
    loaded: LoadedCheckpoint | None,
    state: TrainState,
    about: Mapping[str, Any],
    comm: Comm,
) -> Iterator[None]:
    """Make the run folder, or see that an existing one may be had; inside, it is this run's alone.

    Args:
        folder: The folder.
        run: Says whether a run that is there may be replaced.
        loaded: The checkpoint that this run continues.
        state: Where it begins.
        about: What every checkpoint of the run says of it, for args.json.
        comm: The engine; rank 0 claims and writes, the others learn whether it could.

    Raises:
        UserError: The folder holds another run or one that is under way, or cannot be written to.
        PeerFailed: On the other ranks, in these cases.
    """
    lock = None
    try:
        with comm.local_rank_zero_first():
            if comm.is_main_process:
                lock = _claim(folder, run, loaded, state, about, comm.may_be_restarted())
        yield
    finally:
        if lock is not None:
            unlock_folder(lock)


def _claim(
    folder: Path,
    run: RunConfig,
    loaded: LoadedCheckpoint | None,
    state: TrainState,
    about: Mapping[str, Any],
    restarted: bool,
) -> IO[str]:
    """Claim the folder, write args.json, and remove what a run that is replaced has left.

    Returns:
        The lock.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder)
        if run.trace:
            _check_trace(Path(run.trace))
        lock = lock_folder(folder)
        try:
            _take_over(folder, run, loaded, state, about, restarted)
        except BaseException:
            unlock_folder(lock)
            raise
    except FolderInUse as error:
        raise UserError(
            f"--checkpoint {folder}: {error} is training there; wait for its end, or name another "
            "folder with -c DIR"
        ) from error
    except OSError as error:
        raise UserError(
            f"--checkpoint {folder}: cannot be written to ({error.strerror}); "
            "name another folder with -c DIR"
        ) from error
    return lock


def _take_over(
    folder: Path,
    run: RunConfig,
    loaded: LoadedCheckpoint | None,
    state: TrainState,
    about: Mapping[str, Any],
    restarted: bool,
) -> None:
    """Make a locked folder that of this run."""
    # Weights alone, such as published ones, are no run that could go on in their folder.
    mine = (
        loaded is not None
        and not loaded.content.get("weights_alone")
        and loaded.path.resolve().parent == folder.resolve()
    )
    found = [name for name in _FILES if (folder / name).exists()]
    # Either a killed run has left a log without rows, or this very job had claimed the folder and
    # has saved nothing yet.
    begun = (loaded is None and run.resume == "auto" and _has_no_rows(folder, found)) or (
        restarted and not {LATEST, PREVIOUS} & {*found} and _was_claimed_by(folder, about["job"])
    )
    if found and not mine and not begun and not run.overwrite:
        ways_out = (
            "--resume auto continues it, --overwrite replaces it, -c DIR names another folder"
        )
        if loaded:
            ways_out = "name another folder with -c DIR"
        raise UserError(f"--checkpoint {folder}: holds a run already ({found[0]}); {ways_out}")
    clear_leftovers(folder)
    names, trust = (*_FILES, "args.json"), run.trust_checkpoint
    kept = bool(mine and loaded and keep_newer(folder, loaded, state, names, trust))
    write_args(folder / "args.json", about)
    for name in [] if mine else found:
        (folder / name).unlink()
    if loaded:
        settle_best(folder, loaded, state, kept, trust)


def _check_trace(path: Path) -> None:
    """Raise UserError where --trace could not be written at the end of the run."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        check_writable(path.parent)
    except OSError as error:
        raise UserError(
            f"--trace {path}: cannot be written ({error.strerror}); name another file"
        ) from error


def _was_claimed_by(folder: Path, job: str) -> bool:
    """Return whether a job has claimed the folder last, as its args.json says."""
    try:
        return bool(json.loads((folder / "args.json").read_text())["job"] == job)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_no_rows(folder: Path, found: list[str]) -> bool:
    """Return whether what was found in a run folder is a log that has a header at most."""
    lines = {"log.txt": 1, "metrics.jsonl": 0}
    return all(
        name in lines and len((folder / name).read_bytes().splitlines()) <= lines[name]
        for name in found
    )
