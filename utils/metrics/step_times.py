"""Loss and times of every step, for comparing runs: --trace FILE."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from utils import log
from utils.distributed.comm import Comm
from utils.errors import reason_of
from utils.files import write_text


class StepTimes:
    """Where the time of the steps goes, and with ``keep`` the loss of each step.

    Call ``begin``, ``data_ready`` and ``step_done`` in turn. Keeping makes the host wait for the
    device at each mark, without which the times of a GPU would mean nothing.

    Attributes:
        data: The seconds of each step until its batch is there.
        compute: The seconds of each step's training; with several workers communication is in it.
    """

    def __init__(self, keep: bool = False) -> None:
        """Start without a step."""
        self.keep = keep
        self.data: list[float] = []
        self.compute: list[float] = []
        self.losses: list[Tensor] = []
        self.batches: list[int] = []

    def begin(self) -> None:
        """Note that a step begins."""
        self._mark = self._now()

    def data_ready(self) -> None:
        """Note that the step has its batch."""
        now = self._now()
        self.data.append(now - self._mark)
        self._mark = now

    def step_done(self, loss_sum: Tensor, global_batch: int) -> None:
        """Note that the step is over.

        Args:
            loss_sum: This worker's loss summed over its shard, a scalar.
            global_batch: The images of all workers.
        """
        if self.keep:
            # The next step may overwrite the loss.
            self.losses.append(loss_sum.to(torch.float64, copy=True))
            self.batches.append(global_batch)
        self.compute.append(self._now() - self._mark)

    def _now(self) -> float:
        if self.keep and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def write(self, path: Path, comm: Comm) -> None:
        """Write what has been kept as JSON, or warn that it cannot; every rank must call this.

        The training is finished and saved by then.
        """
        losses: list[float] = []
        if self.losses:  # A run may have been finished already.
            sums = comm.all_reduce_sum_(torch.stack(self.losses))
            losses = (sums.cpu() / torch.tensor(self.batches)).tolist()
        record = {
            "loss": losses,
            "global_batch": self.batches,
            "data_seconds": self.data,
            "compute_seconds": self.compute,
            "workers": comm.world_size,
            "engine": comm.name,
            "peak_memory": _peak_memory(comm.device),
        }
        if comm.is_main_process:
            try:
                write_text(path, json.dumps(record))
            except OSError as error:
                log.warning(f"--trace {path}: cannot be written ({reason_of(error)})")


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors have taken on this worker's GPU; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
