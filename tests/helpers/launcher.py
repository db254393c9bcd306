"""The launcher, called in this process as launcher.sh calls it in one of its own."""

import contextlib
import io
import os
from subprocess import CompletedProcess
from unittest import mock

from helpers.process import environment
from utils.launch import cli

# What a shell may have set, and what would be in the printed command.
PRINTED = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "PYTHONPATH")


def quiet(**variables) -> dict[str, str]:
    """The environment of a call: without what the printed command would show."""
    found = environment(**variables)
    return {name: found[name] for name in found if name in variables or name not in PRINTED}


def call(*words, **variables) -> CompletedProcess:
    """Call the launcher in this process; a test of it uses ``nothing_starts``.

    Args:
        words: The arguments of launcher.sh.
        variables: Variables to add to the environment of a call.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), errors="surrogateescape") for _ in range(2))
    with (
        mock.patch.dict(os.environ, quiet(**variables), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = cli.main([str(word) for word in words])
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(os.fsdecode(stream.buffer.getvalue()))
    return CompletedProcess(words, code, *texts)
