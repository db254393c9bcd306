"""Lines for the user."""

import os
import sys


def say(text: str) -> None:
    """Print a line. A reader that has gone away, as of ``| head``, does not end the training."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
