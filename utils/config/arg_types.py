"""What the values of flags may be: types for argparse that say what is wrong, and the parser."""

import argparse
import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NoReturn

from utils.errors import UserError, one_line

# int() and float() also take 1_000, full-width digits, spaces around and, the latter, nan and inf.
_WHOLE = re.compile(r"0*([0-9]{1,10})")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class ArgumentParser(argparse.ArgumentParser):
    """Reports bad input the way the rest of the program does: as a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(one_line(message.removeprefix("argument "), most=250))


def whole_number(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Return a type that accepts whole numbers between the limits."""

    def parse(text: str) -> int:
        digits = _WHOLE.fullmatch(text)
        value = int(digits[1]) if digits else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give a whole number of {least} or more (at most {most})"
            )
        return value

    return parse


def real_number(
    least: float, *, exclusive: bool = False, below: float | None = None, most: float = 1e9
) -> Callable[[str], float]:
    """Return a type that accepts finite numbers between the limits.

    Args:
        least: The lowest value.
        exclusive: Whether the lowest value itself is refused.
        below: Values must be below this, if given.
        most: The highest value.
    """
    limit = f"{'above' if exclusive else 'of at least'} {least:g} "
    limit += f"(at most {most:g})" if below is None else f"and below {below:g}"

    def parse(text: str) -> float:
        value = float(text) if _REAL.fullmatch(text) else math.nan
        high_enough = value > least or (value == least and not exclusive)
        if not high_enough or not value <= most or (below is not None and value >= below):
            raise argparse.ArgumentTypeError(f"{text!r}: give a number {limit}")
        return value

    return parse


def path(text: str) -> str:
    """Accept a path that files can have and that a line can show."""
    if not text:
        raise argparse.ArgumentTypeError("'': empty; give a path or leave the flag out")
    # Control characters, bytes that are no UTF-8, ends of lines and paragraphs.
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: holds a character that cannot be printed; give another name"
        )
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text!r}: longer than names of files can be")
    return text


def matching(pattern: str, what: str) -> Callable[[str], str]:
    """Return a type that accepts text of a pattern; ``what`` describes it."""

    def parse(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise argparse.ArgumentTypeError(f"{text!r}: give {what}")

    return parse


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Return a type that accepts one of the names, and suggests near ones."""

    def parse(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text.lower(), names, n=3)
        fix = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{text!r}: {fix}")

    return parse
