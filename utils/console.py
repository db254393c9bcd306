"""Lines for the user."""

import os
import sys


def say(text: str) -> None:
    """Print a line. A reader that has gone away, as of ``| head``, does not end the training."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_streams() -> None:
    """Let a standard stream that was closed from the start lead nowhere; Python has None for it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # mostly the number itself
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
