"""The files of a run folder when a run goes on in it: none is lost, and each is what its name says.

A run may go back to an earlier save, by ``--resume FILE`` or ``--start-epoch``, and its best epoch
may lie in another folder. What would be replaced by that is kept in a folder beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import log
from utils.checkpoint.format import BEST, DAMAGED, LATEST, PREVIOUS, load
from utils.checkpoint.resume import LoadedCheckpoint
from utils.checkpoint.train_state import TrainState
from utils.errors import UserError
from utils.files import replace_by_link
from utils.metrics.run_log import logged_epochs


def keep_newer(
    folder: Path, loaded: LoadedCheckpoint, state: TrainState, names: Sequence[str], trust: bool
) -> bool:
    """Keep the files of a run that goes back in its own folder, before it replaces them.

    The newest checkpoint is then the one that the run goes on from, so that the next save pushes
    no good one out. One that cannot be read stays under another name.

    Args:
        folder: The run folder, in which the checkpoint lies.
        loaded: The checkpoint that the run goes on from.
        state: Where it goes on.
        names: The files of the run.
        trust: Whether reading a file may execute code in it.

    Returns:
        Whether the run goes back, and its files have been kept.
    """
    newest = folder / LATEST
    content = _content(newest, loaded, trust)
    epoch, step = content.get("epoch", 0), content.get("step", 0)
    if not content and loaded.path.name != PREVIOUS:
        # It is damaged, or this is a best model that came with its log: what else is there tells.
        before = _content(folder / PREVIOUS, loaded, trust)
        logged = max(logged_epochs(folder / "log.txt"), default=0)
        epoch, step = max((before.get("epoch", 0), before.get("step", 0)), (logged, 0))
    goes_back = (epoch, step) > (state.epoch, state.step)
    if goes_back:
        place = _keep(folder, names)
        log.warning(
            f"going back from epoch {epoch}{f', step {step}' if step else ''}: the newer files of "
            f"{folder} are kept in {place}"
        )
    elif content or not newest.exists():
        return False
    else:
        log.warning(f"{newest} is damaged or needs trust: kept as {DAMAGED}")
        newest.replace(folder / DAMAGED)
    if loaded.path.name != LATEST:
        replace_by_link(loaded.path, newest)
    if goes_back and loaded.path.name != PREVIOUS:
        (folder / PREVIOUS).unlink(missing_ok=True)
    return goes_back


def settle_best(
    folder: Path, loaded: LoadedCheckpoint, state: TrainState, kept: bool, trust: bool
) -> None:
    """Let model_best.pth.tar hold the weights of the best epoch so far, or be missing.

    Where the folder has others under that name, those of another start or of an epoch that is
    trained again, they are kept elsewhere.

    Args:
        folder: The run folder.
        loaded: The checkpoint that the run goes on from.
        state: Where it goes on, and what its best epoch was.
        kept: Whether ``keep_newer`` has kept the folder's files just now.
        trust: Whether reading a file may execute code in it.
    """
    best = folder / BEST
    # A run that went back and has saved nothing since finds its own in what it has kept.
    kept_before = [*folder.glob(f"replaced-*/{BEST}")]
    for path in (best, loaded.path, loaded.path.parent / BEST, *kept_before):
        content = _content(path, loaded, trust)
        # A run of other flags may have been replaced here, too.
        same_run = path not in kept_before or content.get("shape") == loaded.content.get("shape")
        if same_run and is_best(content, state):
            found = path
            break
    else:
        found = None
    if found == best or (found is None and state.best_acc > 0 and not state.best_epoch):
        return  # An older script has named no epoch; only a better one replaces the file.
    if best.exists():
        if not kept:
            place = _keep(folder, [BEST])
            why = "is not of the best epoch so far" if state.best_epoch else "cannot be compared"
            log.warning(f"{best} {why}: kept in {place}")
        best.unlink()
    if found:
        replace_by_link(found, best)


def is_best(content: Mapping[str, Any], state: TrainState) -> bool:
    """Return whether a checkpoint holds the weights of the best epoch so far."""
    return (
        bool(state.best_epoch or state.best_acc)
        and content.get("acc") == state.best_acc
        and state.best_epoch in (0, content.get("epoch"))
        and not content.get("step")
    )


def _content(path: Path, loaded: LoadedCheckpoint, trust: bool) -> dict[str, Any]:
    """Return what a checkpoint holds; nothing where it is missing or no good one."""
    same = path.resolve() == loaded.path.resolve()
    try:
        return loaded.content if same else load(path, trust=trust)
    except UserError:
        return {}


def _keep(folder: Path, names: Sequence[str]) -> Path:
    """Give files of a run folder a second name in a new folder in it, which is returned."""
    number = 1
    while (place := folder / f"replaced-{number}").exists():
        number += 1
    place.mkdir()
    for name in names:
        if (folder / name).exists():
            replace_by_link(folder / name, place / name)
    return place
