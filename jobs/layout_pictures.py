"""A picture of one segment as a layout has it, by matplotlib: steps to the right, columns down, colours by block.

Axes: S steps, Q columns.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..pipelines.layouts.closeup import LaidSegment, beginning, columns_of
from ..pipelines.layouts.registry import layout_said
from ..pipelines.layouts.vocabulary import Block
from ..storage.layouts import member
from ..tokenizers.spec import StreamSpec
from .canvas import (
    DPI,
    INK,
    LEFT,
    RIGHT,
    WIDTH,
    cell,
    head,
    hsv,
    legend,
    new_figure,
    outside_text,
    picture_text,
    rgb,
    save,
    style,
)

if TYPE_CHECKING:
    from .canvas import Axes, Figure

LINE_STEPS, LINES = 32, 3  # of several columns one line
_ROW, _GAP, _TOP, _LEGEND = 0.34, 0.3, 0.75, 0.3  # inches
_HUES = {"text": (0.36, 0.25), "units": (0.58, 0.66), "codes": (0.08, 0.98)}  # of streams
_KNOWN = {"<bos>": "#37474f", "<eos>": "#8d6e63", "<sep>": "#00897b"}
_MARKS = ("#5c6bc0", "#ad1457", "#9e9d24", "#00695c", "#4527a0", "#d84315")  # of other special tokens, in turn
_PADDING = "#eceff1"
_LEGEND_COLUMNS = 6
_LETTER = 0.62 * DPI / 72  # pixels of width by points of size


@dataclass(frozen=True, slots=True)
class _Looks:
    """The colour of each block, by its name and codebook."""

    colours: dict[tuple[str, int | None], tuple[float, float, float]]

    @classmethod
    def of(cls, blocks: list[Block], specs: Mapping[str, StreamSpec]) -> "_Looks":
        names = dict.fromkeys(block.name for block in blocks if block.codebook is None)
        marks = [name for name in names if name not in _KNOWN and "pad" not in name]
        kinds = {block.name: _kind(block.name, specs) for block in blocks if block.codebook is not None}
        colours = {}
        for block in blocks:
            if block.codebook is None:
                other = _MARKS[marks.index(block.name) % len(_MARKS)] if block.name in marks else _PADDING
                colours[block.name, None] = rgb(_KNOWN.get(block.name, other))
            else:
                same = [name for name, kind in kinds.items() if kind == kinds[block.name]]
                hues = _HUES[kinds[block.name]]
                books = [each.codebook or 0 for each in blocks if each.name == block.name]
                deep = 0.22 + 0.5 * block.codebook / max(*books, 3)
                hue = hues[same.index(block.name) % len(hues)]
                colours[block.name, block.codebook] = hsv(hue, deep, 0.97 - 0.25 * deep)
        return cls(colours)


def _kind(name: str, specs: Mapping[str, StreamSpec]) -> str:
    """Which hues the tokens of a stream, or of what several members share, have."""
    spec = specs.get(name) or specs.get(member(name, 0))
    if spec is None or (spec.num_codebooks == 1 and not spec.decode_sample_rate):
        return "text" if name == "text" or (spec and not spec.has_clock and not spec.durations) else "units"
    return "codes"


@dataclass(frozen=True, slots=True)
class _Sheet:
    """What is drawn."""

    segment: LaidSegment
    tokens_SQ: np.ndarray
    numbers: dict[int, np.ndarray]  # by step the deviations `[D]` of the frame that it holds
    looks: _Looks

    def block(self, token: int, column: int) -> Block:
        return next(
            block
            for block in self.segment.plan.vocabulary.blocks
            if block.column == column and block.offset <= token < block.end
        )

    def is_given(self, step: int) -> bool:
        loss_S = self.segment.laid.loss_S
        return loss_S is not None and not loss_S[step]


def draw_layout(segment: LaidSegment, path: str) -> None:
    """The first steps of a segment as cells with their codes; special tokens are named, given steps hatched."""
    num_columns = len(segment.plan.column_sizes)
    shown = beginning(segment, max_steps=LINE_STEPS * (LINES if num_columns == 1 else 1))
    tokens_SQ = columns_of(shown.laid)
    starts = range(0, max(len(tokens_SQ), 1), LINE_STEPS)
    used = _used(shown)
    sheet = _Sheet(shown, tokens_SQ, _deviations(shown), _Looks.of(used, shown.specs))
    line_height = num_columns * _ROW + _GAP
    height = _TOP + len(starts) * line_height + 0.1 + _LEGEND * -(-(len(used) + 1) // _LEGEND_COLUMNS)
    with style():
        figure = new_figure(height)
        num_steps = int(segment.plan.num_steps(segment.rows)[0])
        head(figure, layout_said(segment.layout), _told(segment, num_steps, len(tokens_SQ)))
        for line, start in enumerate(starts):
            bottom = _TOP + line * line_height + num_columns * _ROW
            width = (WIDTH - LEFT - RIGHT) / WIDTH
            axes = figure.add_axes((LEFT / WIDTH, 1 - bottom / height, width, num_columns * _ROW / height))
            _draw_line(axes, sheet, start)
        has_given = any(sheet.is_given(step) for step in range(len(tokens_SQ)))
        _draw_legend(figure, used, sheet.looks, has_given=has_given)
        save(figure, path)


def _told(segment: LaidSegment, num_steps: int, shown: int) -> str:
    part = "" if shown == num_steps else f", the beginning: {shown:,} of {num_steps:,} steps"
    return f"segment {' and '.join(segment.ids)}{part}"


def _used(segment: LaidSegment) -> list[Block]:
    """The blocks that the steps have tokens of; those of several columns with the same codes once."""
    tokens_SQ = columns_of(segment.laid)
    found: dict[tuple[str, int | None], Block] = {}
    for block in segment.plan.vocabulary.blocks:
        tokens_S = tokens_SQ[:, block.column]
        if ((tokens_S >= block.offset) & (tokens_S < block.end)).any():
            found.setdefault((block.name, block.codebook), block)
    return list(found.values())


def _deviations(segment: LaidSegment) -> dict[int, np.ndarray]:
    """By step the numbers of the frame that it holds, each dimension by its own deviations from its mean."""
    found = {}
    first_S = columns_of(segment.laid)[:, 0]
    for stream, token in segment.plan.frame_tokens.items():
        frames_TD = segment.laid.frames[stream].astype(np.float32)
        axis = 0 if len(frames_TD) > 1 else None  # one frame alone: among its own numbers
        frames_TD = (frames_TD - frames_TD.mean(axis=axis)) / (frames_TD.std(axis=axis) + 1e-6)
        found.update(zip(np.flatnonzero(first_S == token).tolist(), frames_TD, strict=True))
    return found


def _draw_line(axes: "Axes", sheet: _Sheet, start: int) -> None:
    """Up to `LINE_STEPS` steps, a cell for each token."""
    line_SQ = sheet.tokens_SQ[start : start + LINE_STEPS]
    num_columns = line_SQ.shape[1]
    axes.set_xlim(0, LINE_STEPS)
    axes.set_ylim(num_columns, 0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    ticks = range(0, len(line_SQ), 4)
    axes.set_xticks([tick + 0.5 for tick in ticks], [f"{start + tick:,}" for tick in ticks])
    names = [f"column {column}" for column in range(num_columns)] if num_columns > 1 else [f"steps from {start:,}"]
    axes.set_yticks([column + 0.5 for column in range(num_columns)], names)
    for place, tokens_Q in enumerate(line_SQ.tolist()):
        for column, token in enumerate(tokens_Q):
            _draw_cell(axes, sheet, start + place, place, column, token)


def _draw_cell(axes: "Axes", sheet: _Sheet, step: int, place: int, column: int, token: int) -> None:
    block, given = sheet.block(token, column), sheet.is_given(step)
    colour = sheet.looks.colours[block.name, block.codebook]
    if given:
        colour = tuple(0.55 + 0.45 * part for part in colour)
    cell(axes, place + 0.03, column + 0.05, 0.94, 0.9, colour, hatched=given)
    if column == 0 and step in sheet.numbers:
        extent = (place + 0.12, place + 0.88, column + 0.88, column + 0.12)
        numbers_D1 = sheet.numbers[step][:, None]
        axes.imshow(
            numbers_D1, aspect="auto", extent=extent, cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest", zorder=3
        )
        axes.set_xlim(0, LINE_STEPS)
        axes.set_ylim(sheet.tokens_SQ.shape[1], 0)
        return
    label = f"{token - block.offset}" if block.codebook is not None else block.name
    ink = INK if block.codebook is not None or given or "pad" in block.name else "#ffffff"
    _write(axes, place + 0.5, column + 0.5, label, ink)


def _write(axes: "Axes", x: float, y: float, label: str, ink: str) -> None:
    """A label in a cell, smaller or on several lines where it is longer."""
    room = (WIDTH - LEFT - RIGHT) / LINE_STEPS * DPI * 0.9
    fitting = [size for size in (8, 6.5, 5.5) if len(label) * size * _LETTER <= room]
    size = fitting[0] if fitting else 5
    lines = [label] if fitting else textwrap.wrap(picture_text(label, 24), int(room / (size * _LETTER)))
    for number, line in enumerate(lines):
        down = (number - (len(lines) - 1) / 2) * 0.27
        text = axes.text(x, y + down, "", ha="center", va="center", fontsize=size, color=ink, clip_on=True)
        outside_text(text, line, 24)


def _draw_legend(figure: "Figure", used: list[Block], looks: _Looks, *, has_given: bool) -> None:
    books: dict[str, int] = {}
    for block in used:
        books[block.name] = books.get(block.name, 0) + (block.codebook is not None)
    entries = []
    for block in used:
        label = block.name if books[block.name] < 2 else f"{block.name}, codebook {block.codebook}"
        entries.append((label, looks.colours[block.name, block.codebook], False))
    given = [("given, not predicted", "#dfe5e8", True)] if has_given else []
    legend(figure, entries + given, columns=_LEGEND_COLUMNS)
