"""Pictures beside the numbers, which no training and no measurement depends on."""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from utils import log
from utils.errors import UserError, reason_of
from utils.files import write_atomically


def draw_picture(
    picture: Path, fill: Callable[[Any], None], size: tuple[float, float], dpi: int = 100
) -> None:
    """Draw a picture as PNG; replaces the file.

    Text is shown as it is: ``$`` begins no formula. Characters that the font lacks become boxes.

    Args:
        picture: The file.
        fill: Draws in an empty figure of matplotlib.
        size: Width and height in inches.
        dpi: Pixels of an inch.

    Raises:
        UserError: It cannot be drawn or written, for whatever reason.
    """
    try:
        if broken := _import_matplotlib():
            raise broken
        import matplotlib
        from matplotlib.figure import Figure  # Not through pyplot, which wants a display.

        with (
            warnings.catch_warnings(),
            matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}),
        ):
            warnings.simplefilter("ignore")
            figure = Figure(figsize=size, layout="constrained")
            fill(figure)
            write_atomically(picture, lambda file: figure.savefig(file, format="png", dpi=dpi))
    except Exception as error:
        raise UserError(f"{picture}: cannot be drawn ({reason_of(error)})") from error


def try_drawing(draw: Callable[[], None]) -> bool:
    """Draw, or warn of a picture that cannot be drawn; the same warning comes once.

    Args:
        draw: Draws by ``draw_picture``.

    Returns:
        Whether the picture is there.
    """
    try:
        draw()
    except UserError as error:
        log.warning_once(str(error))
        return False
    return True


@cache
def _import_matplotlib() -> Exception | None:
    """Import matplotlib, which is slow; return why it cannot be imported.

    Two things can stand in its way, and neither is needed: Jupyter leaves an MPLBACKEND to its
    shells that other environments lack, and a matplotlibrc may be damaged.
    """
    try:
        with _environment(MPLBACKEND="agg"):
            try:
                import matplotlib.figure
            except Exception:
                for name in [*sys.modules]:
                    if name.partition(".")[0] == "matplotlib":
                        del sys.modules[name]
                with _environment(MATPLOTLIBRC=os.devnull):
                    import matplotlib.figure  # noqa: F401
    except Exception as error:
        return error
    return None


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables inside, and as they were again afterwards."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
