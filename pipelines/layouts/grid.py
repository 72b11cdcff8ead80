"""Layouts of several tokens a step: codebooks side by side, each as many steps late as one likes.

Axes: N segments, K codebooks, T frames end to end, S steps end to end, Q columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np

from ...storage.layouts import Codes, Ints, Laid, StreamRows
from ...tokenizers.spec import StreamSpec, UserError
from .clock import (
    beginnings,
    covering,
    first_step,
    max_frames,
    place_in_step,
    steps_filled,
    steps_needed,
    steps_of_frames,
)
from .vocabulary import Vocabulary, special, stream_taken


@dataclass(frozen=True, slots=True)
class Column:
    """A codebook of a stream, so many steps late. Of a stream faster than the clock each column holds one part."""

    stream: str
    book: int
    delay: int = 0  # steps
    part: int = 0  # which of the frames that begin within a step


@dataclass(frozen=True)
class GridPlan:
    """A `LayoutPlan` of columns on one clock: `<pad>` where a column has nothing.

    A segment has as many steps as its longest column needs; without frames it has none. With `ends`, a first step of
    `<bos>`, and `<eos>` in each column behind its last frame: a column that is late ends late, and a model that has
    said `<eos>` in one column goes on in the others.
    """

    columns: tuple[Column, ...]
    rates: Mapping[str, Fraction]  # of each stream, frames per step: see clock.py
    vocabulary: Vocabulary
    ends: bool = False
    frame_tokens: Mapping[str, int] = field(default_factory=dict)
    read_to_plan: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        columns: Sequence[Column],
        rates: Mapping[str, Fraction],
        specs: Mapping[str, StreamSpec],
        *,
        ends: bool = False,
        masked: Sequence[str] = (),
    ) -> "GridPlan":
        """With the vocabulary of the columns; those of streams that are `masked` have a `<mask>`, too."""
        for stream in rates:
            books = {column.book for column in columns if column.stream == stream}
            assert books == set(range(len(books))), f"{stream} begins with another codebook than its first"
        blocks = [
            [
                (column.stream, column.book, specs[column.stream].codebook_size),
                *special("<pad>", *(["<bos>", "<eos>"] if ends else []), *(["<mask>"] * (column.stream in masked))),
            ]
            for column in columns
        ]
        return cls(tuple(columns), rates, Vocabulary.of(*blocks), ends)

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        steps_N = np.zeros(len(next(iter(rows.values())).counts_N), dtype=np.int64)
        for stream, rate in self.rates.items():
            needed_N, late = steps_needed(rows[stream].counts_N, rate), self._latest(stream)
            steps_N = np.maximum(steps_N, needed_N + late + 2 if self.ends else (needed_N + late) * (needed_N > 0))
        return steps_N

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        steps_N = self.num_steps(rows)
        pads = self._specials("<pad>")
        common = np.bincount(pads).argmax()
        tokens_SQ = np.full((int(steps_N.sum()), len(self.columns)), common, dtype=self.vocabulary.dtype)
        for number in np.flatnonzero(pads != common):
            tokens_SQ[:, number] = pads[number]
        place_N = np.cumsum(steps_N) - steps_N
        if self.ends:
            tokens_SQ[place_N] = self._specials("<bos>")
        for stream, rate in self.rates.items():
            left_N = np.maximum(steps_N - self._latest(stream) - 2 * int(self.ends), 0)
            held_N = np.minimum(steps_filled(rows[stream].counts_N, rate), left_N)
            lay = self._lay_slow if rate <= 1 else self._lay_fast
            lay(tokens_SQ, stream, rows[stream], steps_N, held_N)
            for number, column in self._columns_of(stream) if self.ends else ():
                ends_N = place_N + 1 + column.delay + held_N
                tokens_SQ[ends_N, number] = self.vocabulary.token("<eos>", number)
        return Laid(tokens_SQ if len(self.columns) > 1 else tokens_SQ[:, 0])

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        shape = (len(laid.tokens), len(self.columns)) if len(self.columns) > 1 else (len(laid.tokens),)
        if laid.tokens.shape != shape:
            raise ValueError(f"tokens {list(laid.tokens.shape)} of {len(self.columns)} column(s)")
        found = {}
        for stream in self.rates:
            num_books = 1 + max(column.book for column in self.columns if column.stream == stream)
            books = [self._codes(laid.tokens.reshape(-1, len(self.columns)), stream, book) for book in range(num_books)]
            if any(len(book_T) != len(books[0]) for book_T in books):
                raise ValueError(f"codebooks of {stream} with {[len(book_T) for book_T in books]} frames")
            found[stream] = StreamRows(np.array([len(books[0])], dtype=np.int64), books)
        again = self.lay(found).tokens
        if len(again) != len(laid.tokens):
            raise ValueError(f"{len(laid.tokens)} steps, where what they hold takes {len(again)}")
        if (wrong := np.flatnonzero((again != laid.tokens).reshape(-1, len(self.columns)).any(axis=1))).size:
            raise ValueError(f"tokens at step {wrong[0]} that no segment gives")
        return found

    def _specials(self, name: str) -> Codes:
        return np.array([self.vocabulary.token(name, number) for number in range(len(self.columns))])

    def _latest(self, stream: str) -> int:
        return max(column.delay for _, column in self._columns_of(stream))

    def _columns_of(self, stream: str) -> list[tuple[int, Column]]:
        return [(number, column) for number, column in enumerate(self.columns) if column.stream == stream]

    def _lay_slow(self, tokens_SQ: Codes, stream: str, rows: StreamRows, steps_N: Ints, held_N: Ints) -> None:
        """Write a stream as fast as the clock or slower: in each step one frame, `held_N` steps of each segment."""
        held_or_not = np.stack([held_N, steps_N - held_N], axis=1).reshape(-1)
        is_held_S = np.repeat(np.tile([True, False], len(steps_N)), held_or_not)  # where nothing is late
        rate = self.rates[stream]
        steps_T = None if rate == 1 else steps_of_frames(rows.counts_N, held_N, rate)
        for number, column in self._columns_of(stream):
            book_T = rows.books[column.book]
            codes_S = book_T if steps_T is None else np.repeat(book_T, steps_T)
            late = column.delay + int(self.ends)
            if len(codes_S) == len(tokens_SQ):  # no step is without
                tokens_SQ[:, number] = codes_S
            else:
                tokens_SQ[late:, number][is_held_S[: max(len(tokens_SQ) - late, 0)]] = codes_S

    def _lay_fast(self, tokens_SQ: Codes, stream: str, rows: StreamRows, steps_N: Ints, held_N: Ints) -> None:
        """Write a stream faster than the clock: each frame to its step, and to the column of its place there."""
        rate, longest = self.rates[stream], np.arange(rows.counts_N.max(initial=0))
        step_T, part_T = first_step(longest, rate), place_in_step(longest, rate)
        place_N = np.cumsum(steps_N) - steps_N + int(self.ends)
        for part in range(max_frames(rate)):
            frame_X = np.flatnonzero(part_T == part)  # X of the longest segment's are such
            num_N = np.searchsorted(frame_X, rows.counts_N)
            source = beginnings(frame_X, num_N) + np.repeat(rows.begins_N, num_N)
            target = beginnings(step_T[frame_X], num_N) + np.repeat(place_N, num_N)
            for number, column in self._columns_of(stream):
                if column.part == part:
                    tokens_SQ[target + column.delay, number] = rows.books[column.book][source]

    def _codes(self, tokens_SQ: Codes, stream: str, book: int) -> Codes:
        """Codes `[T]` of a codebook, if the tokens are a segment's. Raises `ValueError` if they are clearly not."""
        rate = self.rates[stream]
        columns = sorted((each.part, number) for number, each in self._columns_of(stream) if each.book == book)
        numbers = np.array([number for _, number in columns])
        begins = np.array([self.columns[number].delay + int(self.ends) for number in numbers])
        is_code_SQ = (tokens_SQ >= 0) & (tokens_SQ < self.vocabulary.block(stream, book, numbers[0]).size)
        if rate > 1:
            count = int(is_code_SQ[:, numbers].sum())
        else:
            last = np.flatnonzero(is_code_SQ[begins[0] :, numbers[0]])[-1:]
            count = int(covering(last, rate).sum()) + len(last)
        frame_T = np.arange(count)
        part_T = place_in_step(frame_T, rate)
        step_T, column_T = first_step(frame_T, rate) + begins[part_T], numbers[part_T]
        if count and (step_T.max() >= len(tokens_SQ) or not is_code_SQ[step_T, column_T].all()):
            raise ValueError(f"no code where codebook {book} of {stream} has one")
        return tokens_SQ[step_T, column_T]


@dataclass(frozen=True, slots=True)
class parallel:
    """All codebooks of a frame at once: T steps of K tokens.

    The "parallel pattern" of MusicGen (Copet et al. 2023), and what a backbone with a small decoder for the codebooks
    of a frame reads. With `ends`, a step of `<bos>` before and one of `<eos>` behind each segment: what generation
    without a prompt begins and ends with.
    """

    stream: str
    codebooks: int | None = None  # None: all that are read
    ends: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> GridPlan:
        columns = side_by_side("parallel", self.stream, specs, self.codebooks)
        return GridPlan.of(columns, {self.stream: Fraction(1)}, specs, ends=self.ends)


@dataclass(frozen=True, slots=True)
class delay:
    """Codebook k of a stream k steps later than the first, or as late as `delays` say: T + max(delays) steps.

    The "delay pattern" of MusicGen (Copet et al. 2023): a codebook is predicted with the coarser ones of its frame
    known, in T + K - 1 steps instead of the T x K of `flatten`. `<pad>` stands where a codebook has not begun or is
    over. With `ends`, a first step of `<bos>`, and `<eos>` in each column behind its last code, as late as the codes.
    """

    stream: str
    delays: tuple[int, ...] | None = None  # steps, one for each codebook; None: 0, 1, 2, ...
    codebooks: int | None = None  # None: as many as there are delays, or all that are read
    ends: bool = False

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: len(self.delays) if self.codebooks is None and self.delays is not None else self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> GridPlan:
        columns = side_by_side("delay", self.stream, specs, self.streams[self.stream])
        delays = range(len(columns)) if self.delays is None else self.delays
        if len(delays) != len(columns):
            raise UserError(
                f"Layout delay has {len(delays)} delay(s) for {len(columns)} codebook(s): give one for each."
            )
        if min(delays) < 0:
            raise UserError(f"Layout delay has a delay of {min(delays)} steps; each must be 0 or more.")
        late = [replace(column, delay=steps) for column, steps in zip(columns, delays, strict=True)]
        return GridPlan.of(late, {self.stream: Fraction(1)}, specs, ends=self.ends)


def side_by_side(layout: str, stream: str, specs: Mapping[str, StreamSpec], codebooks: int | None) -> list[Column]:
    """A column for each of so many codebooks, None: all that are read. Raises `UserError` in the name of a layout."""
    spec = stream_taken(layout, specs, stream, codebooks)
    return [Column(stream, book) for book in range(spec.num_codebooks if codebooks is None else codebooks)]
