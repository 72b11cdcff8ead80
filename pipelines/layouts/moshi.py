"""Moshi: what is said as text, frame by frame beside the codes of one speaker or of two.

Axes: N segments, T frames, X ids of text, S steps, each end to end, Q columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from ...storage.layouts import Codes, GroupBy, Grouping, Ints, Laid, StreamRows, member
from ...tokenizers.spec import StreamSpec, UserError
from .clock import covering, rate_on_clock
from .grid import Column
from .timed import frames_a_tick, num_text_ids, timed_stream, timed_text, within
from .vocabulary import Vocabulary, require_distinct, special, stream_taken

_PAD, _EPAD = "<pad>", "<epad>"


@dataclass(frozen=True, slots=True)
class _Placed:
    """The ids of text of N segments, and at which step of its segment each stands."""

    ids_X: Codes
    counts_N: Ints
    step_X: Ints

    @property
    def needs_N(self) -> Ints:
        """Steps up to the last id of each segment."""
        ends_N = np.cumsum(self.counts_N)
        last_N = np.append(self.step_X, 0)[ends_N - 1]  # of a segment without text: of another
        return np.where(self.counts_N > 0, last_N + 1, 0)


@dataclass(frozen=True)
class MoshiPlan:
    """A `LayoutPlan` of a column of text and columns of codes, the acoustic ones a little late."""

    text: str
    columns: tuple[Column, ...]  # of codes, which stand behind that of the text
    text_spec: StreamSpec
    rate: Fraction  # frames a tick
    vocabulary: Vocabulary
    frame_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def read_to_plan(self) -> tuple[str, ...]:
        return (self.text,)

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        return self._num_steps(rows, self._placed(rows))

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        return Laid(self._tokens(rows, self._placed(rows)))

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        tokens_SQ = laid.tokens
        if tokens_SQ.ndim != 2 or tokens_SQ.shape[1] != 1 + len(self.columns):
            raise ValueError(f"tokens {list(tokens_SQ.shape)} of {1 + len(self.columns)} columns")
        books: dict[str, list[Codes]] = {}
        for number, column in enumerate(self.columns, start=1):
            size = self.vocabulary.block(column.stream, column.book, number).size
            count = int(((tokens_SQ[:, number] >= 0) & (tokens_SQ[:, number] < size)).sum())
            codes_T = tokens_SQ[column.delay : column.delay + count, number].astype(np.int64)
            books.setdefault(column.stream, []).append(codes_T)
        found = {}
        for stream, each in books.items():
            if any(len(codes_T) != len(each[0]) for codes_T in each):
                raise ValueError(f"codebooks of {stream} with {[len(codes_T) for codes_T in each]} frames")
            found[stream] = StreamRows(np.array([len(each[0])], dtype=np.int64), each)
        step_X = np.flatnonzero((tokens_SQ[:, 0] >= 0) & (tokens_SQ[:, 0] < num_text_ids(self.text_spec)))
        counts_N = np.array([len(step_X)], dtype=np.int64)
        placed = _Placed(tokens_SQ[step_X, 0].astype(np.int64), counts_N, step_X)
        if not self._is_placed(placed, found) or not np.array_equal(self._tokens(found, placed), tokens_SQ):
            raise ValueError("tokens that no segment gives")
        found[self.text] = StreamRows(counts_N, [placed.ids_X])
        return found

    def held(self, rows: Mapping[str, StreamRows]) -> dict[str, StreamRows]:
        """What `invert` gives of one segment: all codes, and of the text its ids without their times."""
        placed = self._placed(rows)
        books = {
            stream: [column.book for column in self.columns if column.stream == stream] for stream in self._streams
        }
        codes = {
            stream: StreamRows(rows[stream].counts_N, [rows[stream].books[book] for book in read])
            for stream, read in books.items()
        }
        return {**codes, self.text: StreamRows(placed.counts_N, [placed.ids_X])}

    @property
    def _streams(self) -> list[str]:
        return list(dict.fromkeys(column.stream for column in self.columns))

    def _num_steps(self, rows: Mapping[str, StreamRows], placed: _Placed) -> Ints:
        steps_N = placed.needs_N
        for stream in self._streams:
            latest = max(column.delay for column in self.columns if column.stream == stream)
            counts_N = rows[stream].counts_N
            steps_N = np.maximum(steps_N, (counts_N + latest) * (counts_N > 0))
        return steps_N

    def _tokens(self, rows: Mapping[str, StreamRows], placed: _Placed) -> Codes:
        steps_N = self._num_steps(rows, placed)
        begin_N = np.cumsum(steps_N) - steps_N
        tokens_SQ = np.empty((int(steps_N.sum()), 1 + len(self.columns)), dtype=self.vocabulary.dtype)
        tokens_SQ[:] = np.array([self.vocabulary.token(_PAD, number) for number in range(tokens_SQ.shape[1])])
        for stream in self._streams:
            counts_N = rows[stream].counts_N
            runs = np.stack([counts_N, steps_N - counts_N], axis=1).reshape(-1)
            is_frame_S = np.repeat(np.tile([True, False], len(steps_N)), runs)  # of what is not late
            for number, column in enumerate(self.columns, start=1):
                if column.stream == stream:
                    on_time_S = is_frame_S[: max(len(is_frame_S) - column.delay, 0)]
                    tokens_SQ[column.delay :, number][on_time_S] = rows[stream].books[column.book]
        step_X = placed.step_X + np.repeat(begin_N, placed.counts_N)
        is_alone_X = np.ones(len(step_X), dtype=bool)  # no id before it
        is_alone_X[1:] = np.diff(step_X) > 1
        is_alone_X |= within(placed.counts_N) == 0
        tokens_SQ[step_X[is_alone_X] - 1, 0] = self.vocabulary.token(_EPAD)
        tokens_SQ[step_X, 0] = placed.ids_X
        return tokens_SQ

    def _placed(self, rows: Mapping[str, StreamRows]) -> _Placed:
        """Each id at the frame where its word begins, or right behind the id before it."""
        timed = timed_text(rows[self.text], self.text_spec)
        start_P = covering(timed.starts_P, self.rate)
        last_P = np.repeat(rows[self.columns[0].stream].counts_N - 1, timed.phrases_N)
        start_X = np.repeat(np.maximum(np.minimum(start_P, last_P), 1), timed.sizes_P)
        number_X, segment_X = within(timed.counts_N), np.repeat(np.arange(len(timed.counts_N)), timed.counts_N)
        # step x is the greater of start x and step x - 1 plus 1; less x that is a running maximum
        apart_X = segment_X * (int(start_X.max(initial=0)) + len(start_X) + 1)
        step_X = np.maximum.accumulate(start_X - number_X + apart_X) - apart_X + number_X
        return _Placed(timed.ids_X, timed.counts_N, step_X)

    def _is_placed(self, placed: _Placed, rows: Mapping[str, StreamRows]) -> bool:
        """Whether one segment's ids may stand there: no run of them begins before step 1 or behind the last frame."""
        starts = placed.step_X[np.diff(placed.step_X, prepend=-1) > 1]
        last = max(int(rows[self.columns[0].stream].counts_N[0]) - 1, 1)
        return not len(placed.step_X) or (placed.step_X[0] > 0 and int(starts.max()) <= last)


@dataclass(frozen=True, slots=True)
class moshi:
    """A column of text and one for each codebook; the first, semantic codebook on time, the others a little late.

    Moshi (Defossez et al. 2024) on Mimi's codes, with its inner monologue: an id of text stands at the frame in which
    its word begins, the further ids of the word behind it; `<pad>` stands where there is none, and `<epad>` before a
    word, unless an id stands there. No word begins before the second step, so that its `<epad>` has a place.
    Where ids are still in the way a word moves right, as far as it must, and where these are more than there are frames
    left, the sequence goes on with `<pad>` in the columns of codes: nothing is lost. A time behind the last frame is
    the last frame.

    `other` names the stream of whom the speaker listens to, whose columns come last; or `num_speakers=2` takes both of
    the sources that were separated from one segment, and the text of the first. `whisper-text` has the times of
    sentences: their ids all stand from the beginning of the sentence on.
    """

    text: str
    audio: str
    acoustic_delay: int = 1  # steps; 1 or 2 in the paper
    codebooks: int | None = None  # None: all that are read
    other: str | None = None
    num_speakers: int = 1

    @property
    def streams(self) -> Mapping[str, int | None]:
        others = {} if self.other is None else {self.other: self.codebooks}
        return {self.text: 1, self.audio: self.codebooks, **others}

    @property
    def grouping(self) -> Grouping | None:
        return Grouping(GroupBy.PARENT, 2) if self.num_speakers == 2 else None

    def plan(self, specs: Mapping[str, StreamSpec]) -> MoshiPlan:
        self._require_options()
        text, audio, other = self.text, self.audio, self.other
        if self.grouping is not None:
            text, audio, other = member(text, 0), member(audio, 0), member(audio, 1)
        text_spec = timed_stream("moshi", specs, text)
        columns: list[Column] = []
        for stream in [audio] if other is None else [audio, other]:
            spec = stream_taken("moshi", specs, stream, self.codebooks)
            num = spec.num_codebooks if self.codebooks is None else self.codebooks
            columns += [Column(stream, book, self.acoustic_delay if book else 0) for book in range(num)]
        rate = frames_a_tick("moshi", text_spec, audio, specs[audio])
        if other is not None and rate_on_clock("moshi", specs, other, audio) != 1:
            raise UserError(
                f"Layout moshi takes two speakers on one clock; {audio!r} has {float(specs[audio].frame_rate):g} "
                f"frames a second, {other!r} {float(specs[other].frame_rate):g}. Name a stream with as many."
            )
        blocks = [
            [(text, 0, num_text_ids(text_spec)), *special(_PAD, _EPAD)],
            *([(each.stream, each.book, specs[each.stream].codebook_size), *special(_PAD)] for each in columns),
        ]
        return MoshiPlan(text, tuple(columns), text_spec, rate, Vocabulary.of(*blocks))

    def _require_options(self) -> None:
        require_distinct("moshi", self.text, self.audio, *([] if self.other is None else [self.other]))
        if self.acoustic_delay < 0:
            raise UserError(f"Layout moshi has an acoustic delay of {self.acoustic_delay} steps; expected 0 or more.")
        if self.num_speakers not in (1, 2):
            raise UserError(f"Layout moshi takes 1 or 2 speakers; {self.num_speakers} were asked for.")
        if self.num_speakers == 2 and self.other is not None:
            raise UserError(
                f"Layout moshi takes a second speaker either from stream {self.other!r} or from what was separated: "
                "leave out other or num_speakers."
            )
