"""What pictures share, by matplotlib: pages 1,600 pixels wide, their style, text from outside, writing the file.

Nothing global is set: figures are made without pyplot, in matplotlib's default style, drawn by Agg.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..storage.root import Root
from ..storage.stores import is_remote
from ..tokenizers.spec import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure

DPI = 100
WIDTH, LEFT, RIGHT = 16.0, 1.55, 0.35  # inches
INK, QUIET, LINE = "#263238", "#78909c", "#455a64"
_FONTS = (  # for the scripts that the first lacks, where they are installed
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Devanagari", "Noto Sans Arabic"),
    *("Noto Sans Hebrew", "Noto Sans Thai", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS", "Unifont"),
)

_HATCHED: dict[str, Any] = {"hatch": "//", "edgecolor": "#ffffff"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One of the axes of a page, as high as it says in inches."""

    height: float
    draw: Callable[["Axes"], None]


def require_picture(path: str) -> None:
    """Raise `UserError` if no picture can be drawn here, or none written there. Called before anything is computed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("A picture needs matplotlib: pip install 'wavemill[plots]'.") from error
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"--png {path!r}: the picture is a PNG file; name it SOMETHING.png.")
    if is_remote(path):
        Root(path.rpartition("/")[0]).require_writable()
        return
    if Path(path).is_dir():
        raise UserError(f"--png {path!r} is a folder; name a file in it.")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--png {path!r}: there is no folder {Path(path).parent}. Make it first.")


def page(panels: list[Panel], *, top: float, bottom: float) -> tuple["Figure", list["Axes"]]:
    """A figure with the panels one below the other, all inches being exact."""
    gap = 0.1
    height = top + bottom + sum(panel.height + gap for panel in panels)
    figure = new_figure(height)
    above, every = top, []
    for panel in panels:
        above += panel.height
        box = (LEFT / WIDTH, 1 - above / height, (WIDTH - LEFT - RIGHT) / WIDTH, panel.height / height)
        every.append(figure.add_axes(box))
        above += gap
    return figure, every


def new_figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults, whatever is set on this machine, with the fonts it has for other scripts."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    there = {font.name for font in fontManager.ttflist}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Glyph.*missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": [name for name in _FONTS if name in there] or ["sans-serif"],
                "font.size": 9,
                "text.color": INK,
                "axes.edgecolor": "#b0bec5",
                "axes.labelcolor": QUIET,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "xtick.color": QUIET,
                "ytick.color": QUIET,
                "xtick.labelsize": 8,
                "ytick.labelsize": 7.5,
            }
        )
        yield


def head(figure: "Figure", first: str, second: str, third: str = "") -> None:
    """A figure's title: three lines from its upper left corner."""
    height = figure.get_figheight()
    looks = (
        (first, 13, "bold", INK, 0.12, 120),
        (second, 9, "normal", QUIET, 0.40, 180),
        (third, 10, "normal", INK, 0.60, 170),
    )
    for words, size, weight, colour, down, length in looks:
        text = figure.text(0.15 / WIDTH, 1 - down / height, "", va="top", fontsize=size, weight=weight, color=colour)
        outside_text(text, words, length)


def outside_text(text: Any, words: str, length: int) -> None:
    """Put words from outside on a text: one line, no mathematics, no control characters, shortened."""
    text.set_parse_math(False)
    text.set_text(picture_text(words, length))


def picture_text(words: str, length: int) -> str:
    """Words on one line, what cannot be printed replaced, at most `length` characters."""
    line = " ".join(words.split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return line if len(line) <= length else line[: length - 1] + "…"


def write_nothing(axes: "Axes", words: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=QUIET)


def shade(place: int, count: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * place / max(1, count - 1))


def hues(codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """A colour for each code; codes that are near in number are far in hue (by the golden ratio)."""
    from matplotlib.colors import hsv_to_rgb

    hues = codes * 0.6180339887498949 % 1
    return hsv_to_rgb(np.stack([hues, np.full(len(codes), 0.42), np.full(len(codes), 0.95)], axis=-1))


def rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    from matplotlib.colors import hsv_to_rgb

    red, green, blue = hsv_to_rgb((hue, saturation, value)).tolist()
    return red, green, blue


def cell(axes: "Axes", x: float, y: float, width: float, height: float, colour: Any, *, hatched: bool) -> None:
    """A filled rectangle."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, linewidth=0, facecolor=colour, **(_HATCHED if hatched else {})))


def legend(figure: "Figure", entries: list[tuple[str, Any, bool]], *, columns: int) -> None:
    """What colours stand for, below the panels: labels from outside, colours, and whether they are hatched."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, label=picture_text(label, 30), **(_HATCHED if hatched else {}))
        for label, colour, hatched in entries
    ]
    place: Any = (LEFT / WIDTH, 0)
    drawn = figure.legend(
        handles=patches, loc="lower left", bbox_to_anchor=place, ncols=columns, frameon=False, fontsize=8
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)
        text.set_color(QUIET)


def save(figure: "Figure", path: str) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, metadata={"Software": None})
    if is_remote(path):
        folder, _, name = path.rpartition("/")
        Root(folder).write_bytes(name, picture.getvalue())
        return
    try:
        Path(path).write_bytes(picture.getvalue())
    except OSError as error:
        raise UserError(f"Cannot write the picture {path}: {error.strerror}.") from error
