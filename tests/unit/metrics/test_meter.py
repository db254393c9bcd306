"""Loss and accuracy as sums."""

import torch

from utils.distributed.comm import Comm
from utils.metrics.meter import Meter, Metrics


def test_a_meter_counts_images_not_batches():
    meter = Meter(torch.device("cpu"))
    right = torch.eye(10)[:4] * 5
    meter.update(torch.tensor(8.0), right, torch.arange(4))
    wrong = -torch.eye(10)[9:] * 5
    meter.update(torch.tensor(7.0), wrong, torch.tensor([9]))
    assert meter.reduced(Comm()) == Metrics(loss=3.0, top1=80.0, top5=80.0, images=5)


CPU = torch.device("cpu")


def test_a_meter_continues_from_the_sums_of_other_workers():
    comm, meter = Comm(), Meter(CPU)
    meter.start_from([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]], comm)
    assert meter.all_gather(comm) == [[11.0, 22.0, 33.0, 44.0]]
