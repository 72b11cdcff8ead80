"""Layouts of one token a step: runs of codes and special tokens, one after the other.

Axes: N segments, K codebooks of a run, T frames end to end, S steps end to end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...storage.layouts import Codes, Ints, Laid, StreamRows
from .vocabulary import Block, Vocabulary


@dataclass(frozen=True, slots=True)
class Mark:
    """A special token."""

    token: str
    is_predicted: bool = True


@dataclass(frozen=True, slots=True)
class Run:
    """Codebooks of a stream frame by frame: of each frame all of them, before the next frame."""

    stream: str
    books: tuple[int, ...]
    is_predicted: bool = True
    block: str | None = None  # whose tokens these are; None: the stream's
    prompt: int = 0  # first frames that are given, where the others are predicted

    @property
    def name(self) -> str:
        return self.stream if self.block is None else self.block


@dataclass(frozen=True)
class SequencePlan:
    """A `LayoutPlan` of parts in their order.

    Two runs of the same tokens need a mark between them: nothing else tells where the one ends. Runs of one stream
    have all of its frames each, so together they hold its codebooks in their order.
    """

    parts: tuple[Mark | Run, ...]
    vocabulary: Vocabulary
    frame_tokens: Mapping[str, int] = field(default_factory=dict)
    read_to_plan: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        before: set[Block] = set()  # of all runs since the last mark: those between may be empty
        for part in self.parts:
            blocks = set(self._blocks(part)) if isinstance(part, Run) else set()
            assert not before & blocks, f"{part} follows a run of the same tokens"
            before = before | blocks if blocks else set()

    @property
    def column_sizes(self) -> Sequence[int]:
        return self.vocabulary.column_sizes

    def num_steps(self, rows: Mapping[str, StreamRows]) -> Ints:
        num_segments = len(next(iter(rows.values())).counts_N)
        steps_N = np.zeros(num_segments, dtype=np.int64)
        for part in self.parts:
            steps_N += _steps(part, rows)
        return steps_N

    def lay(self, rows: Mapping[str, StreamRows]) -> Laid:
        steps_N = self.num_steps(rows)
        place_N = np.cumsum(steps_N) - steps_N
        if len(self.parts) == 1 and isinstance(self.parts[0], Run):  # nothing to put together
            return Laid(self._interleaved(self.parts[0], rows), self._losses(rows, steps_N))
        tokens_S = np.empty(int(steps_N.sum()), dtype=self.vocabulary.dtype)
        for part in self.parts:
            if isinstance(part, Mark):
                tokens_S[place_N] = self.vocabulary.token(part.token)
            else:
                put(tokens_S, place_N, self._interleaved(part, rows), _steps(part, rows))
            place_N = place_N + _steps(part, rows)
        return Laid(tokens_S, self._losses(rows, steps_N))

    def invert(self, laid: Laid) -> dict[str, StreamRows]:
        tokens_S, place, found = laid.tokens, 0, dict[str, StreamRows]()
        for part in self.parts:
            if isinstance(part, Mark):
                expected = self.vocabulary.token(part.token)
                if place >= len(tokens_S) or tokens_S[place] != expected:
                    raise ValueError(f"no {part.token} at step {place}")
                place += 1
                continue
            blocks = self._blocks(part)
            inside = np.zeros(len(tokens_S) - place, dtype=bool)
            for block in blocks:
                inside |= (tokens_S[place:] >= block.offset) & (tokens_S[place:] < block.end)
            outside = np.flatnonzero(~inside)
            count = int(outside[0]) if len(outside) else len(inside)
            codes_TK = _frames(tokens_S[place : place + count], blocks, place)
            place += count
            before = found.get(part.stream)
            if before is not None and before.counts_N[0] != len(codes_TK):
                raise ValueError(f"{before.counts_N[0]} and {len(codes_TK)} frames of {part.stream}")
            counts_N = np.array([len(codes_TK)], dtype=np.int64)
            found[part.stream] = StreamRows(counts_N, [*(before.books if before else ()), *codes_TK.T])
        if place != len(tokens_S):
            raise ValueError(f"{len(tokens_S) - place} steps more than there are parts for")
        return found

    def _blocks(self, run: Run) -> list[Block]:
        return [self.vocabulary.block(run.name, book) for book in run.books]

    def _interleaved(self, run: Run, rows: Mapping[str, StreamRows]) -> Codes:
        books, blocks = rows[run.stream].books, self._blocks(run)
        if len(blocks) == 1 and blocks[0].offset == 0:
            return books[run.books[0]]
        dtype = self.vocabulary.dtype  # of the sums, too: an offset may not fit the codes' own
        tokens_TK = np.empty((len(books[run.books[0]]), len(blocks)), dtype=dtype)
        for column, (book, block) in enumerate(zip(run.books, blocks, strict=True)):
            np.add(books[book], block.offset, out=tokens_TK[:, column], dtype=dtype, casting="unsafe")
        return tokens_TK.reshape(-1)

    def _losses(self, rows: Mapping[str, StreamRows], steps_N: Ints) -> NDArray[np.bool_] | None:
        if all(part.is_predicted and _prompt(part) == 0 for part in self.parts):
            return None
        counts = []  # of each part [N] steps that are given, then those that are predicted
        for part in self.parts:
            part_N = _steps(part, rows)
            given_N = np.minimum(part_N, _prompt(part)) if part.is_predicted else part_N
            counts += [given_N, part_N - given_N]
        is_predicted = np.tile([False, True], len(steps_N) * len(self.parts))
        return np.repeat(is_predicted, np.stack(counts, axis=1).reshape(-1))


def put(tokens: NDArray[Any], place_N: Ints, source: NDArray[Any], counts_N: Ints) -> None:
    """Write each segment's run of `source`, end to end there, to its place. A copy each: long runs make that fast."""
    begin = 0
    for place, count in zip(place_N.tolist(), counts_N.tolist(), strict=True):
        tokens[place : place + count] = source[begin : begin + count]
        begin += count


def _steps(part: Mark | Run, rows: Mapping[str, StreamRows]) -> Ints:
    counts_N = next(iter(rows.values())).counts_N
    return np.ones_like(counts_N) if isinstance(part, Mark) else rows[part.stream].counts_N * len(part.books)


def _prompt(part: Mark | Run) -> int:
    """First steps of a part that are given."""
    return 0 if isinstance(part, Mark) else part.prompt * len(part.books)


def _frames(tokens_S: Codes, blocks: Sequence[Block], place: int) -> Codes:
    """Codes `[T, K]`. Raises `ValueError` for codebooks that do not take turns."""
    num = len(blocks)
    if len(tokens_S) % num:
        raise ValueError(f"{len(tokens_S)} tokens at step {place}, of {num} codebooks")
    codes_TK = tokens_S.reshape(-1, num).astype(np.int64) - np.array([block.offset for block in blocks])
    sizes_K = np.array([block.size for block in blocks])
    if ((codes_TK < 0) | (codes_TK >= sizes_K)).any():
        raise ValueError(f"tokens after step {place} whose codebooks do not take turns")
    return codes_TK
