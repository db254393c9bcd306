"""The serial engine."""

import pytest
from torch import nn

from utils.config.args import parse_args
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.training.optim import build_optimizer


def test_the_serial_engine_refuses_adasum():
    model = nn.Linear(1, 1)
    sync = parse_args(["--adasum"]).gradient_sync
    with pytest.raises(UserError, match="Horovod"):
        Comm().prepare(model, build_optimizer(model, 0.1, 0, 0, False), sync)
