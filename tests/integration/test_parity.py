"""Parity before speed: the fast path against the plainest code that does the same."""

import pytest
import torch

from models import create_model
from utils.config.args import parse_args
from utils.data import synthetic
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.runtime.memory_format import apply_memory_format
from utils.training.optim import build_optimizer
from utils.training.step import Step

RATE = 1e-4  # small, or the networks amplify differences in rounding


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("alexnet", {}), ("resnet", {"depth": 8}), ("preresnet", {"depth": 8}),
     pytest.param("resnext", {"depth": 11, "cardinality": 2, "widen_factor": 1},
                  marks=pytest.mark.slow),
     ("wrn", {"depth": 10, "widen_factor": 1}),
     ("densenet", {"depth": 16})],
)  # fmt: skip
def test_the_fast_path_trains_what_a_plain_loop_trains(name, arguments, layout):
    """Twenty steps in fp32: gather, memory format, fused update against the plainest code."""
    images = ImageSet(
        *synthetic.generate(10, train=True, count=20 * 32),
        *synthetic.STATISTICS,
        device=torch.device("cpu"),
    )
    batches = [images.batch(index) for index in torch.arange(20 * 32).split(32)]

    torch.manual_seed(0)
    model = create_model(name, **arguments)
    optimizer = torch.optim.SGD(
        model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, foreach=False
    )
    wanted = []
    for inputs, labels in batches:
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())

    torch.manual_seed(0)
    model = create_model(name, **arguments)
    comm = Comm()
    apply_memory_format(model, [images], layout, comm)
    optimizer = build_optimizer(model, RATE, 0.9, 5e-4, False)
    step = Step(comm, *comm.prepare(model, optimizer, parse_args([]).gradient_sync), "off")
    for k, index in enumerate(torch.arange(20 * 32).split(32)):
        loss, _ = step(*images.batch(index), 32, seed=k)
        assert loss.item() / 32 == pytest.approx(wanted[k], rel=1e-4), f"step {k}"
