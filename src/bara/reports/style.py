"""How pictures look."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bara.files import atomic_write_bytes


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; the series are told apart with any common colour blindness."""

    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Theme(
    surface="#ffffff",
    ink="#1b1f24",
    muted="#59636e",
    grid="#e4e7eb",
    series=("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#a07800", "#56b4e9"),
    ramp=("#f1f6fb", "#9cc7e4", "#2f86c1", "#0a3a66"),
)
DARK = Theme(
    surface="#161b22",
    ink="#e6edf3",
    muted="#9aa4af",
    grid="#2b323b",
    series=("#f58a42", "#4fb0ea", "#35c29b", "#e79cc6", "#e3c04d", "#a5d8f7"),
    ramp=("#1d2733", "#1f5077", "#3d97d0", "#c9e6fa"),
)

_LINES = ("--", "-", "-.", ":")
_MARKERS = "osD^vPX"


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure to the PNG file ``path``, whole or not at all.

    Raises:
        BaraError: it cannot be written.
    """
    atomic_write_bytes(path, to_png(figure))


def series_styles(theme: Theme) -> Iterator[dict[str, str]]:
    """Colour, line and marker of one series after the other, without end."""
    series = zip(cycle(theme.series), cycle(_LINES), cycle(_MARKERS), strict=False)
    return ({"color": c, "line": line, "marker": marker} for c, line, marker in series)


def style_axes(ax: Axes, theme: Theme) -> None:
    """Give axes the theme's colours and no frame."""
    ax.set_facecolor(theme.surface)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(theme.grid)
    ax.grid(color=theme.grid, lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=theme.muted, labelsize=9.5, length=0, pad=6)
    ax.xaxis.label.set(color=theme.ink, size=10.5)
    ax.yaxis.label.set(color=theme.ink, size=10.5)
