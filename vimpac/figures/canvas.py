"""A matplotlib figure without pyplot, whose state belongs to the caller, and writing it as a PNG."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from vimpac.errors import InputError
from vimpac.files.atomic import replacing


def new_figure(width: float, height: float, what: str) -> Any:
    """A Figure of this size in inches. Raises InputError if matplotlib is missing. what: is drawn, for that message."""
    backend = os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported if this names no backend
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"drawing {what} needs matplotlib: pip install matplotlib") from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: Path, dpi: int) -> None:
    """Writes the picture, whole or not at all. Raises InputError if its folder does not exist."""
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: its folder does not exist; make it first")
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # names may be in any script
        figure.savefig(temporary, format="png", dpi=dpi)
