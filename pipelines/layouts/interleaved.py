"""Text and speech that take turns in one sequence, changing at the borders of words or sentences.

Axes: N segments, P phrases, X ids of text, U units, S spans, each end to end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ...storage.layouts import Codes, Ints, Laid, StreamRows
from ...storage.selection import one_of
from ...tokenizers.spec import StreamSpec, UserError
from .clock import covering
from .timed import TimedText, frames_a_tick, num_text_ids, timed_stream, timed_text, within
from .vocabulary import Vocabulary, books_of, offset_codes, require_distinct, special, stream_taken

TEXT, SPEECH = "[TEXT]", "[SPEECH]"


class First(StrEnum):
    """What a segment begins with; `either`: speech if it has an odd number of units."""

    TEXT = "text"
    SPEECH = "speech"
    EITHER = "either"


@dataclass(frozen=True, slots=True)
class Span:
    """A span of a segment: the ids of its text, or its units."""

    is_speech: bool
    codes: Codes


@dataclass(frozen=True, slots=True)
class _Spans:
    """Spans of N segments end to end, and which of the ids of text or of the units each holds."""

    num_N: Ints
    is_speech_S: NDArray[np.bool_]
    begins_S: Ints  # in the ids or units of all segments
    counts_S: Ints

    def __iter__(self) -> Iterator[tuple[bool, int, int]]:
        """Of each span whether it is speech, its beginning and count."""
        return zip(self.is_speech_S.tolist(), self.begins_S.tolist(), self.counts_S.tolist(), strict=True)


@dataclass(frozen=True)
class InterleavedPlan:
    """A `LayoutPlan` of spans of text and of speech in turn, each behind its mark."""

    text: str
    units: str
    words: int
    first: First
    specs: Mapping[str, StreamSpec]
    rate: Fraction  # frames a tick
    vocabulary: Vocabulary
    frame_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def read_to_plan(self) -> tuple[str, ...]:
        return (self.text, self.units) if self.specs[self.units].durations else (self.text,)

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        spans = self._spans(self._timed(rows), rows[self.units])
        steps_S, ends_N = np.append(0, np.cumsum(1 + spans.counts_S)), np.cumsum(spans.num_N)
        return steps_S[ends_N] - steps_S[ends_N - spans.num_N]

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        timed = self._timed(rows)
        spans = self._spans(timed, rows[self.units])
        dtype, place_S = self.vocabulary.dtype, np.cumsum(1 + spans.counts_S) - spans.counts_S
        tokens = np.empty(int(spans.counts_S.sum()) + len(place_S), dtype=dtype)
        tokens[place_S - 1] = np.where(spans.is_speech_S, self.vocabulary.token(SPEECH), self.vocabulary.token(TEXT))
        offset = self.vocabulary.block(self.units).offset
        sources = (timed.ids_X, offset_codes(rows[self.units].books[0], offset, dtype))
        for place, (is_speech, begin, count) in zip(place_S.tolist(), spans, strict=True):  # a copy each: seconds long
            tokens[place : place + count] = sources[is_speech][begin : begin + count]
        return Laid(tokens)

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        spans = self.spans(laid)
        return {
            self.text: _joined([span.codes for span in spans if not span.is_speech]),
            self.units: _joined([span.codes for span in spans if span.is_speech]),
        }

    def spans(self, laid: Laid) -> list[Span]:
        """The spans that the steps of one segment hold. Number i holds its phrases from number i x `words` on.

        Raises `ValueError` for tokens that no segment gives.
        """
        tokens, text, units = laid.tokens, self.vocabulary.block(self.text), self.vocabulary.block(self.units)
        is_mark = tokens >= units.end
        place_S = np.flatnonzero(is_mark)
        if not len(place_S) or place_S[0]:
            raise ValueError(f"a sequence that does not begin with {TEXT} or {SPEECH}")
        is_speech_S = tokens[place_S] == self.vocabulary.token(SPEECH)
        if (is_speech_S[1:] == is_speech_S[:-1]).any():
            raise ValueError("two spans of one kind in a row")
        if self.first is not First.EITHER and len(place_S) > 1 and is_speech_S[0] != (self.first is First.SPEECH):
            raise ValueError(f"a sequence that does not begin with {self.first}")
        found = []
        for is_speech, part in zip(is_speech_S.tolist(), np.split(tokens, place_S)[1:], strict=True):
            block, codes = units if is_speech else text, part[1:].astype(np.int64)
            if ((codes < block.offset) | (codes >= block.end)).any():
                raise ValueError(f"tokens in a span of {block.name} that are none of its")
            if not is_speech and not len(codes):
                raise ValueError("a span of no text")
            found.append(Span(is_speech, codes - block.offset))
        return found

    def held(self, rows: Mapping[str, StreamRows]) -> dict[str, StreamRows]:
        """What `invert` gives of one segment: the ids of the spans of text, the units of those of speech."""
        timed = self._timed(rows)
        found: dict[str, list[Codes]] = {self.text: [], self.units: []}
        for is_speech, begin, count in self._spans(timed, rows[self.units]):
            source = rows[self.units].books[0] if is_speech else timed.ids_X
            found[self.units if is_speech else self.text].append(source[begin : begin + count])
        return {stream: _joined(parts) for stream, parts in found.items()}

    def _timed(self, rows: Mapping[str, StreamRows]) -> TimedText:
        return timed_text(rows[self.text], self.specs[self.text])

    def _spans(self, timed: TimedText, units: StreamRows) -> _Spans:
        num_N = np.maximum(-(-timed.phrases_N // self.words), 1)
        segment_S, number_S = np.repeat(np.arange(len(num_N)), num_N), within(num_N)
        phrases_N = np.cumsum(timed.phrases_N)  # of all segments so far
        first_S = (phrases_N - timed.phrases_N)[segment_S] + number_S * self.words
        last_S = np.minimum(first_S + self.words, phrases_N[segment_S])
        ids_P = np.append(0, np.cumsum(timed.sizes_P))

        is_first_S = number_S == 0
        starts_P = np.append(timed.starts_P, 0)  # a segment without phrases may be the last
        frame_S = np.where(is_first_S, 0, covering(starts_P[first_S], self.rate))
        unit_S = np.maximum.accumulate(_units_at(frame_S, units, segment_S))
        num_units_S = np.diff(np.append(unit_S, units.counts_N.sum()))

        starts_N = np.full(len(num_N), self.first is First.SPEECH)
        if self.first is First.EITHER:
            starts_N = units.counts_N % 2 == 1
        is_speech_S = (starts_N | (timed.phrases_N == 0))[segment_S] ^ (number_S % 2 == 1)
        num_ids_S = ids_P[last_S] - ids_P[first_S]
        return _Spans(
            num_N,
            is_speech_S,
            np.where(is_speech_S, unit_S, ids_P[first_S]),
            np.where(is_speech_S, num_units_S, num_ids_S),
        )


@dataclass(frozen=True, slots=True)
class interleaved:
    """Text and units in turn, in one vocabulary: `[TEXT]` ids `[SPEECH]` units `[TEXT]` ...

    SpiritLM (Nguyen et al. 2024): a change at the border of a word, here behind every `words` words (sentences, where
    the text has the times of these, as `whisper-text` does). Speech lasts from the beginning of its first word to that
    of the next text's; what comes before all words belongs to the first span. So one sequence holds either the text or
    the units of each span, and `first="text"` and `first="speech"` together hold all. A segment without words is
    all speech.

    Ids of text come first in the vocabulary, as in their text tokenizer, so that a text model's embedding can be
    extended. `units` may be deduplicated: a unit belongs to the span that it begins in.
    """

    text: str
    units: str
    words: int = 10
    first: str = "either"  # or text, or speech: see `First`

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.text: 1, self.units: 1}

    def plan(self, specs: Mapping[str, StreamSpec]) -> InterleavedPlan:
        require_distinct("interleaved", self.text, self.units)
        text, units = timed_stream("interleaved", specs, self.text), stream_taken("interleaved", specs, self.units)
        if self.words < 1:
            raise UserError(f"Layout interleaved has spans of {self.words} words; expected 1 or more.")
        first = one_of(First, self.first, "Layout interleaved: first")
        rate = units.frame_rate / text.frame_rate  # of deduplicated units those of the frames that they stand for
        if not units.durations:
            rate = frames_a_tick("interleaved", text, self.units, units)
        vocabulary = Vocabulary.of(
            [(self.text, 0, num_text_ids(text)), *books_of(self.units, units, [0]), *special(TEXT, SPEECH)]
        )
        return InterleavedPlan(self.text, self.units, self.words, first, specs, rate, vocabulary)


def _units_at(frame_S: Ints, units: StreamRows, segment_S: Ints) -> Ints:
    """Which unit of all segments is the first to begin at a frame of a segment or behind; behind all, its end."""
    if units.durations_T is None:
        return units.begins_N[segment_S] + np.minimum(frame_S, units.counts_N[segment_S])
    ends_U = np.append(0, np.cumsum(units.durations_T, dtype=np.int64))
    begin_N, end_N = ends_U[units.begins_N], ends_U[units.begins_N + units.counts_N]
    return np.searchsorted(ends_U[:-1], np.minimum(begin_N[segment_S] + frame_S, end_N[segment_S]))


def _joined(parts: Sequence[Codes]) -> StreamRows:
    codes = np.concatenate([np.empty(0, dtype=np.int64), *parts])
    return StreamRows(np.array([len(codes)], dtype=np.int64), [codes])
