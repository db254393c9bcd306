"""The exceptions that have a meaning for the user, and the exit codes they stand for."""

# 0 finished, 2 bad input, 3 training failed, 130 ended by Ctrl-C
BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130


class UserError(Exception):
    """Bad input: one line that names the flag, its value and the way out.

    The main program prints it as ``error: <message>`` and exits with code 2; nothing has been
    written by then. Whatever a value brings into the message, it stays a line that can be read.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, most: int = 400) -> str:
    """The text with what cannot be printed escaped; of a long one the middle is left out."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = most // 2 - 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


class TrainingError(Exception):
    """Training cannot go on: one line that says where and why. Exit code 3."""


class PeerFailed(Exception):
    """Another worker has failed and has said why; this one ends with the same exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another worker has failed with exit code {code}")
        self.code = code
