"""For people: what `layout list` and `layout show` print without --json."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..pipelines.layouts.closeup import LaidSegment, amounts, columns_of, frames_before
from ..pipelines.layouts.registry import layout_said
from ..storage.layouts import StreamRows
from .console import plain

_HEAD, _TAIL = 20, 6  # steps
_NUMBERS = 4  # of a frame


def show_layouts(layouts: list[dict[str, Any]]) -> None:
    """Print layouts, what each takes, and how it is written."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layout", style="bold", no_wrap=True)
    table.add_column("what it is, whose, and how it is written", overflow="fold")
    for layout in layouts:
        options = ", ".join(
            option["name"] if option["required"] else f"[{option['name']}={option['default'] or '...'}]"
            for option in layout["options"]
        )
        told = f"{layout['about']}\n{layout['paper']}.\nOptions: {options}\n{layout['example']}"
        table.add_row(layout["name"], Text(told))
    Console().print(table)
    print("wavemill layout show LAYOUT ROOT lays out a segment of a dataset.")


def show_laid(segment: LaidSegment, inverted: dict[str, StreamRows], differing: list[str]) -> None:
    """Print the first and the last steps of a segment, and whether the inverse gives what the table has."""
    plan, laid = segment.plan, segment.laid
    print(f"{layout_said(segment.layout)}, segment {' and '.join(segment.ids)}")
    for name, rows in segment.rows.items():
        spec, frames = segment.specs[name], int(rows.counts_N.sum())
        each = f"{spec.dim:,} numbers" if spec.dim else f"{len(rows.books)} x {spec.codebook_size:,} codes"
        print(f"    {name}: {frames:,} frames of {each}")
    sizes = ", ".join(f"{size:,}" for size in plan.column_sizes)
    columns = "one column" if len(plan.column_sizes) == 1 else f"{len(plan.column_sizes)} columns"
    print(f"{len(laid.tokens):,} steps of {columns}; different tokens: {sizes}")
    _print_steps(segment)
    for name, (books, frames) in amounts(inverted).items():
        if name in differing:
            print(f"{name}: the inverse does NOT give what the table has")
        else:
            what = f"{frames:,} frames" if not books else f"{frames:,} frames of {books} codebook(s)"
            print(f"{name}: the inverse gives the table's {what} exactly")


def _print_steps(segment: LaidSegment) -> None:
    plan, laid = segment.plan, segment.laid
    tokens_SQ, before = columns_of(laid), frames_before(laid, plan)
    num_steps, num_columns = tokens_SQ.shape
    steps = list(range(num_steps))
    if num_steps > _HEAD + _TAIL:
        steps = [*steps[:_HEAD], *steps[-_TAIL:]]
    lines = []
    for step in steps:
        told = [plain(plan.vocabulary.said(int(token), column)) for column, token in enumerate(tokens_SQ[step])]
        for stream, token in plan.frame_tokens.items():
            if tokens_SQ[step, 0] == token:
                numbers_D = laid.frames[stream][before[stream][step]]
                more = " ..." if len(numbers_D) > _NUMBERS else ""
                told[0] += f" {' '.join(f'{number:.3g}' for number in numbers_D[:_NUMBERS])}{more}"
        lines.append((step, told, "given" if laid.loss_S is not None and not laid.loss_S[step] else ""))
    widths = [max((len(told[column]) for _, told, _ in lines), default=0) for column in range(num_columns)]
    digits = len(f"{num_steps:,}")
    for place, (step, told, given) in enumerate(lines):
        if place == _HEAD and num_steps > _HEAD + _TAIL:
            print(f"  {'...':>{digits}}  {num_steps - _HEAD - _TAIL:,} more")
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(told, widths, strict=True))
        print(f"  {step:>{digits},}  {cells}  {given}".rstrip())
