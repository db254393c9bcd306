"""Train a CIFAR-10/100 classifier with Horovod.

One process:     python cifar_horovod.py -a resnet --depth 20
Two workers:     horovodrun -np 2 -H localhost:2 python cifar_horovod.py -a alexnet
From a recipe:   ./launcher.sh -m alexnet -n 2 -d cifar10 -f horovod

The program is ``run`` of cifar.py; the engine is utils/distributed/horovod.py.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out.

from cifar import run
from utils.distributed.horovod import HorovodComm
from utils.runtime.exit_codes import exit_process, run_worker

if __name__ == "__main__":
    exit_process(run_worker(HorovodComm, run))  # connects the workers, and closes at the end
