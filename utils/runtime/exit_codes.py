"""How a worker runs and ends: the exit code of every way in which the program can end.

utils/errors.py says what each code means to users.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, TypeAlias

import torch

from utils import log
from utils.config.args import parse_args
from utils.config.schema import Config
from utils.distributed.comm import Comm
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
from utils.launch.heartbeat import Heartbeat
from utils.runtime.device import select_gpus

Program: TypeAlias = Callable[[Comm, Config, Heartbeat, contextlib.ExitStack], None]

# The launcher takes the first worker that ends for the one that failed. Rank 0, or the worker that
# knows more, gets this many seconds to be the first.
_LATER = 3


def run_worker(engine: type[Comm], program: Program, argv: Sequence[str] | None = None) -> int:
    """Run the program on this worker with an engine.

    Args:
        engine: The engine's class.
        program: ``run`` of cifar.py.
        argv: The command line; by default the process's own.

    Returns:
        The exit code of the process.
    """
    log.open_streams()
    heartbeat = Heartbeat()
    rank = engine.rank_from_env()
    training = False
    code = 0
    try:
        config = parse_args(argv)
        select_gpus(config.hardware.gpu_id)
        comm = engine.join(config.gradient_sync.timeout)
        orderly = True
        try:
            comm.run(partial(_run_once, comm, program, config, heartbeat))
        except (UserError, TrainingError, PeerFailed, Interrupted):
            raise
        except BaseException as error:
            orderly = False
            training = heartbeat.registered
            if comm.is_peer_failure(error):
                raise PeerFailed(CRASHED) from error
            raise
        finally:
            heartbeat.idle()
            if orderly:  # Elsewhere it could wait for workers that know nothing of this one's end.
                comm.close()
    except BaseException as error:
        code = _exit_code_of(error, rank, training)
    heartbeat.report_exit(code)
    return code


def _run_once(comm: Comm, program: Program, config: Config, heartbeat: Heartbeat) -> None:
    log.set_rank(comm.rank)  # An elastic engine may have given this worker another one.
    with contextlib.ExitStack() as stack:
        program(comm, config, heartbeat, stack)


def _exit_code_of(error: BaseException, rank: int, training: bool) -> int:
    """Return the exit code of what has ended the program; print why, where this worker is to do so.

    Args:
        error: What has ended it.
        rank: The rank of this worker.
        training: Whether the program has crashed in its training. What fails before, or at the
            end, would fail again.
    """
    match error:
        case UserError():
            # Bad input is bad on every rank and rank 0 says so once. Where it is not, the launcher
            # has not ended this worker after a moment, and the message must not get lost.
            _let_rank_zero_speak_first(rank)
            _print_error(f"error: {error}")
            return BAD_INPUT
        case PeerFailed():
            time.sleep(_LATER)
            return error.code
        case TrainingError():
            if rank == 0:
                _print_error(f"error: {error}")
            return FAILED
        case Interrupted():
            return RUN_AGAIN
        case KeyboardInterrupt():
            if rank == 0:
                print("\ninterrupted; --resume auto continues from the last checkpoint", flush=True)
            return INTERRUPTED
        case Exception() if _is_out_of_memory(error):
            _let_rank_zero_speak_first(rank)
            _print_error(
                "error: out of memory: give a smaller --train-batch, or more "
                "--backward-passes-per-step; --estimate tells what a run needs"
            )
            return FAILED
        case Exception():
            traceback.print_exception(error)
            return CRASHED if training else FAILED
    raise error


def _let_rank_zero_speak_first(rank: int) -> None:
    if rank != 0:
        time.sleep(_LATER)


def _print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _is_out_of_memory(error: Exception) -> bool:
    kinds = (MemoryError, torch.cuda.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def exit_process(code: int) -> NoReturn:
    """End the process with an exit code, without taking the interpreter apart.

    The threads of a process group may still release a tensor while the interpreter shuts down,
    and such a thread aborts the whole process (seen with Gloo of torch 2.15).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # Its reader may be gone.
            stream.flush()
    os._exit(code)
