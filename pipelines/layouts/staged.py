"""AudioLM's stages: semantic tokens, the first codebooks after them, the other codebooks after those.

Axes: see storage/layouts.py; M pieces of segments.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...storage.layouts import Ints, Laid, StreamRows
from ...tokenizers.spec import StreamSpec, UserError
from .sequence import Mark, Run, SequencePlan
from .vocabulary import Vocabulary, books_of, require_distinct, special, stream_taken


@dataclass(frozen=True, slots=True)
class coarse:
    """A segment's semantic tokens, then the first codebooks of its acoustic stream, frame by frame.

    The second stage of AudioLM (Borsos et al. 2022): T semantic tokens, then Q' for each of the T' acoustic frames. All
    are predicted; with `given`, no loss is asked for on the semantic ones. To generate, give all semantic tokens and
    what acoustic ones a prompt has. With `ends`, `<bos>` and `<eos>` around each segment.
    """

    semantic: str
    acoustic: str
    codebooks: int = 4  # Q', as in the paper
    given: bool = False
    ends: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.semantic: 1, self.acoustic: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        require_distinct("coarse", self.semantic, self.acoustic)
        semantic = stream_taken("coarse", specs, self.semantic)
        acoustic = stream_taken("coarse", specs, self.acoustic, self.codebooks)
        books = tuple(range(self.codebooks))
        blocks = [*books_of(self.semantic, semantic, [0]), *books_of(self.acoustic, acoustic, books)]
        runs = (Run(self.semantic, (0,), is_predicted=not self.given), Run(self.acoustic, books))
        return _around(runs, blocks, given=self.given) if self.ends else SequencePlan(runs, Vocabulary.of(blocks))


@dataclass(frozen=True, slots=True)
class fine:
    """The first codebooks of an acoustic stream, given, frame by frame, then the others, frame by frame.

    The third stage of AudioLM (Borsos et al. 2022): T x Q' tokens in front, which no loss is asked for, then
    T x (Q - Q'). The paper takes 3 s at a time, since fine tokens depend on what is near: with `piece`, a segment is
    one piece of so many frames after the other, coarse and fine tokens of each together, the last piece as it comes.
    """

    acoustic: str
    coarse: int = 4  # Q', as in the paper
    codebooks: int | None = None  # Q; None: all that are read
    piece: int | None = None  # frames: 150 are 3 s of 50 Hz

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.acoustic: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> "SequencePlan | PiecewisePlan":
        first, rest = _books("fine", specs, self.acoustic, self.coarse, self.codebooks)
        blocks = books_of(self.acoustic, specs[self.acoustic], first + rest)
        runs = (Run(self.acoustic, first, is_predicted=False), Run(self.acoustic, rest))
        whole = SequencePlan(runs, Vocabulary.of(blocks))
        if self.piece is None:
            return whole
        if self.piece < 1:
            raise UserError(f"Layout fine is given pieces of {self.piece} frames; they must have 1 or more.")
        return PiecewisePlan(whole, self.acoustic, self.piece)


@dataclass(frozen=True, slots=True)
class stages:
    """All stages of AudioLM in one sequence: semantic tokens, `<coarse>`, the first codebooks, `<fine>`, the others.

    One model instead of the three of Borsos et al. (2022); what each stage is given there, it has before it here. All
    steps are predicted. With `ends`, `<bos>` and `<eos>` around each segment.
    """

    semantic: str
    acoustic: str
    coarse: int = 4  # Q', as in the paper
    codebooks: int | None = None  # Q; None: all that are read
    ends: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.semantic: 1, self.acoustic: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> SequencePlan:
        require_distinct("stages", self.semantic, self.acoustic)
        semantic = stream_taken("stages", specs, self.semantic)
        first, rest = _books("stages", specs, self.acoustic, self.coarse, self.codebooks)
        blocks = [*books_of(self.semantic, semantic, [0]), *books_of(self.acoustic, specs[self.acoustic], first + rest)]
        blocks += special("<coarse>", "<fine>")
        parts = (
            Run(self.semantic, (0,)),
            Mark("<coarse>"),
            Run(self.acoustic, first),
            Mark("<fine>"),
            Run(self.acoustic, rest),
        )
        return _around(parts, blocks) if self.ends else SequencePlan(parts, Vocabulary.of(blocks))


@dataclass(frozen=True)
class PiecewisePlan:
    """A `LayoutPlan` of a stream in pieces of so many frames, each laid out as if it were a segment of its own."""

    whole: SequencePlan  # without marks
    stream: str
    piece: int  # frames

    @property
    def vocabulary(self) -> Vocabulary:
        return self.whole.vocabulary

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.whole.column_sizes

    @property
    def frame_tokens(self) -> Mapping[str, int]:
        return self.whole.frame_tokens

    @property
    def read_to_plan(self) -> Sequence[str]:
        return self.whole.read_to_plan

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        return self.whole.num_steps({self.stream: rows[self.stream]})

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        stream = rows[self.stream]
        pieces_N = -(-stream.counts_N // self.piece)
        counts_M = np.full(int(pieces_N.sum()), self.piece, dtype=np.int64)
        is_cut_N = pieces_N > 0
        last = np.cumsum(pieces_N)[is_cut_N] - 1
        counts_M[last] = (stream.counts_N - (pieces_N - 1) * self.piece)[is_cut_N]
        return self.whole.lay({self.stream: StreamRows(counts_M, stream.books)})

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        steps = int(self.whole.num_steps({self.stream: StreamRows(np.array([self.piece]), ())})[0])
        begins = range(0, max(len(laid.tokens), 1), steps)
        found = [self.whole.invert(Laid(laid.tokens[begin : begin + steps]))[self.stream] for begin in begins]
        books = [np.concatenate(parts) for parts in zip(*(each.books for each in found), strict=True)]
        return {self.stream: StreamRows(np.array([len(books[0])], dtype=np.int64), books)}


def _books(
    layout: str, specs: Mapping[str, StreamSpec], stream: str, coarse: int, codebooks: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The coarse codebooks and the fine ones. Raises `UserError` if there are none of either."""
    spec = stream_taken(layout, specs, stream, codebooks)
    num = spec.num_codebooks if codebooks is None else codebooks
    if not 1 <= coarse < num:
        raise UserError(
            f"Layout {layout} takes {coarse} coarse codebook(s) of stream {stream!r} and finer ones after them, of "
            f"{num} in all: give 1 coarse codebook or more, and fewer than there are."
        )
    return tuple(range(coarse)), tuple(range(coarse, num))


def _around(
    parts: Sequence[Mark | Run], blocks: Sequence[tuple[str, int | None, int]], *, given: bool = False
) -> SequencePlan:
    """With `<bos>` and `<eos>` around the parts."""
    parts = (Mark("<bos>", is_predicted=not given), *parts, Mark("<eos>"))
    return SequencePlan(parts, Vocabulary.of([*blocks, *special("<bos>", "<eos>")]))
