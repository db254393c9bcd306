"""Train a CIFAR-10/100 classifier with PyTorch DistributedDataParallel.

One process:     python cifar.py -a resnet --depth 20
Two workers:     python -m torch.distributed.launch --nproc_per_node=2 cifar.py -a alexnet
The same:        torchrun --nproc_per_node=2 cifar.py -a alexnet
From a recipe:   ./launcher.sh -m alexnet -n 2 -d cifar10 -f dist

``run`` is the whole program; cifar_horovod.py is the same program with the other engine. Every
worker runs all of it. A comment at the end of a line names its communication.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # PYTHONSAFEPATH leaves it out.

from utils.checkpoint.manager import CheckpointManager
from utils.checkpoint.restore import restore_training_state
from utils.checkpoint.resume import find_checkpoint
from utils.checkpoint.run_dir import claim_run_dir, run_folder
from utils.checkpoint.train_state import TrainState, is_finished
from utils.config.schema import Config
from utils.distributed.comm import Comm
from utils.distributed.consistency import check_consistency
from utils.launch.heartbeat import Heartbeat
from utils.metrics.run_log import RunLog
from utils.runtime import device
from utils.runtime.estimate import log_estimate
from utils.runtime.exit_codes import exit_process, run_worker
from utils.runtime.precision import resolve_precision
from utils.runtime.provenance import code_fingerprint
from utils.training import build, summary
from utils.training.checkpoint_data import match_dataset, resolve_data
from utils.training.cuda_graph import on_stream
from utils.training.evaluation import evaluate_checkpoint
from utils.training.trainer import Trainer


def run(comm: Comm, config: Config, heartbeat: Heartbeat, stack: ExitStack) -> None:
    """Train, or evaluate a checkpoint, as the configuration says.

    Args:
        comm: The engine, through which the workers communicate.
        config: The configuration; it never changes, a decision makes a new one.
        heartbeat: Tells the supervisor what this worker does.
        stack: Takes what has to be undone at the end, whatever ends the run.
    """
    # The same code, options and data on all workers, and a device to compute on.
    check_consistency(comm, code_fingerprint)  # all-reduce
    check_consistency(comm, config.fingerprint)  # all-reduce
    device.configure(config.hardware, config.train.seed)
    config = config.replace(hardware=resolve_precision(config.hardware, comm))  # broadcast
    build.check_model_fits(config, comm)
    folder = run_folder(config.run, config.model, config.data.dataset)
    loaded = find_checkpoint(config.run, folder, comm)  # broadcast
    config = resolve_data(config, loaded)  # What a checkpoint knows of its images counts.
    with comm.local_rank_zero_first():  # barriers: one worker of each node downloads
        dataset, loaded = match_dataset(build.dataset(config.data), loaded, config)
    check_consistency(comm, dataset.fingerprint)  # all-reduce

    # The sets, the steps of an epoch, and the network with the weights of a checkpoint, if any.
    splits = build.splits(dataset, config, comm)  # all-reduce, on GPUs: has each one room?
    plan = build.plan(config, len(splits.train), comm)
    model, memory_format = build.model(config, dataset, splits, loaded, comm)  # broadcast
    evaluator = build.evaluator(model, config, comm)
    if config.run.evaluate:
        evaluate_checkpoint(evaluator, splits.test, loaded, dataset, config.run)  # all-reduces
        return
    if config.run.estimate:
        log_estimate(
            model, splits.train, len(splits.validation), plan.global_batch, config.train.epochs,
            config.hardware.amp, comm,
        )  # fmt: skip
        return

    if loaded and is_finished(loaded, config.run, config.train):
        summary.log_finished(loaded, config.options(), dataset, splits)
        return

    # Where training starts, and the optimizer.
    fingerprint, steps = plan.fingerprint(config.data.dataset), len(plan.batch_slices)
    state = TrainState.start(config.train, loaded, fingerprint, steps)
    graph_recorder = build.recorder(config, splits.train.storage_device, comm)
    stack.enter_context(on_stream(graph_recorder))
    # `wrapped` holds `model`, and averages the gradients over the workers in its backward pass.
    wrapped, optimizer = build.optimizer(  # broadcast of rank 0's parameters
        model, plan.schedule.base, graph_recorder, config, comm
    )
    if loaded:
        restore_training_state(loaded, model, optimizer, comm)

    # The run folder; rank 0 alone writes.
    about = build.checkpoint_metadata(config, dataset, memory_format, plan, loaded, comm)
    stack.enter_context(claim_run_dir(folder, config.run, loaded, state, about, comm))  # barriers
    checkpoints = CheckpointManager(folder, comm, model, optimizer, about)
    run_log = RunLog(folder if comm.is_main_process else None, state.epoch, config.run.tensorboard)
    summary.log_start(
        config.model, config.data, config.train, config.hardware, model=model, dataset=dataset,
        plan=plan, memory_format=memory_format, folder=folder, comm=comm,
    )  # fmt: skip
    build.log_graph_obstacles(config, splits.train.storage_device, comm)
    summary.log_origin(loaded, state, about)

    # Epochs of steps.
    loop = build.train_loop(  # all-reduces of a dry run, with three DDP workers or more
        wrapped, optimizer, splits.train, plan, graph_recorder, config, comm
    )
    stack.callback(loop.close)
    trainer = Trainer(
        loop, evaluator, splits.validation, state, checkpoints, run_log, heartbeat, config.train,
        config.gradient_sync, config.run,
    )  # fmt: skip
    trainer.fit()  # all-reduces: gradients, signals, metrics, statistics; broadcast: checksums
    run_log.close()
    if config.run.trace:
        loop.times.write(Path(config.run.trace), comm)  # all-reduce
    summary.log_end(state, evaluator, splits, dataset, folder, config.run)  # all-reduces


if __name__ == "__main__":
    from utils.distributed.ddp import DDPComm

    exit_process(run_worker(DDPComm, run))  # connects the workers, and closes at the end
