"""How the pictures look: one sheet for all of them, and SVG that is the same bytes for the same rows.

Every colour is drawn in its light form. :func:`svg` puts the dark one, or a CSS variable with the light one as its default, in its
place, so that a picture is drawn once and fits light pages, dark pages, and pages that are either.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER, FILL = "#1f2329", "#5f6b77", "#d9dfe5", "#fefefe", "#e9edf2"
OURS, BLUE, GREEN, ORANGE, PURPLE, SKY = "#c8470b", "#0068ab", "#007a57", "#a16600", "#9c4f83", "#2f79a6"
"""The hues of Okabe and Ito's palette, which the colour-blind can tell apart, dark enough for text on white."""
DARK = {
    INK: "#e7ecf2",
    MUTED: "#98a4b0",
    GRID: "#343b44",
    PAPER: "#0e1217",
    FILL: "#262d36",
    OURS: "#ff7d3c",
    BLUE: "#56a9ec",
    GREEN: "#35c193",
    ORANGE: "#e8a93a",
    PURPLE: "#d58bbd",
    SKY: "#86c6ec",
}
COLORS = {"eager": MUTED, "eager, BatchNorm folded, channels_last": INK, "TorchScript, optimize_for_inference": BLUE}
"""Of rivals, where few are drawn together."""
THEMES = ("light", "dark", "css")
_WORDS = ("ink", "muted", "grid", "paper", "fill", "ours", "blue", "green", "orange", "purple", "sky")
VARIABLES = {light: f"--plot-{word}" for light, word in zip(DARK, _WORDS, strict=True)}
"""The CSS variable of each colour."""
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_SHEET = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.solid_capstyle": "round",
    # Text stays text: small files, the reader's own font, and words that can be searched and copied. DejaVu Sans, which the layout
    # is computed with, comes with matplotlib and is wider than what pages are set in.
    "svg.fonttype": "none",
    "svg.hashsalt": "lowkernels",
}


def matplotlib() -> Any:
    """The module matplotlib.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("pictures are drawn by matplotlib: pip install 'lowkernels[plot]'", name=error.name) from None
    return matplotlib


@contextlib.contextmanager
def sheet() -> Iterator[None]:
    """Draw in the style of this project."""
    with matplotlib().rc_context():
        matplotlib().rcdefaults()
        matplotlib().rcParams.update(_SHEET)
        yield


def new(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of this many inches (100 pixels each on a page) and its axes, as ``Figure.subplots`` gives them."""
    matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, hspace=0.06, wspace=0.05))
    return figure, figure.subplots(**grid)


def heading(figure: Figure, title: str, below: str, source: str) -> None:
    """What a picture shows, on top, and where its numbers come from, at the bottom."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color=INK)
    text = f"{below}\n{source}" if below else source
    figure.supxlabel(text, x=0.012, ha="left", fontsize=8, color=MUTED, linespacing=1.5)


def note(axes: Axes, text: str, x: float, y: float, color: str = INK, **kwargs: Any) -> Any:
    """Text at data coordinates, which may lie outside the axes."""
    return axes.annotate(text, (x, y), **{"fontsize": 8.5, "va": "center", "color": color, "annotation_clip": False, **kwargs})


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.055) -> None:
    """Names of lines at the right end of the axes, moved apart where they would cover each other.

    Args:
        axes: with their limits set.
        labels: height in data coordinates, text and colour.
        gap: least distance, in heights of the axes.
    """
    shares = []
    for value, text, color in labels:
        _, y = axes.transScale.transform((1.0, value))
        (_, low), (_, high) = axes.transScale.transform([(1.0, limit) for limit in axes.get_ylim()])
        shares.append([(y - low) / (high - low), text, color])
    shares.sort(key=lambda s: s[0])
    for below, above in itertools.pairwise(shares):
        above[0] = max(above[0], below[0] + gap)
    for y, text, color in shares:
        axes.text(1.015, y, text, color=color, fontsize=8.5, va="center", transform=axes.transAxes)


def legend(handles: Sequence[Any], axes: Axes, ncols: int) -> None:
    """What marks and lines mean, above the axes and flush right."""
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=ncols,
        frameon=False,
        fontsize=8.5,
        handletextpad=0.3,
        columnspacing=1.4,
        borderaxespad=0.2,
    )


def plain_numbers(axis: Any, *, minor: bool = False) -> None:
    """Tick labels as people write numbers, on a logarithmic axis too."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    formatter = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(formatter if minor else NullFormatter())


def svg(figure: Figure, theme: str = "light", description: str = "") -> str:
    """The picture as an SVG document without a background.

    Args:
        figure: from :data:`benchmarks.plots.PLOTS`.
        theme: ``"light"`` or ``"dark"``, for files; ``"css"`` for a page that sets ``--plot-ink``, ``--plot-paper`` and
            the other names of :data:`VARIABLES` itself; where it does not, they are light.
        description: goes into the file.

    Raises:
        ValueError: another theme.
    """
    if theme not in THEMES:
        raise ValueError(f"theme is {theme!r}; allowed are {', '.join(THEMES)}")
    target = io.StringIO()
    with sheet():
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None, "Description": description or None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace("'DejaVu Sans', sans-serif", _FONT)
    # A halo, so that no line crosses a word. (matplotlib's own would turn words into outlines.)
    halo = f"<style>text {{ paint-order: stroke; stroke: {PAPER}; stroke-width: 2.5px; stroke-linejoin: round }}</style>"
    text = re.sub(r"(<svg [^>]*>)", lambda m: f"{m[1]}\n {halo}", text, count=1)
    # The size is the page's to choose; the aspect is in the view box.
    text = re.sub(r'(<svg [^>]*?)\bheight="[\d.]+pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\bwidth="([\d.]+)pt"', lambda m: f'{m[1]}width="{float(m[2]) / 0.72:.0f}"', text, count=1)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    for light, dark in DARK.items():
        new = {"light": light, "dark": dark, "css": f"var({VARIABLES[light]}, {light})"}[theme]
        text = text.replace(light, new)
    return text
