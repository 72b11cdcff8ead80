"""Talkers of one recording, separated and tokenized each for itself, in one sequence.

Axes: N segments, I speakers, C chunks of one speaker in all segments end to end, T their frames, K codebooks, S steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...storage.layouts import Codes, GroupBy, Grouping, Ints, Laid, StreamRows, member
from ...tokenizers.spec import StreamSpec, UserError
from .vocabulary import Vocabulary, books_of, special, stream_taken


@dataclass(frozen=True, slots=True)
class speakers:
    """By turns `chunk` frames of each speaker, behind the mark `<speaker-0>`, `<speaker-1>` ... of whose they are.

    For overlapping speech: talkers are separated (Conv-TasNet, Luo and Mesgarani 2019), each is tokenized, their tokens
    are interleaved. Speakers are the separated children of one segment, on one clock: the chunks of a round stand for
    the same time. One whose frames are over takes no part. Codebooks take turns frame by frame, as in `flatten`.
    """

    stream: str
    num_speakers: int = 2
    chunk: int = 25  # frames
    codebooks: int | None = None  # None: all that are read

    @property
    def grouping(self) -> Grouping:
        return Grouping(GroupBy.PARENT, self.num_speakers)

    @property
    def streams(self) -> Mapping[str, int | None]:
        return {self.stream: self.codebooks}

    def plan(self, specs: Mapping[str, StreamSpec]) -> "SpeakersPlan":
        if self.num_speakers < 1 or self.chunk < 1:
            raise UserError(
                f"Layout speakers is asked for {self.num_speakers} speakers by turns of {self.chunk} frames; both must "
                "be 1 or more."
            )
        names = tuple(member(self.stream, index) for index in range(self.num_speakers))
        each = [stream_taken("speakers", specs, name, self.codebooks) for name in names]
        books = range(each[0].num_codebooks if self.codebooks is None else self.codebooks)
        marks = special(*(_mark(index) for index in range(self.num_speakers)))
        vocabulary = Vocabulary.of([*books_of(self.stream, each[0], books), *marks])
        return SpeakersPlan(self.stream, names, len(books), self.chunk, vocabulary)


@dataclass(frozen=True)
class SpeakersPlan:
    """A `LayoutPlan` of `speakers`."""

    stream: str
    speakers: tuple[str, ...]
    num_codebooks: int
    chunk: int
    vocabulary: Vocabulary
    read_to_plan: tuple[str, ...] = ()

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    @property
    def frame_tokens(self) -> Mapping[str, int]:
        return {}

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        counts_IN = self._counts(rows)
        return (counts_IN * self.num_codebooks + self._chunks(counts_IN)).sum(axis=0)

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        counts_IN, steps_N = self._counts(rows), self.num_steps(rows)
        begins_N = np.cumsum(steps_N) - steps_N
        tokens_S = np.empty(int(steps_N.sum()), dtype=self.vocabulary.dtype)
        offsets = [self.vocabulary.block(self.stream, book).offset for book in range(self.num_codebooks)]
        for index, name in enumerate(self.speakers):
            segment_C, round_C = _rounds(self._chunks(counts_IN[index]))
            place_C = begins_N[segment_C] + self._before(counts_IN[:, segment_C], round_C, index)
            tokens_S[place_C] = self.vocabulary.token(_mark(index))
            size_C = np.minimum(counts_IN[index, segment_C] - round_C * self.chunk, self.chunk)
            first_C = place_C + 1 - (np.cumsum(size_C) - size_C) * self.num_codebooks
            place_T = np.repeat(first_C, size_C)
            place_T += np.arange(0, len(place_T) * self.num_codebooks, self.num_codebooks)
            for book, offset in enumerate(offsets):
                tokens_S[place_T + book] = rows[name].books[book].astype(tokens_S.dtype) + offset
        return Laid(tokens_S)

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        tokens_S = laid.tokens
        first, num = self.vocabulary.token(_mark(0)), len(self.speakers)
        is_mark_S = (tokens_S >= first) & (tokens_S < first + num)
        if len(tokens_S) and not is_mark_S[0]:
            raise ValueError("no speaker's mark at step 0")
        speaker_S = tokens_S[is_mark_S].astype(np.int64)[np.cumsum(is_mark_S) - 1] - first
        found = {}
        for index, name in enumerate(self.speakers):
            codes_TK = self._codes(tokens_S[(speaker_S == index) & ~is_mark_S], name)
            found[name] = StreamRows(np.array([len(codes_TK)], dtype=np.int64), list(codes_TK.T))
        if not np.array_equal(self.lay(found).tokens, tokens_S):
            raise ValueError("speakers that do not take turns")
        return found

    def _counts(self, rows: Mapping[str, StreamRows]) -> Ints:
        return np.stack([rows[name].counts_N for name in self.speakers])

    def _chunks(self, counts: Ints) -> Ints:
        return -(-counts // self.chunk)

    def _before(self, counts_IC: Ints, round_C: Ints, index: int) -> Ints:
        """Steps of a segment before a speaker's chunk: rounds that are over, and who comes earlier in this one."""
        rounds_IC = round_C + (np.arange(len(self.speakers)) < index)[:, None]
        frames_IC = np.minimum(counts_IC, rounds_IC * self.chunk)
        return (frames_IC * self.num_codebooks + self._chunks(frames_IC)).sum(axis=0)

    def _codes(self, tokens_S: Codes, name: str) -> Codes:
        """Codes `[T, K]`. Raises `ValueError` for codebooks that do not take turns."""
        blocks = [self.vocabulary.block(self.stream, book) for book in range(self.num_codebooks)]
        if len(tokens_S) % len(blocks):
            raise ValueError(f"{len(tokens_S)} tokens of {name}, of {len(blocks)} codebooks")
        codes_TK = tokens_S.reshape(-1, len(blocks)).astype(np.int64) - [block.offset for block in blocks]
        if ((codes_TK < 0) | (codes_TK >= [block.size for block in blocks])).any():
            raise ValueError(f"tokens of {name} whose codebooks do not take turns")
        return codes_TK


def _mark(index: int) -> str:
    return f"<speaker-{index}>"


def _rounds(chunks_N: Ints) -> tuple[Ints, Ints]:
    """Of each chunk its segment, and which of that segment's it is."""
    segment_C = np.repeat(np.arange(len(chunks_N)), chunks_N)
    return segment_C, np.arange(len(segment_C)) - np.repeat(np.cumsum(chunks_N) - chunks_N, chunks_N)
