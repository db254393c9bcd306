"""Writing checkpoints: every save of a run, and the way back to its last good one."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils import log
from utils.checkpoint.digest import digest
from utils.checkpoint.format import (
    BEST,
    FORMAT,
    LATEST,
    PREVIOUS,
    load_newest,
    parse,
)
from utils.checkpoint.restore import load_buffers, load_model, load_optimizer
from utils.checkpoint.train_state import TrainState
from utils.distributed.comm import Comm
from utils.errors import NotFinite, reason_of
from utils.files import replace_by_link, write_atomically


class CheckpointManager:
    """Saves the state of a run and reads it back.

    Args:
        folder: The run folder.
        comm: The engine.
        model: The raw network.
        optimizer: The optimizer as ``comm.prepare`` returned it.
        about: What does not change from its start to its end: architecture, data set, options.

    Attributes:
        path: The newest checkpoint.
        failed: On rank 0, whether the last save has failed.
    """

    def __init__(
        self,
        folder: Path,
        comm: Comm,
        model: nn.Module,
        optimizer: Optimizer,
        about: dict[str, Any],
    ) -> None:
        """Save nothing yet."""
        self.folder = folder
        self.path = folder / LATEST
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.about = {"format": FORMAT, **about}
        self.failed = False

    def save(self, state: TrainState, is_best: bool) -> None:
        """Save at a state; every rank must call this, rank 0 writes.

        Nothing in the training changes by it. A disk that is full or gone costs this save, not
        the run: it is reported, and the next save tries again.

        Raises:
            NotFinite: On all ranks, instead of saving parameters that are not finite.
        """
        comm = self.comm
        if comm.all_reduce_max(int(comm.is_main_process and not _is_finite(self.model))):
            raise NotFinite(None)
        with comm.averaged_buffers(self.model) as rows:  # One all-reduce.
            if comm.is_main_process:
                self._write(state, rows, is_best)
        comm.check_host_updates()

    def _write(self, state: TrainState, rows: Tensor, is_best: bool) -> None:
        content = {
            **self.about,
            "epoch": state.epoch,
            "step": state.step,
            "step_sums": state.metric_sums,
            "step_seconds": state.step_seconds,
            "acc": state.acc,
            "best_acc": state.best_acc,
            "best_epoch": state.best_epoch,
            "state_dict": {k: v.contiguous() for k, v in self.model.state_dict().items()},
            "buffers": rows,
            "optimizer": with_plain_rate(self.optimizer.state_dict()),
        }
        try:
            save(self.folder, content, is_best)
            self.failed = False
        except (OSError, RuntimeError) as error:  # The latter is torch's word for a full disk.
            self.failed = True
            log.warning(
                f"{self.path} cannot be written ({_reason_and_space(error, self.folder)}); "
                "the files of the last save stay, training goes on to the next"
            )

    def read_back(self) -> dict[str, Any] | None:
        """Return the newest good checkpoint of the run, on every rank; None before the first save.

        Rank 0 reads it and broadcasts its bytes.

        Raises:
            UserError: On rank 0, where there are checkpoints and all are damaged.
            PeerFailed: On the other ranks, in this case.
        """

        def read_newest() -> bytes:
            found = load_newest(self.folder, trust=False)
            return found[1] if found else b""

        content = self.comm.broadcast_bytes(read_newest)
        return parse(content, self.path, "", trust=False) if content else None

    def restore(self, content: dict[str, Any]) -> None:
        """Go back to a checkpoint that ``read_back`` has returned."""
        load_model(self.model, content, self.path, "the network of this run")
        load_optimizer(self.optimizer, content, self.path)
        load_buffers(self.model, content, self.path, self.comm)


def save(folder: Path, content: dict[str, Any], is_best: bool) -> None:
    """Write the newest checkpoint, and the best one too where ``is_best`` says so.

    The file is written beside its place and renamed into it. The one before stays under its second
    name. At whatever moment the process is killed, one of the two is complete, and the best one is
    as new as the newest at least.
    """
    path = folder / LATEST

    def link_others(new: Path) -> None:
        if is_best:
            replace_by_link(new, folder / BEST)
        if path.exists():
            replace_by_link(path, folder / PREVIOUS)

    complete = {**content, "digest": digest(content)}
    write_atomically(path, lambda file: torch.save(complete, file), link_others)


def with_plain_rate(state: dict[str, Any]) -> dict[str, Any]:
    """Return the optimizer's state with the learning rate as a number, wherever it was a tensor.

    A tensor's few digits are taken for those of the number: 0.1, not 0.10000000149011612.
    """

    def plain(rate: float | Tensor) -> float:
        return float(str(rate.cpu().numpy())) if isinstance(rate, Tensor) else rate

    groups = [{**group, "lr": plain(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _reason_and_space(error: Exception, folder: Path) -> str:
    # torch complains of the unfinished file, and has the system's own words in the context only.
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    reason = reason_of(cause or error).splitlines()[0]
    try:
        return f"{reason}; {shutil.disk_usage(folder).free / 2**20:,.1f} MiB free"
    except OSError:
        return reason


def _is_finite(model: nn.Module) -> bool:
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())
