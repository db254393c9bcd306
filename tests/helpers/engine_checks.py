"""What every engine promises, checked inside its own workers.

Not a test module: test_engines.py starts it under each engine's real launcher, as
``python engine_checks.py cifar`` or ``... cifar_horovod``. Rank 0 prints one line a check.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import create_model
from models._dropout import dropout
from tools.commands import engine_class
from utils.config.args import parse_args
from utils.data.image_set import ImageSet
from utils.data.sampling import shard
from utils.distributed.comm import Comm
from utils.distributed.sync_batchnorm import convert_sync_batchnorm
from utils.errors import PeerFailed, UserError
from utils.runtime.exit_codes import exit_process
from utils.runtime.memory_format import apply_memory_format
from utils.training.evaluation import Evaluator
from utils.training.optim import build_optimizer
from utils.training.step import Step

CPU = torch.device("cpu")
SYNC = parse_args([]).gradient_sync


def check_sum(comm: Comm) -> None:
    for kind in (torch.float32, torch.float64, torch.int64):
        tensor = torch.arange(3, dtype=kind) + comm.rank
        returned = comm.all_reduce_sum_(tensor)
        wanted = comm.world_size * torch.arange(3) + sum(range(comm.world_size))
        assert returned.data_ptr() == tensor.data_ptr(), "the sum is not in place"
        assert torch.equal(tensor, wanted.to(kind)), tensor


def check_broadcast_and_max(comm: Comm) -> None:
    tensor = torch.full((4,), 7.0 + comm.rank)
    assert torch.equal(comm.broadcast_(tensor), torch.full((4,), 7.0))
    assert comm.all_reduce_max(comm.rank * 3) == 3 * (comm.world_size - 1)


def check_buffers_become_the_average(comm: Comm) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(5))
    for buffer in model.buffers():
        buffer.fill_(comm.rank + 1)
    counter = int(model[0].num_batches_tracked)
    with comm.averaged_buffers(model) as rows:
        mean = (comm.world_size + 1) / 2
        assert torch.equal(model[1].running_var, torch.full((5,), mean))
        assert torch.equal(rows[:, 0], torch.arange(1.0, comm.world_size + 1))
    assert torch.equal(model[1].running_var, torch.full((5,), comm.rank + 1.0))
    assert int(model[0].num_batches_tracked) == counter, "counters are no averages"


def check_prepare_starts_from_rank_0(comm: Comm) -> None:
    torch.manual_seed(comm.rank)
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(model, 0.1, 0.9, 0.0, False)
    comm.prepare(model, optimizer, SYNC)
    _equal_everywhere(comm, model)


def check_uneven_shards_give_the_exact_gradient(comm: Comm) -> None:
    _trains_like_one_process(comm, lambda: create_model("alexnet").double(), sync_bn=False)


def check_several_backward_passes_give_the_exact_gradient(comm: Comm) -> None:
    _trains_like_one_process(
        comm, lambda: create_model("alexnet").double(), sync_bn=False, passes=3
    )


def check_sync_batchnorm_is_batchnorm_over_the_global_batch(comm: Comm) -> None:
    _trains_like_one_process(comm, lambda: create_model("resnet", depth=8).double(), sync_bn=True)


def check_dropout_masks_are_those_of_the_global_batch(comm: Comm) -> None:
    """However the batch is cut into shards and passes; no two images have the same mask."""
    build = partial(create_model, "wrn", depth=10, widen_factor=1, drop=0.3)
    _trains_like_one_process(comm, lambda: build().double(), sync_bn=True)
    _trains_like_one_process(comm, lambda: Dropping().double(), sync_bn=False, passes=3)


class Dropping(nn.Module):
    """Pixels, dropout, one linear layer: no batch norm, whose statistics see passes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = dropout(x, 0.3, self.training)
        zeros = (dropped == 0).flatten(1)
        assert len({tuple(row.tolist()) for row in zeros}) == len(x)
        return self.fc(dropped.flatten(1))


def check_channels_last_changes_nothing_but_rounding(comm: Comm) -> None:
    build = partial(create_model, "resnet", depth=8)
    _trains_like_one_process(
        comm, lambda: build().double(), sync_bn=True, memory_format="channels_last"
    )


def check_evaluation_is_exact(comm: Comm) -> None:
    torch.manual_seed(0)
    model = create_model("resnet", depth=8)
    images = _images(101)
    mine = Evaluator(model, 10, "off", comm)(images)
    alone = Evaluator(model, 10, "off", Serial())(images)
    assert (mine.images, mine.top1, mine.top5) == (101, alone.top1, alone.top5), (mine, alone)
    assert abs(mine.loss - alone.loss) < 1e-14, "an image's logits depend on the worker"


def check_a_failure_in_local_rank_zero_first_reaches_the_others(comm: Comm) -> None:
    expected = UserError if comm.local_rank == 0 else PeerFailed
    with pytest.raises(expected) as caught, comm.local_rank_zero_first():  # noqa: PT012
        if comm.local_rank == 0:
            raise UserError("planted")
    assert getattr(caught.value, "code", 2) == 2


class Serial(Comm):
    """The serial engine on the CPU, for comparison inside a worker of another engine."""

    def __init__(self) -> None:
        self.device = CPU


def _images(count: int, dtype: torch.dtype = torch.float32) -> ImageSet:
    random = np.random.RandomState(1)
    return ImageSet(
        random.randint(0, 256, (count, 32, 32, 3)).astype(np.uint8),
        random.randint(0, 10, count).astype(np.int64),
        (0.5, 0.5, 0.5),
        (0.25, 0.25, 0.25),
        device=CPU,
        dtype=dtype,
    )


def _trains_like_one_process(
    comm: Comm,
    build: Callable[[], nn.Module],
    sync_bn: bool,
    passes: int = 1,
    memory_format: str = "contiguous",
) -> None:
    """Three steps on shards of a batch that no worker count divides, against the whole batch."""
    batch = 13
    images = _images(3 * batch, torch.float64)

    def train(engine: Comm) -> nn.Module:
        torch.manual_seed(2)
        model = build()
        apply_memory_format(
            model, [images], memory_format if engine is comm else "contiguous", engine
        )
        if sync_bn and engine is comm:
            convert_sync_batchnorm(model, engine)
        optimizer = build_optimizer(model, 0.05, 0.9, 5e-4, False)
        sync = replace(SYNC, backward_passes_per_step=passes)
        step = Step(engine, *engine.prepare(model, optimizer, sync), "off", passes)
        for start in range(0, 3 * batch, batch):
            first, last = shard(start, start + batch, engine.rank, engine.world_size)
            step(*images.batch(torch.arange(first, last)), batch, seed=3)
        return model

    together, alone = train(comm), train(Serial())
    for (name, mine), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        difference = (mine - other).abs().max().item()
        assert difference < 1e-10, f"{name} differs by {difference}"
    _equal_everywhere(comm, together)


def _equal_everywhere(comm: Comm, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        main = comm.broadcast_(parameter.detach().clone())
        assert torch.equal(main, parameter), f"{name} differs between ranks"


def main(script: str) -> None:
    comm = engine_class(script).join(timeout=100)
    torch.set_num_threads(1)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(comm)
            if comm.is_main_process:
                print(name, "passed", flush=True)
    comm.close()
    exit_process(0)


if __name__ == "__main__":
    main(sys.argv[-1])  # the launcher may put --local-rank before it
