"""Segments continued by models that predict the next step: sequences of one column, grids of several.

What does not fit into the steps that a model was trained on is continued window by window, each beginning with the last
half of what is known: training sees such beginnings, too, where packing cuts long segments.

Axes: S steps, Q columns, K codebooks of a frame, T frames.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from ...pipelines.layouts.grid import GridPlan
from ...pipelines.layouts.sequence import Mark, Run, SequencePlan
from ...pipelines.layouts.staged import PiecewisePlan
from ...pipelines.layouts.vocabulary import Block
from ...storage.layouts import Codes, StreamRows
from ...tokenizers.spec import StreamSpec, UserError
from .drawing import Context, Drawer, legal_tokens
from .model import TokenModel

Books = dict[str, list[list[int]]]  # by stream, of each codebook the codes that are known, from the first frame on


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A trained model and the plan that says what its steps are."""

    name: str  # the layout's, for progress and sentences
    model: TokenModel
    specs: Mapping[str, StreamSpec]
    length: int  # steps of a sequence in training


@dataclass(frozen=True, slots=True)
class Window:
    """Frames `[begin, end)` of the stream that is the clock, of which those before `known` are known."""

    begin: int
    known: int
    end: int


def windows(known: int, total: int, size: int, *, grain: int = 1) -> Iterator[Window]:
    """What is continued in turn, at most `size` frames each, until there are `total`; each begins at a whole grain."""
    while known < total:
        begin = 0 if total <= size else max(0, known - size // 2) // grain * grain
        end = min(begin + size, total)
        yield Window(begin, known, end)
        known = end


def pieces(known: int, total: int, size: int) -> Iterator[Window]:
    """The same in pieces from the first frame on, which do not overlap."""
    while known < total:
        begin = known - known % size
        yield Window(begin, known, min(begin + size, total))
        known = min(begin + size, total)


@torch.inference_mode()
def continue_sequence(
    stage: Stage,
    plan: SequencePlan | PiecewisePlan,
    books: Books,
    totals: Mapping[str, int],
    drawer: Drawer,
    *,
    may_end: bool = False,
) -> bool:
    """Draw codes behind those in `books` until each stream has its total; only a run's own codebook, in its turn.

    With `may_end`, the model may say `<eos>` where a frame begins; the result says whether it did. Raises `UserError`
    if what cannot be taken apart, such as a text, does not fit into the model's steps.
    """
    whole = plan.whole if isinstance(plan, PiecewisePlan) else plan
    runs = [part for part in whole.parts if isinstance(part, Run)]
    clock, rates = runs[-1].stream, _rates(runs, stage.specs)
    known = min(len(books[clock][book]) for book in runs[-1].books)
    size = _window_size(stage, whole, rates, totals, clock)
    if isinstance(plan, PiecewisePlan):
        each = pieces(known, totals[clock], min(size, plan.piece))
    else:
        each = windows(known, totals[clock], size)
    left = sum(max(0, totals[run.stream] - len(books[run.stream][book])) for run in runs for book in run.books)
    counter = _Counter(stage.name, left, drawer)
    for window in each:
        if _continue_window(stage, whole, books, _spans(window, rates, totals, clock), counter, may_end=may_end):
            return True
    return False


@torch.inference_mode()
def continue_grid(stage: Stage, plan: GridPlan, books: Books, total: int, drawer: Drawer) -> None:
    """Draw codes behind those in `books` until the grid's stream has `total` frames, each as late as the plan has it.

    Of a step, what earlier frames have there is drawn with the first of the frames that are not known, and of these
    with the ones after them: a column that is late is drawn late.
    """
    (stream,) = plan.rates
    late = np.array([column.delay + int(plan.ends) for column in plan.columns])
    size = stage.length - int(late.max())
    _require_room(stage, size)
    num_columns = len(plan.columns)
    counter = _Counter(stage.name, (total - len(books[stream][0])) * num_columns, drawer)
    legal = [
        legal_tokens(plan.column_sizes[number], [plan.vocabulary.block(stream, column.book, number)])
        for number, column in enumerate(plan.columns)
    ]
    for window in windows(len(books[stream][0]), total, size):
        known, num = window.known - window.begin, window.end - window.begin
        placed = [np.pad(np.array(book[window.begin :], dtype=np.int64), (0, num - known)) for book in books[stream]]
        tokens_SQ = plan.lay({stream: StreamRows(np.array([num]), placed)}).tokens.reshape(-1, num_columns)
        context = Context(stage.model, cached=drawer.cached)
        begin, end = known + int(late.min()), num + int(late.max())
        context.add(_steps(tokens_SQ[:begin]))
        for step in range(begin, end):
            frame_Q = step - late
            hidden = None
            for number in np.flatnonzero((frame_Q >= known) & (frame_Q < num)).tolist():
                hidden = context.hidden() if hidden is None else hidden
                token = int(drawer.draw(stage.model.logits(hidden, number), legal[number]))
                tokens_SQ[step, number] = token
                counter.add()
            context.add(_steps(tokens_SQ[step : step + 1]))
        for number, column in enumerate(plan.columns):
            codes_T = tokens_SQ[known + late[number] : num + late[number], number]
            books[stream][column.book] += codes_T.tolist()


class _Counter:
    """Draws by draws, and tells how many there are."""

    def __init__(self, name: str, total: int, drawer: Drawer) -> None:
        self.drawer = drawer
        self._name, self._total, self._done = name, total, 0

    def add(self) -> None:
        self._done += 1
        self.drawer.on_draw(self._name, self._done, self._total)


def _continue_window(
    stage: Stage,
    plan: SequencePlan,
    books: Books,
    spans: Mapping[str, tuple[int, int]],
    counter: _Counter,
    *,
    may_end: bool,
) -> bool:
    drawer = counter.drawer
    context = Context(stage.model, cached=drawer.cached)
    for part in plan.parts:
        if isinstance(part, Mark):
            context.add(np.array([plan.vocabulary.token(part.token)]))
            continue
        begin, end = spans[part.stream]
        blocks = [plan.vocabulary.block(part.name, book) for book in part.books]
        held = [books[part.stream][book] for book in part.books]
        known = min(end, len(held[0]))
        context.add(_interleaved([book[begin:known] for book in held], blocks))
        ends = [block for block in plan.vocabulary.blocks if may_end and block.name == "<eos>"]
        legal = [legal_tokens(plan.column_sizes[0], [block]) for block in blocks]
        legal_or_end = legal[0] | legal_tokens(plan.column_sizes[0], ends)
        for frame in range(known, end):
            for place, (book, block) in enumerate(zip(held, blocks, strict=True)):
                # an end before anything was said would leave nothing to hear
                here = legal_or_end if place == 0 and frame > known else legal[place]
                token = int(drawer.draw(stage.model.logits(context.hidden()), here))
                if not block.offset <= token < block.end:
                    return True
                context.add(np.array([token]))
                book.append(token - block.offset)
                counter.add()
    return False


def _rates(runs: Sequence[Run], specs: Mapping[str, StreamSpec]) -> dict[str, Fraction | None]:
    """Frames of each stream for a frame of the last run's; None: they have no times in common."""
    clock = specs[runs[-1].stream]
    rates: dict[str, Fraction | None] = {}
    for run in runs:
        spec = specs[run.stream]
        has_times = spec.has_clock and clock.has_clock
        rates[run.stream] = spec.frame_rate / clock.frame_rate if has_times else None
    rates[runs[-1].stream] = Fraction(1)
    return rates


def _window_size(
    stage: Stage, plan: SequencePlan, rates: Mapping[str, Fraction | None], totals: Mapping[str, int], clock: str
) -> int:
    """How many frames of the clock a window has. Raises `UserError` if there is no room."""

    def num_steps(size: int) -> int:
        counts = {
            stream: totals[stream] if rate is None else min(totals[stream], math.ceil(size * rate) + (rate != 1))
            for stream, rate in rates.items()
        }
        rows = {stream: StreamRows(np.array([count]), ()) for stream, count in counts.items()}
        return int(plan.num_steps(rows)[0])

    size = bisect_right(range(1, totals[clock] + 1), stage.length, key=num_steps)
    if size < totals[clock]:
        _require_room(stage, size)
        if (whole := [stream for stream, rate in rates.items() if rate is None]) != []:
            raise UserError(
                f"The {stage.name} run was trained on sequences of {stage.length:,} steps; {whole[0]}, prompt and what "
                f"is to follow take {num_steps(totals[clock]):,}. Ask for fewer --seconds, give a shorter prompt, or "
                "train with a larger --length."
            )
    return size


def _require_room(stage: Stage, size: int) -> None:
    if size < 2:
        raise UserError(
            f"The {stage.name} run was trained on sequences of {stage.length:,} steps, which hold {max(size, 0)} "
            "frame(s): too few to go on from. Train with a larger --length."
        )


def _spans(
    window: Window, rates: Mapping[str, Fraction | None], totals: Mapping[str, int], clock: str
) -> dict[str, tuple[int, int]]:
    """The frames of each stream that a window covers."""
    spans = {}
    for stream, rate in rates.items():
        total = totals[stream]
        if rate is None:
            spans[stream] = 0, total
            continue
        end = total if window.end == totals[clock] else min(total, math.ceil(window.end * rate))
        spans[stream] = min(math.floor(window.begin * rate), end), end
    return spans


def _interleaved(books: Sequence[Sequence[int]], blocks: Sequence[Block]) -> Codes:
    offsets_K = np.array([block.offset for block in blocks])
    return (np.array(books, dtype=np.int64).T + offsets_K).reshape(-1)


def _steps(tokens_SQ: Codes) -> Codes:
    """As a model of one column, or of several, takes them."""
    return tokens_SQ[:, 0] if tokens_SQ.shape[1] == 1 else tokens_SQ
