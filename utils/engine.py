"""The program behind both scripts: set up a run, then train or evaluate.

Read ``run`` first, then utils/training/trainer.py. Everything that differs between the engines is behind
``comm`` (utils/distributed/comm.py); a line that communicates says what it does.
"""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from models import model_arguments
from utils.checkpoint import format as checkpoint
from utils.config.args import model_arguments_of, parse_args, warnings
from utils.data import sampling as order
from utils.data.datasets import load_dataset
from utils.distributed.comm import Comm, Exchange
from utils.distributed.consistency import check_agreement, code, contents, flags
from utils.distributed.sync_batchnorm import convert_sync_batchnorm
from utils.errors import (
    BAD_INPUT,
    CRASHED,
    FAILED,
    INTERRUPTED,
    RUN_AGAIN,
    Interrupted,
    PeerFailed,
    TrainingError,
    UserError,
)
from utils.files import unlock_folder
from utils.launch.heartbeat import Watch
from utils.log import open_streams
from utils.log import say as say_line
from utils.metrics.confusion import Confusion
from utils.metrics.meter import Meter
from utils.metrics.run_log import RunLog, check_tensorboard
from utils.metrics.step_times import StepTimes
from utils.runtime.estimate import estimate
from utils.runtime.malloc import keep_freed_memory
from utils.runtime.memory_format import lay_out
from utils.runtime.provenance import write_args
from utils.startup import (
    build_model,
    build_sets,
    check_fits,
    choose_tf32,
    claim_folder,
    compile_blocks,
    epoch_shape,
    find_checkpoint,
    global_batch,
    make_reproducible,
    memory_format_for,
    run_folder,
    select_gpus,
    start_lines,
    start_position,
    start_text,
    usable_precision,
)
from utils.training.cuda_graph import RECORDERS, StepGraph, wants_graph
from utils.training.evaluation import evaluate_on, report_end, report_evaluation
from utils.training.optim import Schedule, build_optimizer, scaled_rate
from utils.training.step import Step
from utils.training.trainer import Training


def main(engine: type[Comm], argv: Sequence[str] | None = None) -> int:
    """Run the program on this worker with an engine; returns the exit code."""
    open_streams()
    watch = Watch()
    code = _code_of_run(engine, argv, watch)
    watch.leave(code)
    return code


def _code_of_run(engine: type[Comm], argv: Sequence[str] | None, watch: Watch) -> int:
    rank = engine.launched_rank()
    training = False
    try:
        options = parse_args(argv)
        select_gpus(options.gpu_id)
        comm = engine.join(options.timeout)
        orderly = True
        try:
            comm.run(partial(_run, comm, options, watch))
        except (UserError, TrainingError, PeerFailed, Interrupted):
            raise
        except BaseException as error:
            orderly = False
            training = watch.begun
            if comm.lost_peer(error):
                raise PeerFailed(CRASHED) from error
            raise
        finally:
            watch.idle()
            if orderly:  # or it could wait for workers that know nothing of this one's end
                comm.close()
    except UserError as error:
        if rank != 0:
            # Bad input is bad on every rank and rank 0 says so once. Where it is not, the launcher
            # has not ended this worker after a moment, and the message must not get lost.
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT
    except PeerFailed as error:
        time.sleep(3)  # the launcher takes the first worker that ends for the one that failed
        return error.code
    except TrainingError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return FAILED
    except Interrupted:
        return RUN_AGAIN
    except KeyboardInterrupt:
        if rank == 0:
            print("\ninterrupted; --resume auto continues from the last checkpoint", flush=True)
        return INTERRUPTED
    except Exception as error:
        if _out_of_memory(error):
            if rank != 0:
                time.sleep(3)  # as above: rank 0 speaks where all are out of memory
            print(
                "error: out of memory: give a smaller --train-batch, or more "
                "--backward-passes-per-step; --estimate tells what a run needs",
                file=sys.stderr,
                flush=True,
            )
            return FAILED
        traceback.print_exc()
        return CRASHED if training else FAILED  # what fails at the start would fail again
    return 0


def _out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _run(comm: Comm, options: argparse.Namespace, watch: Watch) -> None:
    with contextlib.ExitStack() as claims:
        run(comm, options, watch, claims)


def leave(code: int) -> NoReturn:
    """End the process with an exit code, without taking the interpreter apart.

    The threads of a process group may still let go of a tensor while the interpreter shuts down,
    and such a thread aborts the whole process (seen with Gloo of torch 2.15).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader may be gone
            stream.flush()
    os._exit(code)


def run(
    comm: Comm, options: argparse.Namespace, watch: Watch, claims: contextlib.ExitStack
) -> None:
    """Train, or evaluate a checkpoint, as the options say.

    Args:
        comm: the engine.
        options: of the command line.
        watch: learns what this worker does.
        claims: gets what has to be given back at the end.
    """
    say = say_line if comm.is_main else _say_nothing
    check_agreement(comm, code)
    check_agreement(comm, partial(flags, options))
    make_reproducible(options.seed, options.deterministic)
    choose_tf32(options.tf32)
    if options.tensorboard:
        check_tensorboard()
    options.amp = usable_precision(comm, options.amp, say)
    with torch.device("meta"):  # wrong model flags are found before any download
        check_fits(build_model(options, classes=10), options, comm)
    saved = find_checkpoint(options, comm, say)

    with comm.main_first():  # the others wait until downloads and caches are complete
        data = load_dataset(
            options.dataset,
            options.data,
            urls=options.data_url,
            archive=options.data_archive,
            md5=options.data_md5,
            stats=options.stats,
            train_size=options.train_size,
            test_size=options.test_size,
            workers=options.workers,
            notify=say,
        )
    check_agreement(comm, partial(contents, data))
    train_set, valid_set, test_set = build_sets(data, options, comm)
    batch = global_batch(options, comm.size, len(train_set))

    if comm.device.type == "cpu":
        keep_freed_memory()
    model = build_model(options, len(data.classes)).to(comm.device, train_set.scale.dtype)
    memory_format = memory_format_for(model, options, saved, len(train_set), comm)
    lay_out(model, (train_set, valid_set, test_set), memory_format, comm)
    if options.sync_bn:
        convert_sync_batchnorm(model, comm)
    if saved:
        wanted = checkpoint.describe_model(
            options.arch, model_arguments_of(options) | {"num_classes": len(data.classes)}
        )
        checkpoint.load_model(model, saved.state, saved.path, wanted)
    if options.evaluate:
        confusion = Confusion(len(data.classes), comm.device) if options.per_class else None
        result = evaluate_on(test_set, model, comm, options, confusion=confusion)
        report_evaluation(result, saved, confusion, data.classes, comm)
        return

    if options.estimate:
        lines = estimate(model, train_set, len(valid_set), batch, options.epochs, options.amp, comm)
        say("\n".join(lines))
        return

    shape = epoch_shape(options, batch, len(train_set))
    position = start_position(options, saved, shape)
    rate = scaled_rate(options.lr, batch, options.lr_scaling)
    schedule = Schedule(rate, options.schedule, options.gamma, options.warmup_steps, options.warmup)
    if options.compile:
        compile_blocks(model)
    passes = options.backward_passes_per_step
    graphed, why_not = wants_graph(
        options.graph,
        comm,
        passes,
        train_set.home,
        options.on_nan,
        redraws=bool(options.checkpoint_activations and options.drop),
    )
    recorder = RECORDERS[comm.device.type](comm.device) if graphed else None
    if recorder:
        claims.enter_context(recorder.on_stream())
    optimizer = build_optimizer(
        model,
        torch.tensor(rate, device=comm.device) if graphed else rate,
        options.momentum,
        options.weight_decay,
        options.nesterov,
    )
    wrapped = model
    if not options.no_exchange:
        # From here on backward averages the gradients over the workers.
        exchange = Exchange(options.compression, passes, options.adasum)
        wrapped, optimizer = comm.wrap(model, optimizer, exchange)
    if saved:
        checkpoint.load_optimizer(optimizer, saved.state, saved.path)
        checkpoint.load_buffers(model, saved.state, comm)

    folder = run_folder(options)
    with comm.main_first():
        if comm.is_main:
            lock = claim_folder(folder, options, saved, comm.restarts() > 0)
            claims.callback(unlock_folder, lock)
            write_args(folder / "args.json", options, comm)
    about = {
        "arch": options.arch,
        "arch_arguments": {**model_arguments(options.arch), **model_arguments_of(options)},
        "dataset": options.dataset,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "memory_format": memory_format,
        "shape": shape,
        "options": vars(options),
    }
    saver = checkpoint.Saver(folder, comm, model, optimizer, about, say)
    log = RunLog(folder if comm.is_main else None, position.epoch, options.tensorboard)

    for line in start_lines(
        comm, options, model, data, len(train_set), batch, rate, memory_format, folder
    ):
        say(line)
    for line in warnings(options):
        say(f"warning: {line}")
    if train_set.home != comm.device:
        say("note: the images stay in main memory (--resident): no CUDA graph")
    if why_not:
        say(f"warning: --graph on: {why_not}; training without")
    for line in start_text(options, saved, position, comm.size):
        say(line)

    bounds = order.batches(len(train_set), batch, comm.size * passes)
    # A look at each step's gradients costs little where the host does the work itself.
    looks = not options.no_exchange and (comm.device.type == "cpu" or options.on_nan == "skip")
    step = Step(comm, wrapped, optimizer, options.amp, passes, options.on_nan if looks else None)
    first, last = order.share(*bounds[0], comm.rank, comm.size)

    def rehearse() -> None:
        index = torch.arange(last - first, device=train_set.home)
        crops = torch.zeros(len(train_set), 3, dtype=torch.int64, device=train_set.home)
        step.rehearse(*train_set.batch(index, crops), bounds[0][1])

    comm.settle(rehearse)
    meter = Meter(comm.device)
    graph = None
    if recorder:
        graph = StepGraph(
            step, train_set, meter, last - first, bounds[0][1], comm.graph_warm_up, recorder, say
        )
        claims.callback(graph.drop)  # whatever ends the run, before the engine closes
    times = StepTimes(keep=options.trace is not None)
    Training(
        comm=comm,
        say=say,
        watch=watch,
        model=model,
        optimizer=optimizer,
        step=step,
        graph=graph,
        meter=meter,
        times=times,
        images=train_set,
        validate=lambda after: evaluate_on(valid_set, model, comm, options, after_batch=after),
        bounds=bounds,
        schedule=schedule,
        position=position,
        epochs=options.epochs,
        seed=options.seed,
        saver=saver,
        log=log,
        save_every=options.save_every,
        check_replicas_every=options.check_replicas,
        exchanges=not options.no_exchange,
        on_nan=options.on_nan,
        timeout=options.timeout,
    ).run()
    log.close()
    times.write(Path(options.trace) if options.trace else None, comm)
    report_end(position, model, valid_set, test_set, folder, comm, options, say)


def _say_nothing(*_: object) -> None:
    """The print of the ranks other than 0."""
